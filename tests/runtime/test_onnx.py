"""The device runtime decodes what the reference decodes: the same tokens, the same hidden states, whatever the batch looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvr_lite.ask import prepare_prompt
from lvr_lite.checkpoint import read_checkpoint
from lvr_lite.data.make import scene_samples
from lvr_lite.decode import Decoding, Options, Prompt, Result
from lvr_lite.runtime.onnx import OnnxRuntime
from lvr_lite.runtime.torch import TorchRuntime

TEXT = Options(max_tokens=6, min_tokens=6, keep_hidden=True)


class StartsLatents:
    """A runtime whose choice is <|lvr_start|> for the first row that speaks in each of the first `rows` calls of the head: every row
    goes through the latents, and each at a time of its own. rows 0 leaves the runtime as it is."""

    def __init__(self, runtime: Any, rows: int, copying: bool = False) -> None:
        self._runtime, self._rows, self._copying = runtime, rows, copying

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def start(self, batch: int, capacity: int) -> None:
        self._calls = 0
        self._runtime.start(batch, capacity)

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self._runtime.step(np.array(embeds) if self._copying else embeds, positions)  # type: ignore[no-any-return]

    def head(self, hidden: np.ndarray) -> np.ndarray:
        logits = np.array(self._runtime.head(hidden))
        if self._calls < self._rows:
            logits[0, self.tokens.lvr_start] = 1e4
        self._calls += 1
        return logits


@pytest.fixture(scope="module")
def onnx(small_fp32: Path) -> OnnxRuntime:
    return OnnxRuntime(small_fp32, threads=1)


@pytest.fixture(scope="module")
def reference(small_model: Any, small_checkpoint: Path, onnx: OnnxRuntime) -> TorchRuntime:
    return TorchRuntime(small_model, replace(read_checkpoint(small_checkpoint), latent=onnx.latent))


@pytest.fixture(scope="module")
def asked(onnx: OnnxRuntime) -> list[Prompt]:
    """Prompts of different lengths: scenes of several sizes, two pictures at once, and none."""
    found = list(scene_samples(4, 0, "test"))
    (_, first), (_, second) = found[:2]
    cases: list[tuple[str, list[Image.Image]]] = [(sample.question, [picture]) for sample, picture in found[:3]]
    cases += [("what differs between the two", [first, second.resize((84, 140))]), ("say something", [])]
    prompts = [prepare_prompt(onnx, pictures, question)[0] for question, pictures in cases]
    assert len({len(p.ids) for p in prompts}) >= 4
    return prompts


def run(
    runtime: Any, prompts: Sequence[Prompt], options: Options = TEXT, latents: int = 0, copying: bool = False
) -> tuple[list[Result], list[int]]:
    """Results, and at which event each row entered its latents."""
    decoding = Decoding(StartsLatents(runtime, latents, copying), list(prompts), options)
    events = list(decoding)
    return decoding.results, [
        sum(e.row == r and e.kind == "token" for e in events[: events.index(s)]) for s in events if s.kind == "start" for r in [s.row]
    ]


def assert_same(mine: list[Result], theirs: list[Result], tolerance: float = 1e-3) -> None:
    for row, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.tokens == b.tokens, f"row {row}"
        assert (len(a.latents), len(a.hidden)) == (len(b.latents), len(b.hidden))
        got, want = np.stack(a.hidden), np.stack(b.hidden)
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want), f"row {row}: {np.abs(got - want).max()}"


@pytest.mark.parametrize("case", range(5), ids=["scene", "scene 2", "scene 3", "two pictures", "no picture"])
@pytest.mark.parametrize("latents", [0, 1], ids=["text", "latents"])
def test_one_question_decodes_as_under_torch(
    onnx: OnnxRuntime, reference: TorchRuntime, asked: list[Prompt], case: int, latents: int
) -> None:
    (mine, _), (theirs, _) = (run(r, asked[case : case + 1], latents=latents) for r in (onnx, reference))
    assert_same(mine, theirs)
    assert len(mine[0].latents) == (onnx.latent.steps if latents else 0)
    assert len(mine[0].tokens) == 6


def test_visual_tokens_are_those_of_torch(onnx: OnnxRuntime, reference: TorchRuntime) -> None:
    pictures = [picture for _, picture in scene_samples(2, 5, "test")]
    (mine, _), (theirs, _) = (prepare_prompt(r, pictures, "what is here") for r in (onnx, reference))
    np.testing.assert_allclose(mine.features, theirs.features, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(mine.ids, theirs.ids)


def test_rows_of_different_lengths_in_different_modes_decode_as_under_torch(
    onnx: OnnxRuntime, reference: TorchRuntime, asked: list[Prompt]
) -> None:
    (mine, entered), (theirs, _) = (run(r, asked, latents=len(asked)) for r in (onnx, reference))
    assert len(set(entered)) >= 3, f"the rows do not enter the latents at different times: {entered}"
    assert all(len(r.latents) == onnx.latent.steps for r in mine)
    assert_same(mine, theirs)


def test_a_row_decodes_in_a_batch_as_it_does_alone(onnx: OnnxRuntime, asked: list[Prompt]) -> None:
    together, _ = run(onnx, asked)
    alone = [run(onnx, [p])[0][0] for p in asked]
    assert_same(together, alone)


def test_sampling_with_a_seed_draws_what_torch_draws(onnx: OnnxRuntime, reference: TorchRuntime, asked: list[Prompt]) -> None:
    options = replace(TEXT, temperature=1.0, top_p=0.9, seed=11)
    (mine, _), (theirs, _) = (run(r, asked, options, latents=2) for r in (onnx, reference))
    assert_same(mine, theirs)
    greedy, _ = run(onnx, asked, latents=2)
    assert [r.tokens for r in mine] != [r.tokens for r in greedy]


def test_buffers_of_a_batch_before_leave_no_trace(onnx: OnnxRuntime, asked: list[Prompt], small_fp32: Path) -> None:
    short, long = asked[4:5], asked[3:4]
    fresh, _ = run(OnnxRuntime(small_fp32, threads=1), short, latents=1)
    run(onnx, long, latents=1)
    buffers = onnx._state
    again, _ = run(onnx, short, latents=1)
    assert onnx._state is buffers, "the buffers were made anew, so nothing was tested"
    assert_same(again, fresh, tolerance=1e-6)


def test_another_batch_size_gets_buffers_of_its_own(onnx: OnnxRuntime, reference: TorchRuntime, asked: list[Prompt]) -> None:
    for rows in (1, 3, 2):
        (mine, _), (theirs, _) = (run(r, asked[:rows]) for r in (onnx, reference))
        assert_same(mine, theirs)


class Counting:
    """A buffer of ONNX Runtime that counts how often something is copied into it."""

    def __init__(self, value: Any) -> None:
        self.value, self.copies = value, 0

    def update_inplace(self, array: np.ndarray) -> None:
        self.copies += 1
        self.value.update_inplace(array)

    def numpy(self) -> np.ndarray:
        return self.value.numpy()  # type: ignore[no-any-return]


def test_latents_are_fed_from_the_buffer_that_they_lie_in_and_are_what_copying_would_feed(small_fp32: Path, asked: list[Prompt]) -> None:
    runtime = OnnxRuntime(small_fp32, threads=1)
    run(runtime, asked[:1])  # makes the buffers, which the next batch of one row uses again
    results, copies = [], []
    for copying in (False, True):
        buffer = runtime._state = Counting(runtime._state)  # type: ignore[assignment]
        found, _ = run(runtime, asked[:1], latents=1, copying=copying)
        assert runtime._state is buffer
        results.append(found)
        copies.append(buffer.copies)
    assert copies[1] - copies[0] == runtime.latent.steps
    assert_same(*results, tolerance=1e-6)


def test_a_kept_latent_is_not_overwritten_by_the_steps_after_it(onnx: OnnxRuntime, asked: list[Prompt]) -> None:
    ((result,), _) = run(onnx, asked[:1], latents=1)
    assert len({latent.tobytes() for latent in result.latents}) == onnx.latent.steps
