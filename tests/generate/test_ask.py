"""Pictures that were asked about are not read again, and take no more memory than they may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvr_lite.generate.ask import PictureCache, prepare_prompt
from lvr_lite.generate.decode import Decoding, Options, Prompt, decode
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.families import Grid
from tests.fakes import Around


class Counting(Around):
    """Counts what it reads."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.encoded = 0
        self.positions_read = 0

    def encode(self, pixel_values: np.ndarray, grids: list[Grid]) -> np.ndarray:
        self.encoded += 1
        return super().encode(pixel_values, grids)

    def prefill(self, embeds: np.ndarray, *others: Any, **more: Any) -> np.ndarray:
        self.positions_read += embeds.shape[1]
        return super().prefill(embeds, *others, **more)


@pytest.fixture
def runtime(small_fp32: Path) -> Counting:
    return Counting(OnnxRuntime(Bundle.open(small_fp32), threads=1))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    )


def answered(runtime: Runtime, prompt: Prompt) -> list[int]:
    return decode(runtime, [prompt], Options(max_tokens=4, min_tokens=4, steps=0))[0].tokens


def test_a_second_question_reads_its_own_words_alone(runtime: Counting) -> None:
    known = PictureCache(runtime)
    first, _ = known.prepare_prompt([picture(0)], "what colour is the star")
    answered(runtime, first)
    assert (runtime.encoded, runtime.positions_read) == (1, len(first.ids))
    second, seconds = known.prepare_prompt([picture(0)], "where heart")
    assert seconds.vision == 0
    answered(runtime, second)
    last_seen = int(np.flatnonzero(second.ids == runtime.processor.tokens.image)[-1])
    assert runtime.encoded == 1
    assert runtime.positions_read == len(first.ids) + len(second.ids) - last_seen - 1


def test_what_is_known_survives_other_pictures_and_a_decoding_that_was_broken_off(
    runtime: Counting,
) -> None:
    known, questions = PictureCache(runtime), ("what colour is the star", "where heart")
    wanted = [
        answered(runtime, prepare_prompt(runtime, [picture(i)], questions[1])[0]) for i in (0, 1)
    ]
    for i in (0, 1):
        for n, _ in enumerate(
            Decoding(
                runtime,
                [known.prepare_prompt([picture(i)], questions[0])[0]],
                Options(max_tokens=8, min_tokens=8),
            )
        ):
            if n == 2:
                break
    assert [
        answered(runtime, known.prepare_prompt([picture(i)], questions[1])[0]) for i in (0, 1)
    ] == wanted
    assert runtime.encoded == 4


def test_the_least_recently_used_pictures_are_forgotten(runtime: Counting) -> None:
    known = PictureCache(runtime)
    answered(runtime, known.prepare_prompt([picture(0)], "where heart")[0])
    one = known.bytes
    assert one > 0
    known = PictureCache(runtime, limit=5 * one // 2)
    runtime.encoded = 0
    for seed, encoded in ((0, 1), (1, 2), (0, 2), (2, 3), (3, 4), (2, 4), (1, 5)):
        answered(runtime, known.prepare_prompt([picture(seed)], "where heart")[0])
        assert runtime.encoded == encoded, seed
    assert known.bytes <= 3 * one


def test_a_question_without_a_picture_keeps_nothing(runtime: Counting) -> None:
    known = PictureCache(runtime)
    assert known.prepare_prompt([], "say something")[0].prefix is None
    assert known.bytes == 0
