"""mixed: the budget is kept, what is written is what was chosen, and what each choice costs was
measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvr_lite.errors import DataError, UsageError
from lvr_lite.export import onnxfile
from lvr_lite.export.parity import StartsWithLatents
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, Prompt, decode
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.spec import LatentSpec
from lvr_lite.quant import answers, calibration, integers, search
from lvr_lite.quant.answers import answer_loss, reference_answers
from lvr_lite.quant.blocks import gptq
from lvr_lite.quant.calibrated import quantize_calibrated
from lvr_lite.quant.calibration import Calibration
from lvr_lite.quant.products import Products
from lvr_lite.quant.prompts import load_prompts
from lvr_lite.quant.quantize import quantize_bundle
from lvr_lite.toy.make import write_scenes
from tests.fakes import END, IMAGE, START, A, B, C, Scripted

BUDGET = 5.5


@pytest.fixture(scope="module")
def quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "PROMPTS", 8)
        patch.setattr(calibration, "STEPS", 2)
        patch.setattr(search, "POINTS", 3)
        patch.setattr(answers, "TOKENS", 6)
        yield


@pytest.fixture(scope="module")
def source(small_fp32: Path) -> Bundle:
    return Bundle.open(small_fp32)


@pytest.fixture(scope="module")
def mixed(
    source: Bundle, tmp_path_factory: pytest.TempPathFactory, quickly: None
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixed") / "out"
    report = quantize_calibrated(source, folder, "mixed", "scenes", print, bits=BUDGET)
    return folder, report.to_json()


def test_the_budget_is_kept_and_used(mixed: tuple[Path, dict[str, Any]]) -> None:
    folder, report = mixed
    assert BUDGET - 0.7 < report["bits_per_weight"] <= BUDGET + 1e-3
    assert report["bits_per_weight"] == pytest.approx(report["search"]["chosen"]["bits"], abs=2e-3)
    assert json.loads((folder / "report.json").read_text())["search"] == report["search"]
    names = sorted(p.name for p in folder.iterdir())
    kept = ["drift.png", "lvr.json", "onnx", "pareto.png", "report.json", "tokenizer.json"]
    assert names == ["SHA256SUMS", *kept]
    assert all((folder / name).stat().st_size > 10_000 for name in ("drift.png", "pareto.png"))
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_what_is_written_has_the_bits_that_were_chosen(mixed: tuple[Path, dict[str, Any]]) -> None:
    folder, report = mixed
    manifest = Bundle.open(folder).manifest
    assert manifest.precision == "mixed"
    found: dict[str, dict[str, int]] = {}
    for name, graph in manifest.graphs.items():
        nodes = onnxfile.load(folder / graph.path).graph.node
        bits = {n.name: next((a.i for a in n.attribute if a.name == "bits"), 0) for n in nodes}
        found[name] = {node: value for node, value in bits.items() if value}
        assert report["graphs"][name]["bits"] == found[name]
    eight = set(report["search"]["chosen"]["eight"])
    assert set(found["vision_encoder"].values()) == {8}
    assert (
        set(found["lm_head"].values())
        == set(found["embed_tokens"].values())
        == {8 if search.HEAD in eight else 4}
    )
    assert len(found["decoder"]) == 2 * 7
    wide = {
        name.split("/")[0].removeprefix("language_model.")
        for name, bits in found["decoder"].items()
        if bits == 8
    }
    assert wide == eight - {search.HEAD}
    assert 0 < len(eight) < report["search"]["units"]
    assert "4 bits, block 32, zero points" in report["graphs"]["decoder"]["schemes"]


@pytest.mark.usefixtures("quickly")
def test_what_is_written_is_rounded_as_it_would_be_anew(
    source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counting(*arguments: Any) -> Any:
        calls.append(arguments)
        return gptq(*arguments)

    monkeypatch.setattr(integers, "gptq", counting)
    loaded = Calibration.load(source, "scenes", tmp_path, print)
    plan = search.Search(loaded, loaded.products()).plan(frozenset())
    once = len(calls)
    assert once > 2 * 7
    quantize_bundle(source, tmp_path / "cached", "mixed", print, plan=plan)
    assert len(calls) == once
    anew = replace(plan, cache=None)
    quantize_bundle(source, tmp_path / "anew", "mixed", print, plan=anew)
    assert len(calls) == 2 * once
    digests = [
        [graph.files for graph in Bundle.open(tmp_path / name).manifest.graphs.values()]
        for name in ("cached", "anew")
    ]
    assert digests[0] == digests[1]


def test_each_unit_was_measured_and_the_best_within_the_budget_was_taken(
    mixed: tuple[Path, dict[str, Any]],
) -> None:
    told = mixed[1]["search"]
    assert (told["budget"], told["units"], told["calibration"]["prompts"]) == (BUDGET, 2 * 7 + 1, 8)
    alone = {tuple(c["eight"]) for c in told["measured"] if len(c["eight"]) < 2}
    assert len(alone) == told["units"] + 1
    assert all(
        np.isfinite(c["kl"]) and c["kl"] >= 0 and c["drift"] >= -1e-6 for c in told["measured"]
    )
    assert any(c["kl"] > 0 for c in told["measured"])
    within = [c for c in told["measured"] if c["bits"] <= BUDGET]
    assert told["chosen"] == min(within, key=lambda c: c["loss"])
    largest = max(told["measured"], key=lambda c: c["bits"])
    smallest = min(told["measured"], key=lambda c: c["bits"])
    assert (smallest["eight"], len(largest["eight"])) == ([], told["units"])
    assert largest["loss"] < told["chosen"]["loss"] < smallest["loss"]


def test_a_mixed_bundle_decodes_and_is_nearer_than_four_bits(
    mixed: tuple[Path, dict[str, Any]], source: Bundle, tmp_path: Path
) -> None:
    runtime = OnnxRuntime(Bundle.open(mixed[0]))
    prompts = load_prompts(runtime, "scenes", 1)
    result = decode(runtime, prompts, Options(max_tokens=3, min_tokens=3))[0]
    assert len(result.tokens) == 3
    reference = OnnxRuntime(source)
    prompts = load_prompts(reference, "scenes", 4)
    references = reference_answers(reference, prompts)
    quantize_bundle(source, tmp_path / "int4", "int4", print)
    int4 = OnnxRuntime(Bundle.open(tmp_path / "int4"))
    losses = [answer_loss(r, prompts, references).total for r in (reference, runtime, int4)]
    assert losses[0] == pytest.approx(0, abs=1e-5)
    assert 1e-5 < losses[1] < losses[2]


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("budget", [3, 4.5])
def test_a_budget_below_four_bits_and_their_scales_is_a_usage_error(
    source: Bundle, tmp_path: Path, budget: float
) -> None:
    with pytest.raises(
        UsageError, match=rf"--bits {budget:g}: 4 bits take 4\.\d+ a weight here, scales included"
    ):
        quantize_calibrated(source, tmp_path / "out", "mixed", "scenes", print, bits=budget)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quickly")
def test_four_bits_that_are_calibrated_are_nearer_and_a_large_bundle_is_calibrated_by_its_int8_copy(
    source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    plain = quantize_bundle(source, tmp_path / "plain", "int4", lines.append)
    rounded = quantize_calibrated(source, tmp_path / "rounded", "int4", "scenes", lines.append)
    monkeypatch.setattr(calibration, "LARGE", 0)
    large = quantize_calibrated(source, tmp_path / "large", "int4", "scenes", lines.append)
    assert any("an int8 copy reasons" in line for line in lines)
    for report in (rounded, large):
        assert report.bytes == plain.bytes
        assert np.mean(report.drift.layers) < 0.9 * np.mean(plain.drift.layers)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large", "plain", "rounded"]


def test_calibration_may_be_a_file_of_samples(source: Bundle, tmp_path: Path) -> None:
    runtime = OnnxRuntime(source)
    path = write_scenes(tmp_path / "scenes", 3, 0, "train")
    prompts = load_prompts(runtime, str(path), 2)
    assert len(prompts) == 2
    assert all(
        (prompt.ids == runtime.processor.tokens.image).sum() == len(prompt.features)
        for prompt in prompts
    )
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError):
        load_prompts(runtime, str(tmp_path / "none.jsonl"), 2)


def test_products_are_those_of_what_flows_into_a_weight(
    source: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "TOKENS", 3)
    runtime = OnnxRuntime(source)
    runtime.latent = replace(runtime.latent, steps=0)
    # so that three tokens come
    endless = replace(runtime.processor.tokens, end=(-1,))
    runtime.processor = replace(runtime.processor, tokens=endless)
    prompt = prepare_prompt(runtime, [], "where heart")[0]
    found = Products(runtime, [prompt, prompt], source)
    assert len(found) == 2 * 7
    q, k = (found[f"decoder/language_model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    np.testing.assert_array_equal(q, k)
    path = source.path("decoder")
    norm = next(
        onnxfile.read(t, path.parent)
        for t in onnxfile.load(path).graph.initializer
        if t.name == "language_model.layers.0.input_layernorm.weight"
    )
    told = decode(runtime, [prompt], Options(max_tokens=3))[0].tokens
    ids = np.concatenate([prompt.ids, told[:2]])[None]
    embeds = runtime.embed(ids)
    x = embeds[0] / np.sqrt((embeds[0] ** 2).mean(-1, keepdims=True) + 1e-6) * norm
    np.testing.assert_allclose(q, 2 * x.T @ x, rtol=1e-3, atol=1e-4 * float(np.abs(q).max()))
    assert found["decoder/language_model.layers.1.mlp.down_proj.weight"].shape == (768, 768)
    states = []
    for n in range(1, ids.shape[1] + 1):
        runtime.start(1, n)
        states.append(
            runtime.prefill(embeds[:, :n], np.broadcast_to(np.arange(n), (3, 1, n)), np.array([n]))[
                0
            ]
        )
    y, head = np.stack(states), found["lm_head/lm_head.weight"]
    np.testing.assert_allclose(head, 2 * y.T @ y, rtol=1e-3, atol=1e-4 * float(np.abs(head).max()))
    np.testing.assert_array_equal(
        found["decoder/language_model.layers.0.self_attn.q_proj.weight"], q
    )  # asked for again


class StartsSurely(StartsWithLatents):
    """Its first choice is <|lvr_start|> with a probability that is a number."""

    def head(self, hidden: np.ndarray) -> np.ndarray:
        return np.asarray(np.nan_to_num(super().head(hidden), posinf=30))


def test_the_loss_follows_the_latents_step_by_step(
    source: Bundle, small_int8: Path, tmp_path: Path
) -> None:
    quantize_bundle(source, tmp_path / "int4", "int4", print)
    reference = OnnxRuntime(source)
    prompts = load_prompts(reference, "scenes", 3)
    latents: list[np.ndarray] = []
    references = reference_answers(StartsSurely(reference, 3), prompts)
    for one, prompt in zip(references, prompts, strict=True):
        assert one.latents == slice(1, 4)
        assert one.choices[0] == reference.processor.tokens.lvr_start
        result = decode(
            StartsWithLatents(reference, 3), [prompt], Options(max_tokens=1, keep_hidden=True)
        )[0]
        np.testing.assert_allclose(np.stack(one.hidden[1:4]), np.stack(result.latents), atol=1e-3)
        latents += result.latents
    assert len(latents) == 9
    bundles = (source, Bundle.open(small_int8), Bundle.open(tmp_path / "int4"))
    losses = [
        answer_loss(StartsSurely(OnnxRuntime(bundle), 3), prompts, references) for bundle in bundles
    ]
    assert [loss.total for loss in losses] == [loss.kl + loss.drift for loss in losses]
    assert abs(losses[0].drift) < 1e-6 < losses[1].drift < losses[2].drift
    assert abs(losses[0].kl) < 1e-6 < losses[1].kl < losses[2].kl


@pytest.mark.parametrize("mode", ["open", "bottleneck"])
@pytest.mark.parametrize("words", [(), (A, B)], ids=["at once", "after two words"])
def test_drift_compares_the_states_that_became_latents_wherever_the_loop_opens(
    mode: str, words: tuple[int, ...]
) -> None:
    """Scripts are for one row, so prompts are decoded one by one."""
    runtime = Scripted(*words, START, C, END, spec=LatentSpec(3, mode=mode))
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 6)).astype(np.float32)
    prompt = Prompt(np.array([A, IMAGE, IMAGE, B]), features, np.tile(np.arange(4), (3, 1)))
    (reference,) = reference_answers(runtime, [prompt])
    assert reference.choices == [*words, START, C, END]
    again = Scripted(*words, START, C, END, spec=LatentSpec(3, mode=mode))
    (result,) = decode(again, [prompt])
    states = reference.hidden[reference.latents]
    np.testing.assert_allclose(np.stack(states), np.stack(result.latents), atol=1e-6)


def test_an_answer_without_a_look_has_no_drift() -> None:
    runtime = Scripted(A, END, spec=LatentSpec(3))
    prompt = Prompt(np.array([A]), np.zeros((0, 6), np.float32), np.zeros((3, 1), np.int64))
    (reference,) = reference_answers(runtime, [prompt])
    assert reference.hidden[reference.latents] == []


@pytest.mark.usefixtures("quickly")
def test_drawn_scenes_are_no_silent_calibration_of_another_model(
    source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    Calibration.load(source, "scenes", tmp_path, lines.append)
    assert [line for line in lines if "give --calibration FILE" in line] == lines[:1]
    file = write_scenes(tmp_path / "scenes", 3, 1, "train")
    own: list[str] = []
    Calibration.load(source, str(file), tmp_path, own.append)
    monkeypatch.setattr(calibration, "_knows_scenes", lambda _: True)
    Calibration.load(source, "scenes", tmp_path, own.append)
    assert not any("warning" in line for line in own)
