"""The device runtime decodes what the reference decodes: the same tokens, the same hidden states,
whatever the batch looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvr_lite.errors import BundleError, UsageError
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Decoding, Options, Prompt, Result
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.runtime import Runtime
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.model.spec import LatentSpec
from lvr_lite.toy.make import scene_samples
from tests.fakes import Around

TEXT = Options(max_tokens=6, min_tokens=6, keep_hidden=True)


class StartsLatents(Around):
    """A runtime whose choice is <|lvr_start|> for the first `together` rows that speak in each of
    the first calls of the head, until `rows` rows have gone into the latents, each at a time of its
    own, or several together. rows 0 leaves the runtime as it is.

    spec: a latent loop in place of the runtime's own.
    """

    def __init__(
        self,
        runtime: Runtime,
        rows: int,
        copying: bool = False,
        spec: LatentSpec | None = None,
        together: int = 1,
    ) -> None:
        super().__init__(runtime)
        self.latent = spec or runtime.latent
        self.handed: list[list[int]] = []
        self._rows = rows
        self._copying = copying
        self._together = together

    def start(self, batch: int, capacity: int) -> None:
        self._started = 0
        super().start(batch, capacity)

    def prefill(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        rows: list[int] | None = None,
        past: int = 0,
    ) -> np.ndarray:
        self.handed += [] if rows is None else [rows]
        return super().prefill(embeds, positions, lengths, rows, past)

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return super().step(np.array(embeds) if self._copying else embeds, positions)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        logits = np.array(super().head(hidden))
        starting = min(self._together, self._rows - self._started)
        logits[:starting, self.processor.tokens.lvr_start] = 1e4
        self._started += starting
        return logits


@pytest.fixture(scope="module")
def onnx(small_fp32: Path) -> OnnxRuntime:
    return OnnxRuntime(Bundle.open(small_fp32), threads=1)


@pytest.fixture(scope="module")
def reference(small_model: Any, small_checkpoint: Path, onnx: OnnxRuntime) -> TorchRuntime:
    return TorchRuntime(small_model, replace(read_checkpoint(small_checkpoint), latent=onnx.latent))


@pytest.fixture(scope="module")
def asked(onnx: OnnxRuntime) -> list[Prompt]:
    """Prompts of different lengths: scenes of several sizes, two pictures at once, and none."""
    found = list(scene_samples(4, 0, "test"))
    (_, first), (_, second) = found[:2]
    cases: list[tuple[str, list[Image.Image]]] = [
        (sample.question, [picture]) for sample, picture in found[:3]
    ]
    cases += [
        ("what differs between the two", [first, second.resize((84, 140))]),
        ("say something", []),
    ]
    prompts = [prepare_prompt(onnx, pictures, question)[0] for question, pictures in cases]
    assert len({len(p.ids) for p in prompts}) >= 4
    return prompts


def run(
    runtime: Runtime,
    prompts: Sequence[Prompt],
    options: Options = TEXT,
    latents: int = 0,
    copying: bool = False,
) -> tuple[list[Result], list[int]]:
    """Results, and at which event each row entered its latents."""
    decoding = Decoding(StartsLatents(runtime, latents, copying), list(prompts), options)
    events = list(decoding)
    return decoding.results, [
        sum(e.row == r and e.kind == "token" for e in events[: events.index(s)])
        for s in events
        if s.kind == "start"
        for r in [s.row]
    ]


def assert_same(mine: list[Result], theirs: list[Result], tolerance: float = 1e-3) -> None:
    for row, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.tokens == b.tokens, f"row {row}"
        assert (len(a.latents), len(a.hidden)) == (len(b.latents), len(b.hidden))
        got, want = np.stack(a.hidden), np.stack(b.hidden)
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want), (
            f"row {row}: {np.abs(got - want).max()}"
        )


@pytest.mark.parametrize(
    "case", range(5), ids=["scene", "scene 2", "scene 3", "two pictures", "no picture"]
)
@pytest.mark.parametrize("latents", [0, 1], ids=["text", "latents"])
def test_one_question_decodes_as_under_torch(
    onnx: OnnxRuntime, reference: TorchRuntime, asked: list[Prompt], case: int, latents: int
) -> None:
    (mine, _), (theirs, _) = (
        run(r, asked[case : case + 1], latents=latents) for r in (onnx, reference)
    )
    assert_same(mine, theirs)
    assert len(mine[0].latents) == (onnx.latent.steps if latents else 0)
    assert len(mine[0].tokens) == 6


def test_visual_tokens_are_those_of_torch(onnx: OnnxRuntime, reference: TorchRuntime) -> None:
    pictures = [picture for _, picture in scene_samples(2, 5, "test")]
    (mine, _), (theirs, _) = (
        prepare_prompt(r, pictures, "what is here") for r in (onnx, reference)
    )
    np.testing.assert_allclose(mine.features, theirs.features, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(mine.ids, theirs.ids)


def test_rows_of_different_lengths_in_different_modes_decode_as_under_torch(
    onnx: OnnxRuntime, reference: TorchRuntime, asked: list[Prompt]
) -> None:
    (mine, entered), (theirs, _) = (run(r, asked, latents=len(asked)) for r in (onnx, reference))
    assert len(set(entered)) >= 3, (
        f"the rows do not enter the latents at different times: {entered}"
    )
    assert all(len(r.latents) == onnx.latent.steps for r in mine)
    assert_same(mine, theirs)


def test_a_row_decodes_in_a_batch_as_it_does_alone(onnx: OnnxRuntime, asked: list[Prompt]) -> None:
    together, _ = run(onnx, asked)
    alone = [run(onnx, [p])[0][0] for p in asked]
    assert_same(together, alone)


def test_sampling_with_a_seed_draws_what_torch_draws(
    onnx: OnnxRuntime, reference: TorchRuntime, asked: list[Prompt]
) -> None:
    options = replace(TEXT, temperature=1.0, top_p=0.9, seed=11)
    (mine, _), (theirs, _) = (run(r, asked, options, latents=2) for r in (onnx, reference))
    assert_same(mine, theirs)
    greedy, _ = run(onnx, asked, latents=2)
    assert [r.tokens for r in mine] != [r.tokens for r in greedy]


def test_buffers_of_a_batch_before_leave_no_trace(
    onnx: OnnxRuntime, asked: list[Prompt], small_fp32: Path
) -> None:
    short, long = asked[4:5], asked[3:4]
    fresh, _ = run(OnnxRuntime(Bundle.open(small_fp32), threads=1), short, latents=1)
    run(onnx, long, latents=1)
    buffers = onnx._state
    again, _ = run(onnx, short, latents=1)
    assert onnx._state is buffers, "the buffers were made anew, so nothing was tested"
    assert_same(again, fresh, tolerance=1e-6)


def test_another_batch_size_gets_buffers_of_its_own(
    onnx: OnnxRuntime, reference: TorchRuntime, asked: list[Prompt]
) -> None:
    for rows in (1, 3, 2):
        (mine, _), (theirs, _) = (run(r, asked[:rows]) for r in (onnx, reference))
        assert_same(mine, theirs)


@pytest.mark.parametrize("kind", ["onnx", "reference"])
def test_logits_are_the_callers_to_change(kind: str, request: pytest.FixtureRequest) -> None:
    runtime = request.getfixturevalue(kind)
    hidden = np.random.default_rng(0).standard_normal((2, runtime.hidden_size)).astype(np.float32)
    given = hidden.copy()
    logits = runtime.head(hidden)
    kept = logits.copy()
    logits[:, 3:] = -np.inf
    np.testing.assert_array_equal(hidden, given)
    np.testing.assert_array_equal(runtime.head(hidden), kept)


class Counting(np.ndarray):
    """A buffer that counts how often something is copied into it."""

    copies = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        self.copies += 1
        super().__setitem__(key, value)


def test_latents_are_fed_from_the_buffer_that_they_lie_in_and_are_what_copying_would_feed(
    small_fp32: Path, asked: list[Prompt]
) -> None:
    runtime = OnnxRuntime(Bundle.open(small_fp32), threads=1)
    run(runtime, asked[:1])  # makes the buffers, which the next batch of one row uses again
    results, copies = [], []
    for copying in (False, True):
        buffer = runtime._state = runtime._state.view(Counting)
        found, _ = run(runtime, asked[:1], latents=1, copying=copying)
        assert runtime._state is buffer
        results.append(found)
        copies.append(buffer.copies)
    assert copies[1] - copies[0] == runtime.latent.steps
    assert_same(results[0], results[1], tolerance=1e-6)


def test_a_kept_latent_is_not_overwritten_by_the_steps_after_it(
    onnx: OnnxRuntime, asked: list[Prompt]
) -> None:
    ((result,), _) = run(onnx, asked[:1], latents=1)
    assert len({latent.tobytes() for latent in result.latents}) == onnx.latent.steps


# ----------------------------------------------------------------------------------- norm-matched
# feedback and the bottleneck

# latent steps, as many as there are prompts: the last row has begun before the first one speaks
# again
LONG = 5
SPECS = {
    "norm-matched": LatentSpec(LONG, "norm-matched", norm=6.0),
    "token": LatentSpec(LONG, "token"),
    "bottleneck": LatentSpec(LONG, mode="bottleneck"),
    "norm-matched bottleneck": LatentSpec(LONG, "norm-matched", "bottleneck", 6.0),
}
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
BOTTLENECKS = pytest.mark.parametrize(
    "spec", [s for s in SPECS.values() if s.mode == "bottleneck"], ids=["identity", "norm-matched"]
)


def run_spec(
    runtime: Runtime, prompts: Sequence[Prompt], spec: LatentSpec, together: int = 1
) -> tuple[list[Result], list[list[int]]]:
    """Results of rows that all go through the latents, `together` at a time, and which of them were
    handed over together.
    """
    starting = StartsLatents(runtime, len(prompts), spec=spec, together=together)
    decoding = Decoding(starting, list(prompts), TEXT)
    for _ in decoding:
        pass
    assert all(len(r.latents) == spec.steps for r in decoding.results), "a row without latents"
    return decoding.results, starting.handed


def assert_same_latents(mine: list[Result], theirs: list[Result], tolerance: float = 1e-3) -> None:
    assert_same(mine, theirs, tolerance)
    for a, b in zip(mine, theirs, strict=True):
        got, want = np.stack(a.latents), np.stack(b.latents)
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def test_every_way_through_the_latents_leads_elsewhere(
    onnx: OnnxRuntime, asked: list[Prompt]
) -> None:
    """What the tests below compare would else be alike for any of them."""
    ends = [
        run_spec(onnx, asked[:1], spec)[0][0].hidden[-1]
        for spec in (LatentSpec(LONG), *SPECS.values())
    ]
    for i, a in enumerate(ends):
        assert all(np.linalg.norm(a - b) > 1e-2 * np.linalg.norm(b) for b in ends[:i])


@EVERY_SPEC
@pytest.mark.parametrize(
    "case", range(5), ids=["scene", "scene 2", "scene 3", "two pictures", "no picture"]
)
def test_one_question_through_other_latents_decodes_as_under_torch(
    onnx: OnnxRuntime, reference: TorchRuntime, asked: list[Prompt], case: int, spec: LatentSpec
) -> None:
    (mine, handed), (theirs, _) = (
        run_spec(r, asked[case : case + 1], spec) for r in (onnx, reference)
    )
    assert handed == ([[0]] if spec.mode == "bottleneck" else [])
    assert_same_latents(mine, theirs)


@EVERY_SPEC
@pytest.mark.parametrize("together", [1, 2, 5])
def test_a_batch_through_other_latents_decodes_as_under_torch_and_as_each_row_alone(
    onnx: OnnxRuntime, reference: TorchRuntime, asked: list[Prompt], spec: LatentSpec, together: int
) -> None:
    (mine, handed), (theirs, _) = (run_spec(r, asked, spec, together) for r in (onnx, reference))
    rows = {1: [[0], [1], [2], [3], [4]], 2: [[0, 1], [2, 3], [4]], 5: [[0, 1, 2, 3, 4]]}[together]
    assert handed == (rows if spec.mode == "bottleneck" else [])
    assert_same_latents(mine, theirs)
    if together == 5:  # else a row has said something of its own before
        assert_same_latents(mine, [run_spec(onnx, [p], spec)[0][0] for p in asked])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("spec", [LatentSpec(LONG), SPECS["bottleneck"]], ids=lambda s: s.mode)
def test_a_forced_look_decodes_as_under_torch(
    onnx: OnnxRuntime,
    reference: TorchRuntime,
    asked: list[Prompt],
    spec: LatentSpec,
    temperature: float,
) -> None:
    options = replace(TEXT, look="always", temperature=temperature, seed=5)
    both = []
    for runtime in (onnx, reference):
        decoding = Decoding(StartsLatents(runtime, 0, spec=spec), asked, options)
        list(decoding)
        both.append(decoding.results)
    mine, theirs = both
    assert all(result.look_forced and len(result.latents) == LONG for result in mine)
    assert_same_latents(mine, theirs)
    assert [result.choices for result in mine] == [result.choices for result in theirs]


@pytest.mark.parametrize(
    "spec", [LatentSpec(LONG), SPECS["bottleneck"]], ids=["open", "bottleneck"]
)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_prompt_that_is_read_in_pieces_decodes_as_under_torch(
    onnx: OnnxRuntime,
    reference: TorchRuntime,
    asked: list[Prompt],
    spec: LatentSpec,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces that end within a prompt, with it, and after it."""
    longest = max(len(p.ids) for p in asked[:rows])
    for piece in (7, len(asked[0].ids), longest - 1):
        monkeypatch.setattr("lvr_lite.generate.onnx.PIECE", piece)
        (mine, _), (theirs, _) = (run_spec(r, asked[:rows], spec, rows) for r in (onnx, reference))
        assert_same_latents(mine, theirs)


@BOTTLENECKS
def test_rows_beside_one_that_is_handed_over_go_on_as_if_alone(
    onnx: OnnxRuntime, asked: list[Prompt], spec: LatentSpec
) -> None:
    """The K/V of the other rows lie in the buffers that the second reading is copied into."""
    starting = StartsLatents(onnx, 1, spec=spec)
    decoding = Decoding(starting, asked, replace(TEXT, max_tokens=10, min_tokens=10))
    assert sum(e.kind == "done" for e in decoding) == len(asked)
    assert starting.handed == [[0]]
    alone = [run(onnx, [p], replace(TEXT, max_tokens=10, min_tokens=10))[0][0] for p in asked[1:]]
    assert_same(decoding.results[1:], alone)


@BOTTLENECKS
@pytest.mark.parametrize("together", [1, 5])
def test_a_batch_after_one_that_was_handed_over_finds_no_trace_of_it(
    onnx: OnnxRuntime, small_fp32: Path, asked: list[Prompt], spec: LatentSpec, together: int
) -> None:
    fresh = OnnxRuntime(Bundle.open(small_fp32), threads=1)
    following = [asked[i] for i in (4, 2, 0, 1, 3)]
    run_spec(onnx, [asked[3]] * 5, spec, together)  # the longest prompt in every row
    for next_spec in (spec, LatentSpec(LONG)):
        buffers = onnx._state
        again, _ = run_spec(onnx, following, next_spec, 2)
        assert onnx._state is buffers, "the buffers were made anew, so nothing was tested"
        assert_same(again, run_spec(fresh, following, next_spec, 2)[0], tolerance=1e-6)
        fresh = OnnxRuntime(Bundle.open(small_fp32), threads=1)


def test_a_provider_that_does_not_start_is_one_line_and_not_the_cpu_in_silence(
    small_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "onnxruntime.get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    with pytest.raises(BundleError, match=r"provider cuda: did not start here|cannot load it"):
        OnnxRuntime(Bundle.open(small_fp32), provider="cuda")


def test_another_number_of_threads_than_the_process_has_is_refused(small_fp32: Path) -> None:
    bundle = Bundle.open(small_fp32)
    for same in (None, 1):
        OnnxRuntime(bundle, threads=same)
    with pytest.raises(
        UsageError, match="threads 2: this process already runs ONNX Runtime with 1"
    ):
        OnnxRuntime(bundle, threads=2)


def test_a_manifest_that_lacks_an_input_of_the_cache_is_refused(small_fp32: Path) -> None:
    bundle = Bundle.open(small_fp32)
    decoder = bundle.manifest.graphs["decoder"]
    inputs = dict(decoder.inputs)
    del inputs["past_key_values.0.value"]
    graphs = {**bundle.manifest.graphs, "decoder": replace(decoder, inputs=inputs)}
    with pytest.raises(BundleError, match=r"inputs has no past_key_values\.0\.value of float32"):
        OnnxRuntime(bundle.with_manifest(graphs=graphs))
