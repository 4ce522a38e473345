"""From pictures and a question to an answer: what `run`, `eval`, `bench` and training share.

May import: numpy, Pillow, lvr_lite.model, this folder.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from lvr_lite.files import JsonObject
from lvr_lite.generate.decode import Options, Prompt, decode
from lvr_lite.generate.prefix import PrefixCache
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.families import Grid

# Bytes of a `PictureCache`: at a 2B shape about 25 pictures of 256 visual tokens.
CACHE_BYTES = 512 << 20


@dataclass(frozen=True)
class Seconds:
    """What came before decoding.

    preprocess: preparing pictures and text.
    vision: running the vision tower.
    """

    preprocess: float
    vision: float


@dataclass(frozen=True)
class EncodedPictures:
    """Pictures as a model sees them.

    grids: one a picture.
    features: their visual tokens (T, H), or wider (see `decode.Prompt`).
    seconds: what it took.
    """

    grids: list[Grid]
    features: np.ndarray
    seconds: Seconds


def encode_pictures(runtime: Runtime, pictures: Sequence[Image.Image]) -> EncodedPictures:
    """The visual tokens of RGB pictures. Raises DataError for one of extreme proportions."""
    began = time.perf_counter()
    if not pictures:
        features = np.zeros((0, runtime.hidden_size), np.float32)
        return EncodedPictures([], features, Seconds(0.0, 0.0))
    pixels = runtime.processor.see(pictures)
    prepared = time.perf_counter()
    features = runtime.encode(pixels.patches, pixels.grids)
    seconds = Seconds(prepared - began, time.perf_counter() - prepared)
    return EncodedPictures(pixels.grids, features, seconds)


def visual_tokens(runtime: Runtime, pictures: Sequence[Image.Image]) -> list[int]:
    """How many visual tokens each picture takes."""
    processor = runtime.processor
    grids = [processor.grid_of(picture.height, picture.width) for picture in pictures]
    return [processor.visual_tokens(grid) for grid in grids]


def median_and_most(counts: Sequence[int]) -> JsonObject:
    """{"p50", "max"} of whole numbers, such as the visual tokens of pictures; None of none."""
    if not counts:
        return {"p50": None, "max": None}
    return {"p50": float(np.median(counts)), "max": max(counts)}


def prompt_of(runtime: Runtime, encoded: EncodedPictures, question: str) -> Prompt:
    """The prompt that asks a question about pictures. Raises LvrError as `Processor.prompt`."""
    prompt = runtime.processor.prompt(question, encoded.grids)
    return Prompt(prompt.ids, encoded.features, prompt.positions)


def prepare_prompt(
    runtime: Runtime, pictures: Sequence[Image.Image], question: str
) -> tuple[Prompt, Seconds]:
    """A prompt with its visual tokens, and what it took."""
    began = time.perf_counter()
    encoded = encode_pictures(runtime, pictures)
    prompt = prompt_of(runtime, encoded, question)
    vision = encoded.seconds.vision
    return prompt, Seconds(time.perf_counter() - began - vision, vision)


class PictureCache:
    """Pictures that were asked about: another question about them needs neither the vision tower
    nor their prefill.

    A picture's key is the hash of its pixels. Beyond `limit` bytes the visual tokens and K/V of the
    least recently used pictures are dropped; those of the last question stay.
    """

    def __init__(self, runtime: Runtime, limit: int = CACHE_BYTES) -> None:
        self._runtime = runtime
        self._limit = limit
        self._entries: OrderedDict[bytes, tuple[EncodedPictures, Prompt]] = OrderedDict()

    def prepare_prompt(
        self, pictures: Sequence[Image.Image], question: str
    ) -> tuple[Prompt, Seconds]:
        """As the function of this name, which it equals in all but time and the last bits of
        rounding."""
        began = time.perf_counter()
        if not pictures:
            return prepare_prompt(self._runtime, pictures, question)
        key = _hash(pictures)
        encoded, earlier = self._entries.pop(key, (None, None))
        vision = 0.0
        if encoded is None:
            encoded = encode_pictures(self._runtime, pictures)
            vision = encoded.seconds.vision
        prompt = prompt_of(self._runtime, encoded, question)
        prompt = replace(prompt, prefix=self._prefix(prompt, earlier))
        self._entries[key] = (encoded, prompt)
        while len(self._entries) > 1 and self.bytes > self._limit:
            self._entries.popitem(last=False)
        return prompt, Seconds(time.perf_counter() - began - vision, vision)

    def _prefix(self, prompt: Prompt, earlier: Prompt | None) -> PrefixCache:
        """The cache that a prompt shares with an earlier one about the same pictures: of all ids
        up to the last visual token, where both begin with the same ids. Else a new one."""
        image = self._runtime.processor.tokens.image
        places = np.flatnonzero(prompt.ids == image)
        length = int(places[-1]) + 1
        if earlier is None or not np.array_equal(earlier.ids[:length], prompt.ids[:length]):
            return PrefixCache(length)
        assert earlier.prefix is not None
        return earlier.prefix

    @property
    def bytes(self) -> int:
        """Of all visual tokens and K/V that are in the cache."""
        total = 0
        for encoded, prompt in self._entries.values():
            total += encoded.features.nbytes
            if prompt.prefix is not None:
                total += prompt.prefix.bytes
        return total


def _hash(pictures: Sequence[Image.Image]) -> bytes:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(repr((picture.mode, picture.size)).encode())
        digest.update(picture.tobytes())
        if picture.mode == "P":
            digest.update(repr(picture.getpalette()).encode())
    return digest.digest()


def ask(
    runtime: Runtime,
    pictures: Sequence[Image.Image],
    question: str,
    options: Options | None = None,
) -> str:
    """The answer to one question."""
    prompt, _ = prepare_prompt(runtime, pictures, question)
    (result,) = decode(runtime, [prompt], options)
    return runtime.processor.text(result.tokens)
