"""From pictures and words to what a model reads, and from its ids back to words.

May import: numpy, Pillow, tokenizers and this folder.

    pixels = processor.see([picture])
    prompt = processor.prompt("what colour is the star", pixels.grids)
    processor.text([17, 23])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from lvr_lite.model import images
from lvr_lite.model.families import Family, Grid, ImageSpec
from lvr_lite.model.prompt import answer_prefix, prompt_ids
from lvr_lite.model.spec import TokenIds


@dataclass(frozen=True)
class Pixels:
    """Pictures as the vision tower takes them.

    patches: (N, C) float32, those of all pictures one after another.
    grids: one a picture; a family says what it counts.
    """

    patches: np.ndarray
    grids: list[Grid]


@dataclass(frozen=True)
class PromptIds:
    """A prompt without its visual tokens' values.

    ids: (S,) int64, the image token in the place of each visual token.
    positions: (3, S) int64.
    """

    ids: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Processor:
    """Everything about a model that is neither its weights nor its latent loop.

    family: the architecture's rules.
    image: how pictures are resized and cut.
    template: chat template (jinja).
    tokenizer: with the three latent markers.
    tokens: ids that decoding needs.
    """

    family: Family
    image: ImageSpec
    template: str
    tokenizer: Tokenizer
    tokens: TokenIds

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Control tokens: what text from users must not hold."""
        declared = self.tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in declared if token.special)

    @cached_property
    def answer_prefix(self) -> str:
        """What a trained answer begins with, by the template: a space in SmolVLM."""
        return answer_prefix(self.template)

    def see(self, pictures: Sequence[Image.Image]) -> Pixels:
        """RGB pictures as patches. Raises DataError for a picture of extreme proportions."""
        values = images.normalized(self.image)
        patches: list[np.ndarray] = []
        grids = []
        for number, picture in enumerate(pictures, 1):
            images.refuse_extreme(picture, f"picture {number}")
            frames, grid = self.family.frames(picture, self.image)
            patches += [
                self.family.patches(np.asarray(frame), values, self.image) for frame in frames
            ]
            grids.append(grid)
        # A single one is not copied once more.
        return Pixels(patches[0] if len(patches) == 1 else np.concatenate(patches), grids)

    def prompt(self, question: str, grids: Sequence[Grid]) -> PromptIds:
        """One user turn of pictures with these grids and a question, up to where the answer begins.

        Raises LvrError where the question holds a control token, or the template cannot be filled.
        """
        pictures = [self.family.picture_text(grid, self.image) for grid in grids]
        ids = prompt_ids(
            self.tokenizer,
            self.template,
            question,
            self.family.image_token,
            pictures,
            self.special_tokens,
        )
        array = np.array(ids, np.int64)
        positions = self.family.positions(array, self.tokens.image, grids, self.image)
        return PromptIds(array, positions)

    def text(self, ids: Iterable[int]) -> str:
        """The words of token ids, without the white space around them."""
        return str(self.tokenizer.decode(list(ids))).strip()

    def grid_of(self, height: int, width: int) -> Grid:
        """The grid of a picture of this size in pixels."""
        return self.family.grid_of(height, width, self.image)

    def token_grid(self, grid: Grid) -> Grid:
        """Rows and columns of the visual tokens that boxes select among."""
        return self.family.token_grid(grid, self.image)

    def token_grid_of(self, picture: Image.Image) -> Grid:
        """The token grid of a picture."""
        return self.token_grid(self.grid_of(picture.height, picture.width))

    def token_places(self, grid: Grid) -> np.ndarray:
        """Places (rows * columns,) of the token grid's tokens among all of their picture."""
        return self.family.token_places(grid, self.image)

    def visual_tokens(self, grid: Grid) -> int:
        """How many visual tokens a picture has, those outside the token grid included."""
        return self.family.picture_text(grid, self.image).count(self.family.image_token)

    def vision_inputs(self, grids: Sequence[Grid]) -> dict[str, np.ndarray]:
        """What the vision graph needs beside patches."""
        return self.family.vision_inputs(grids, self.image)

    @property
    def default_max_pixels(self) -> int:
        """Area in pixels that recipes shrink pictures to: the family's, and never above the
        model's own.
        """
        return min(self.image.max_pixels, self.family.default_max_pixels(self.image))

    @property
    def size_in_words(self) -> str:
        """How large pictures are at most, by the visual tokens of a square one."""
        area = self.image.max_pixels
        side = math.isqrt(area)
        tokens = self.visual_tokens(self.grid_of(side, side))
        return f"pictures are shrunk to {area:,} pixels, about {tokens:,} visual tokens"

    def with_max_pixels(self, max_pixels: int) -> Processor:
        """The same with pictures shrunk to this area (pixels)."""
        return replace(self, image=replace(self.image, max_pixels=max_pixels))
