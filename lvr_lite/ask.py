"""From pictures and a question to an answer: the path that `run`, `eval`, `bench` and training share. May import: the core, Pillow."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lvr_lite.decode import Options, Prompt, Result, decode
from lvr_lite.prompt import prompt_ids
from lvr_lite.runtime.base import Runtime
from lvr_lite.runtime.preprocess import prepare


def prepare_prompt(runtime: Runtime, pictures: Sequence[Image.Image], question: str) -> tuple[Prompt, dict[str, float]]:
    """A prompt with its visual tokens, and the seconds that "preprocess" and "vision" took."""
    began = time.perf_counter()
    grids: list[tuple[int, int]] = []
    features = np.zeros((0, runtime.hidden_size), np.float32)
    seen = began
    if pictures:
        pixels, grids = prepare(list(pictures), runtime.family, runtime.image_spec)
        seen = time.perf_counter()
        features = runtime.encode(pixels, grids)
    vision = time.perf_counter() - seen
    shown = [runtime.family.picture_text(g, runtime.image_spec) for g in grids]
    ids = np.array(prompt_ids(runtime.tokenizer, runtime.template, question, runtime.family.IMAGE_TOKEN, shown), np.int64)
    positions = runtime.family.positions(ids, runtime.tokens.image, grids, runtime.image_spec)
    return Prompt(ids, features, positions), {"preprocess": seen - began, "vision": vision}


def text_of(runtime: Runtime, result: Result) -> str:
    return str(runtime.tokenizer.decode(result.tokens)).strip()


def ask(runtime: Runtime, pictures: Sequence[Image.Image], question: str, options: Options | None = None) -> str:
    """The answer to one question."""
    prompt, _ = prepare_prompt(runtime, pictures, question)
    return text_of(runtime, decode(runtime, [prompt], options)[0])
