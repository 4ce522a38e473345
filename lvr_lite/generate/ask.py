"""From pictures and a question to an answer: the path that `run`, `eval`, `bench` and training
share. May import: the core, Pillow.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from lvr_lite.generate.decode import Options, Prefix, Prompt, Result, decode
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.images import prepare
from lvr_lite.model.prompt import prompt_ids

KEPT_BYTES = 512 << 20  # of `Pictures`: at a 2B shape about 25 pictures of 256 visual tokens


@dataclass(frozen=True)
class Seen:
    """Pictures as a model sees them: their grids, their visual tokens (T, H), and the seconds that
    "preprocess" and "vision" took.
    """

    grids: list[tuple[int, int]]
    features: np.ndarray
    seconds: dict[str, float]


def see(runtime: Runtime, pictures: Sequence[Image.Image]) -> Seen:
    began = time.perf_counter()
    if not pictures:
        return Seen(
            [], np.zeros((0, runtime.hidden_size), np.float32), {"preprocess": 0.0, "vision": 0.0}
        )
    pixels, grids = prepare(list(pictures), runtime.family, runtime.image_spec)
    prepared = time.perf_counter()
    features = runtime.encode(pixels, grids)
    return Seen(
        grids, features, {"preprocess": prepared - began, "vision": time.perf_counter() - prepared}
    )


def prompt_of(runtime: Runtime, seen: Seen, question: str) -> Prompt:
    shown = [runtime.family.picture_text(grid, runtime.image_spec) for grid in seen.grids]
    ids = np.array(
        prompt_ids(
            runtime.tokenizer, runtime.template, question, runtime.family.IMAGE_TOKEN, shown
        ),
        np.int64,
    )
    return Prompt(
        ids,
        seen.features,
        runtime.family.positions(ids, runtime.tokens.image, seen.grids, runtime.image_spec),
    )


def prepare_prompt(
    runtime: Runtime, pictures: Sequence[Image.Image], question: str
) -> tuple[Prompt, dict[str, float]]:
    """A prompt with its visual tokens, and the seconds that "preprocess" (here with the text) and
    "vision" took.
    """
    began = time.perf_counter()
    seen = see(runtime, pictures)
    prompt = prompt_of(runtime, seen, question)
    vision = seen.seconds["vision"]
    return prompt, {"preprocess": time.perf_counter() - began - vision, "vision": vision}


class Pictures:
    """Pictures that were asked about, so that another question about them needs neither vision nor
    their prefill.

    They are known by the hash of their pixels. Of the least recently used, visual tokens and K/V
    are dropped beyond `limit` bytes; those of the last ones stay.
    """

    def __init__(self, runtime: Runtime, limit: int = KEPT_BYTES) -> None:
        self._runtime, self._limit = runtime, limit
        self._known: OrderedDict[bytes, tuple[Seen, Prompt]] = OrderedDict()

    def prepare_prompt(
        self, pictures: Sequence[Image.Image], question: str
    ) -> tuple[Prompt, dict[str, float]]:
        """As the function of this name, which it equals in all but time and the last bits of
        rounding.
        """
        began = time.perf_counter()
        if not pictures:
            return prepare_prompt(self._runtime, pictures, question)
        key = _hash(pictures)
        seen, first = self._known.pop(key, (None, None))
        vision = 0.0
        if seen is None:
            seen = see(self._runtime, pictures)
            vision = seen.seconds["vision"]
        prompt = prompt_of(self._runtime, seen, question)
        length = int(np.flatnonzero(prompt.ids == self._runtime.tokens.image)[-1]) + 1
        known = first is not None and np.array_equal(first.ids[:length], prompt.ids[:length])
        prompt = replace(
            prompt, prefix=first.prefix if first is not None and known else Prefix(length)
        )
        self._known[key] = seen, prompt
        while len(self._known) > 1 and self.bytes > self._limit:
            self._known.popitem(last=False)
        return prompt, {"preprocess": time.perf_counter() - began - vision, "vision": vision}

    @property
    def bytes(self) -> int:
        """Of all visual tokens and K/V that are kept."""
        kept = [
            prompt.prefix.kept or []
            for _, prompt in self._known.values()
            if prompt.prefix is not None
        ]
        return sum(seen.features.nbytes for seen, _ in self._known.values()) + sum(
            part.nbytes for parts in kept for part in parts
        )


def _hash(pictures: Sequence[Image.Image]) -> bytes:
    found = hashlib.sha256()
    for picture in pictures:
        found.update(repr((picture.mode, picture.size)).encode())
        found.update(picture.tobytes())
        if picture.mode == "P":
            found.update(repr(picture.getpalette()).encode())
    return found.digest()


def text_of(runtime: Runtime, result: Result) -> str:
    return str(runtime.tokenizer.decode(result.tokens)).strip()


def ask(
    runtime: Runtime, pictures: Sequence[Image.Image], question: str, options: Options | None = None
) -> str:
    """The answer to one question."""
    prompt, _ = prepare_prompt(runtime, pictures, question)
    return text_of(runtime, decode(runtime, [prompt], options)[0])
