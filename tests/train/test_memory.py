"""`finetune --plan`: its counts against built models, against what autograd saves, and against
tensors counted as they are made.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lvr_lite.bench.experiments import memory, memory_model
from lvr_lite.bench.experiments.live_bytes import Saved, model_tensors
from lvr_lite.cli import app as cli
from lvr_lite.config import Settings, load_settings
from lvr_lite.errors import BundleError, UsageError
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Result
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.spec import LatentSpec
from lvr_lite.train import load as nf4
from lvr_lite.train import memory as plan
from lvr_lite.train.load import adapted
from lvr_lite.train.policy import Policy, batches_of, readings


def settings(*overrides: str) -> Settings:
    return load_settings(None, ["train.precision=fp32", "train.accumulation=1", *overrides])


def counted(model: Any) -> dict[str, int]:
    """Parameters of a built model by the plan's parts."""
    found = dict.fromkeys(("linears", "embedding", "head", "norms", "vision"), 0)
    for name, parameter in model.named_parameters():  # a tied head is the embedding, and comes once
        part = (
            "vision"
            if "visual" in name
            else "embedding"
            if "embed_tokens" in name
            else "head"
            if "lm_head" in name
            else "norms"
        )
        linear = part == "norms" and name.endswith("_proj.weight")
        found["linears" if linear else part] += parameter.numel()
    return found


# ----------------------------------------------------------------------------------------------------------
# sizes of models


def test_parameters_are_those_of_a_built_model(small_model: Any, small_checkpoint: Path) -> None:
    assert plan.parameters(plan.shape_of(read_checkpoint(small_checkpoint).config)) == counted(
        small_model
    )


@pytest.mark.parametrize(("name", "millions"), [("tiny", 8), ("3b", 3755), ("2b", 2209)])
def test_parameters_are_those_of_transformers_model(name: str, millions: int) -> None:
    import transformers

    config = memory_model.config_of(name, None)
    family = memory_model.ARCHITECTURES[config["model_type"]]
    made = getattr(transformers, f"{family}Config")(
        **{k: v for k, v in config.items() if k != "model_type"}
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForConditionalGeneration")(made)
    found = plan.parameters(plan.shape_of(config))
    assert found == counted(model)
    assert round(sum(found.values()) / 1e6) == millions


def test_text_sizes_may_stand_at_the_top_of_a_config() -> None:
    nested = memory_model.config_of("3b", None)
    flat = nested["text_config"] | {k: v for k, v in nested.items() if k != "text_config"}
    assert plan.shape_of(flat) == plan.shape_of(nested)


def test_a_head_of_its_own_counts() -> None:
    shape = plan.shape_of(memory_model.config_of("3b", None))
    assert plan.parameters(replace(shape, tied=False))["head"] == 151936 * 2048
    assert plan.parameters(shape)["head"] == 0


def test_a_family_that_is_not_counted_is_refused_and_not_guessed() -> None:
    with pytest.raises(
        BundleError, match="--plan counts qwen2_5_vl and qwen2_vl so far, not smolvlm"
    ):
        plan.shape_of({"model_type": "smolvlm", "text_config": {}, "vision_config": {}})


@pytest.mark.parametrize(
    "missing", ["vision_config", "text_config.hidden_size", "vision_config.depth"]
)
def test_a_config_that_lacks_a_size_is_refused_by_the_key(missing: str) -> None:
    config = memory_model.config_of("3b", None)
    at, _, key = missing.rpartition(".")
    del (config[at] if at else config)[key]
    with pytest.raises(BundleError, match=rf"config\.json: '{key}' is missing"):
        plan.shape_of(config)


# ---------------------------------------------------------------------------------------------------------------
# what stays


@pytest.mark.parametrize(("out", "into"), [(64, 64), (96, 257), (704, 512)])
def test_bytes_of_a_4_bit_linear_are_those_of_bitsandbytes(out: int, into: int) -> None:
    import bitsandbytes as bnb

    weight = bnb.nn.Params4bit(
        torch.randn(out, into), False, compress_statistics=True, quant_type="nf4"
    ).to("cpu")
    state = weight.quant_state
    held = [
        weight.data,
        state.absmax,
        state.code,
        state.offset,
        state.state2.absmax,
        state.state2.code,
    ]
    assert plan.nf4_bytes(out, into) == sum(t.nbytes for t in held)


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint: Path) -> Checkpoint:
    found = read_checkpoint(small_checkpoint)
    return replace(found, processor=found.processor.with_max_pixels(28 * 28 * 256))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Any:
    return adapted(
        nf4.load_nf4(checkpoint, torch.float32),
        checkpoint,
        settings("train.gradient_checkpointing=false"),
    )


def test_trained_tensors_are_those_of_the_adapted_model(model: Any, checkpoint: Checkpoint) -> None:
    found = sorted(p.numel() for p in model.parameters() if p.requires_grad)
    assert sorted(plan.trained(plan.shape_of(checkpoint.config), rank=16)) == found
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_what_stays_is_what_a_loaded_model_holds(model: Any, checkpoint: Checkpoint) -> None:
    held = sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in model_tensors(model)
        }.values()
    )
    stays = plan.standing_bytes(plan.shape_of(checkpoint.config), settings())
    assert sum(stays.values()) - stays["optimizer"] == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize(
    "name", ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch", "sgd"]
)
def test_optimizer_states_are_those_of_the_optimizer(name: str) -> None:
    sizes = [64, 4095, 4096, 5000, 110_000]
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    optimizer = memory_model.make_optimizer(name, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if "qmap" not in key
    ]  # those are shared
    held = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim())
    stay, paged = plan.optimizer_bytes(name, sizes)
    assert stay + paged == held
    assert (paged > 0) == name.startswith("paged")


def test_only_large_states_are_paged() -> None:
    assert plan.optimizer_bytes("paged_adamw_8bit", [99_999, 100_000]) == (
        2 * 99_999 + 8 * 391 * 2,
        200_000,
    )
    assert plan.optimizer_bytes("paged_adamw_32bit", [100_000]) == (0, 800_000)


# ----------------------------------------------------------------------------------------------------------
# what a step makes


@pytest.mark.parametrize("visual", [64, 256])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize(("method", "batch"), [("lvr", 1), ("sft", 2)])
def test_saved_activations_and_peak_are_as_planned(
    model: Any,
    checkpoint: Checkpoint,
    method: str,
    batch: int,
    checkpointing: str,
    visual: int,
) -> None:
    chosen = settings(
        f"latent.method={method}",
        f"train.batch={batch}",
        f"train.gradient_checkpointing={checkpointing}",
    )
    found = memory.measure_training(model, checkpoint, chosen, visual, torch.float32, "cpu")
    assert found.saved_predicted == pytest.approx(found.saved, rel=0.1)
    assert found.predicted == pytest.approx(found.peak, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("method", ["lvr-free", "lvr-bottleneck"])
def test_so_they_are_where_latents_run_freely(
    model: Any, checkpoint: Checkpoint, method: str, checkpointing: str
) -> None:
    chosen = settings(f"latent.method={method}", f"train.gradient_checkpointing={checkpointing}")
    found = memory.measure_training(model, checkpoint, chosen, 64, torch.float32, "cpu")
    assert found.saved_predicted == pytest.approx(found.saved, rel=0.1)
    assert found.predicted == pytest.approx(found.peak, rel=0.1)


def test_so_they_are_in_bf16_under_autocast_with_the_contrastive_loss(
    checkpoint: Checkpoint,
) -> None:
    chosen = load_settings(
        None,
        ["train.accumulation=1", "train.gradient_checkpointing=false", "latent.loss=contrastive"],
    )
    tuned = adapted(nf4.load_nf4(checkpoint, torch.bfloat16), checkpoint, chosen)
    found = memory.measure_training(tuned, checkpoint, chosen, 64, torch.bfloat16, "cpu")
    assert found.saved_predicted == pytest.approx(found.saved, rel=0.1)
    assert found.predicted == pytest.approx(found.peak, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("mode", ["open", "bottleneck"])
@pytest.mark.parametrize("found", ["recorded", "recomputed"])
def test_so_is_a_replay_of_stage_2(
    model: Any,
    checkpoint: Checkpoint,
    mode: str,
    checkpointing: str,
    found: str,
) -> None:
    rows, steps, answer = 3, 4, 12
    chosen = settings(
        f"grpo.rows={rows}",
        f"grpo.max_tokens={answer}",
        f"grpo.latents={found}",
        f"train.gradient_checkpointing={checkpointing}",
    )
    counted = plan.stage2(chosen, LatentSpec(steps, mode=mode))
    core = model.get_base_model()
    core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in core.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = checkpointing == "true"
    runtime = TorchRuntime(model.eval(), checkpoint)
    latents = [np.full(runtime.hidden_size, 0.1, np.float32)] * steps
    result = Result(
        choices=[checkpoint.processor.tokens.lvr_start] + [5] * (answer + 1), latents=latents
    )
    prompts = [
        prepare_prompt(runtime, pictures, sample.question)[0]
        for sample, pictures in memory.items_of(64, rows)
    ]
    length = len(prompts[0].ids)
    prompts = [replace(p, ids=p.ids[:length], positions=p.positions[:, :length]) for p in prompts]
    policy = Policy(
        model, checkpoint.processor.tokens, LatentSpec(steps, mode=mode), 1.0, found
    ).train()
    # rows that read the same would be read once, and the plan is for those that do not
    made = [
        readings(
            p, replace(result, latents=[v + i for v in latents]), checkpoint.processor.tokens, mode
        )
        for i, p in enumerate(prompts)
    ]
    batches = batches_of(made)
    saved = Saved(policy)
    with saved.hooks():
        scores = policy(batches)
    text = len(prompts[0].ids) - 64
    planned = plan.saved_bytes(
        plan.shape_of(checkpoint.config), counted, plan.Tokens(64, text, answer)
    )
    assert planned == pytest.approx(saved.bytes(), rel=0.15), len(scores)


def test_so_is_the_answering_of_held_out_questions(model: Any, checkpoint: Checkpoint) -> None:
    found = memory.measure_answering(model, checkpoint, settings(), 64, "cpu")
    assert found.predicted == pytest.approx(found.peak, rel=0.1)


def test_a_difference_would_be_noticed(
    model: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measure is not a copy of the formula: a layer that is planned without its MLP fails."""
    whole = plan.layer_bytes
    without = replace(plan.shape_of(checkpoint.config), intermediate=0)
    monkeypatch.setattr(plan, "layer_bytes", lambda _, s, one: whole(without, s, one))
    found = memory.measure_training(
        model, checkpoint, settings("train.gradient_checkpointing=false"), 64, torch.float32, "cpu"
    )
    assert found.saved_predicted < 0.9 * found.saved


def columns(*overrides: str) -> list[tuple[int, int, bool]]:
    made = plan.passes(
        settings("latent.steps=3", *overrides), plan.Tokens(visual=10, text=5, answer=2)
    )
    return [(one.columns, one.keys, one.padded) for one in made]


def test_passes_by_method() -> None:
    on, off = "train.gradient_checkpointing=true", "train.gradient_checkpointing=false"
    assert columns("latent.method=sft") == [(17, 17, False)]
    assert columns("latent.method=lvr") == columns("latent.method=dummy") == [(22, 22, False)]
    assert columns("latent.method=lvr", "train.batch=2") == [(22, 22, True)]
    assert columns("latent.method=lvr", "latent.targets=all") == [
        (10 + 5 + 2 + 10 + 2,) * 2 + (False,)
    ]  # no more targets than tokens
    assert columns("latent.method=lvr-free", off) == [
        (16, 16, False),
        (1, 17, False),
        (1, 18, False),
        (1, 19, False),
        (3, 22, True),
    ]
    assert [c for c, _, _ in columns("latent.method=lvr-free", on)] == [16, 17, 18, 22]
    assert columns("latent.method=lvr-bottleneck", off) == [
        (16, 16, False),
        (1, 17, False),
        (1, 18, False),
        (10, 10, True),
    ]
    assert [c for c, _, _ in columns("latent.method=lvr-bottleneck", on)] == [16, 17, 18, 10]


@pytest.fixture(scope="module")
def shape() -> plan.Shape:
    return plan.shape_of(memory_model.config_of("3b", None))


def test_one_layer_by_hand(shape: plan.Shape) -> None:
    """A bf16 token in a layer of Qwen2.5-VL-3B: norms in fp32 and their results, q and the result,
    k and v, the MLP, seven adapters.
    """
    here = load_settings(None, [])
    by_hand = (
        2 * (4 * 2048 + 4)
        + 2 * 2 * 2048
        + 2 * 2 * 2048
        + 4 * 16
        + 2 * 2 * 256
        + 4 * 2 * 11008
        + 7 * 2 * 16
    )
    assert plan.layer_bytes(shape, here, plan.Pass(1, 1, False)) == by_hand
    repeated = plan.layer_bytes(shape, here, plan.Pass(10, 10, True)) - 10 * by_hand
    assert repeated == 10 * 2 * 2 * (2048 - 256) + 2 * 10 * 10


def test_more_of_anything_needs_more(shape: plan.Shape) -> None:
    def needed(visual: int, *overrides: str) -> int:
        return plan.need(
            shape,
            load_settings(None, ["train.gradient_checkpointing=false", *overrides]),
            plan.Tokens(visual),
        ).card

    assert needed(256) < needed(512) < needed(1024)
    assert (
        needed(512, "train.gradient_checkpointing=true")
        < needed(512)
        < needed(512, "train.batch=2")
        < needed(512, "train.batch=4")
    )
    assert needed(512) < needed(512, "lora.rank=64")
    assert needed(512) < needed(512, "lora.dropout=0.1")
    assert needed(512) < needed(512, "train.optimizer=adamw_torch")
    assert needed(512) < needed(512, "train.precision=fp32")
    assert (
        needed(512)
        < needed(512, "latent.method=lvr-free")
        < needed(512, "latent.method=lvr-free", "latent.steps=64")
    )


# ----------------------------------------------------------------------------------------------------------------
# what fits


@pytest.mark.parametrize("vram", [6.0, 8.0, 12.0])
def test_the_largest_picture_just_fits(shape: plan.Shape, vram: float) -> None:
    here = load_settings(None, [])
    largest = plan.largest_picture(shape, here, vram)
    assert (
        plan.need(shape, here, plan.Tokens(largest)).card
        <= vram * plan.GIB
        < plan.need(shape, here, plan.Tokens(largest + 1)).card
    )


def test_no_picture_fits_where_the_weights_do_not(shape: plan.Shape) -> None:
    assert plan.largest_picture(shape, load_settings(None, []), 3) == 0


@pytest.mark.parametrize(
    ("vram", "visual", "overrides", "said"),
    [
        (24.0, 512, (), ()),
        (
            8.0,
            1024,
            ("train.gradient_checkpointing=false",),
            ("train.gradient_checkpointing=true",),
        ),
        (
            12.0,
            512,
            ("train.batch=64", "train.accumulation=1"),
            ("train.batch=*", "train.accumulation=*"),
        ),
        (8.0, 2048, (), ("max_pixels=*",)),
        (
            8.0,
            1024,
            ("train.gradient_checkpointing=false", "train.batch=16"),
            ("train.gradient_checkpointing=true", "train.batch=*"),
        ),
    ],
)
def test_what_to_lower_first(
    shape: plan.Shape, vram: float, visual: int, overrides: tuple[str, ...], said: tuple[str, ...]
) -> None:
    """In the order of what it costs, as little as is enough; and with what is said it does fit."""
    here = load_settings(None, [*overrides])
    found = plan.lowered(shape, here, visual, vram)
    for got, wanted in zip(found.said, said, strict=False):
        assert got == wanted or (wanted.endswith("*") and got.startswith(wanted[:-1]))
    assert len(found.said) >= len(said)
    again = load_settings(None, [*overrides, *found.said])
    assert again == found.settings
    pixels = again.max_pixels
    tokens = plan.Tokens(visual if pixels is None else pixels // shape.pixels_per_token)
    assert plan.need(shape, again, tokens).card <= vram * plan.GIB


def test_in_stage_2_fewer_answers_are_drawn_at_once(shape: plan.Shape) -> None:
    counted = plan.stage2(
        load_settings(None, ["grpo.rows=256", "grpo.max_tokens=128", "grpo.beta=0.1"]),
        LatentSpec(8, mode="bottleneck"),
    )
    assert "policy at the start, fp32" in plan.standing_bytes(shape, counted)
    found = plan.lowered(shape, counted, 512, 16)
    (said,) = found.said
    assert said.startswith("grpo.rows=")
    assert 1 < int(said.partition("=")[2]) < 256
    assert found.need(shape) <= 16 * plan.GIB


def test_the_number_of_samples_a_step_stays(shape: plan.Shape) -> None:
    train = plan.lowered(
        shape, load_settings(None, ["train.batch=32", "train.accumulation=2"]), 256, 8
    ).settings.train
    assert train.batch * train.accumulation == 64
    assert train.batch < 32


def test_where_nothing_is_enough_it_says_what_the_least_is(shape: plan.Shape) -> None:
    found = plan.lowered(shape, load_settings(None, ["train.optimizer=adamw_torch"]), 512, 2)
    assert found.need(shape) > 2 * plan.GIB
    assert {said.partition("=")[0] for said in found.said} >= {"train.optimizer", "lora.rank"}


# --------------------------------------------------------------------------------------------------------------
# the command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["finetune", *arguments])


def test_the_command_plans_and_touches_nothing(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(
        "--model",
        str(small_checkpoint),
        "--data",
        "none.jsonl",
        "--out",
        "out",
        "--plan",
        "--vram",
        "12",
        "--json",
        "plan.json",
    )
    assert done.exit_code == 0, done.output
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    report = json.loads(Path("plan.json").read_text())
    assert (report["schema"], report["version"]) == ("lvr-lite/plan", 1)
    assert (
        report["tensors"]
        == sum(report["stays"].values()) + max(report["phases"].values()) + report["workspace"]
    )
    assert [(card["gib"], card["fits"], card["lower"]) for card in report["cards"]] == [
        (12, True, [])
    ]
    assert "the most" in done.output


def test_a_plan_needs_no_data_and_knows_the_usual_cards(tmp_path: Path) -> None:
    done = run("--model", "tiny", "--plan", "--set", "latent.method=lvr-free", "--set", "train.gradient_checkpointing=true",
               "--set", "max_pixels=100352", "--json", str(tmp_path / "p.json"))  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "p.json").read_text())
    assert [card["gib"] for card in report["cards"]] == [8, 12, 16, 24]
    assert [row["visual_tokens"] for row in report["pictures"]] == [64, 128, 256, 512, 1024, 2048]
    assert report["tokens"]["visual"] == 128
    assert any(
        note.startswith("time: lvr-free with gradient checkpointing") for note in report["notes"]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "scenes"), "needs --out; only --plan goes without"),
        ((), "needs --data and --out"),
        (("--data", "scenes", "--out", "o", "--vram", "8"), "--vram is for --plan"),
        (("--plan", "--vram", "0"), "--vram 0: must be the memory of a card in GiB"),
        (("--plan", "--resume"), "leave out --resume"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = run("--model", "tiny", *arguments)
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)


def test_the_measuring_script_writes_rows_and_json(tmp_path: Path, capsys: Any) -> None:
    memory.main(
        shape="tiny",
        layers=1,
        device="cpu",
        precision="fp32",
        visual="64",
        batch="1",
        method="lvr",
        out=tmp_path / "m.json",
    )
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [(row["checkpointing"], row["method"]) for row in rows] == [
        ("on", "lvr"),
        ("off", "lvr"),
    ]
    assert all(0.9 < row["ratio"] < 1.1 for row in rows)
    assert capsys.readouterr().out.count("| tiny | lvr | 64 | 1 |") == 2
