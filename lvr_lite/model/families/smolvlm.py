"""SmolVLM: square tiles of a picture, then the whole of it as one more, each seen by itself.

A grid counts tiles; it is (0, 0) for a picture that is one tile. Boxes select among the tiles'
visual tokens; those of the whole picture, which come last, are never a target. Positions count on.
May import: numpy, Pillow. Checked against transformers in tests/model/test_families.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lvr_lite.model.families.base import Grid, ImageSpec
from lvr_lite.model.families.qwen import cut_patches, rows_columns

# Pixels of a side at most, whatever the settings say (transformers).
LARGEST = 4096
AROUND = "<fake_token_around_image>"
WHOLE = "<global-img>"
# Rows and columns of tiles, at most.
TILES = 6


def tile_token(row: int, column: int) -> str:
    """What stands before a tile; row and column count from 0."""
    return f"<row_{row + 1}_col_{column + 1}>"


TILE_TOKENS = [tile_token(row, column) for row in range(TILES) for column in range(TILES)]


class SmolVLM:
    """`ImageSpec.own` holds:

    tile: the side of a tile, pixels.
    longest: the longer side that a picture is resized to first, pixels.
    split: whether a picture is cut into tiles at all.
    """

    model_type = "smolvlm"
    architecture = "SmolVLMForConditionalGeneration"
    language_model = "text_model"
    lora_targets = r".*text_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    keep_unquantized: Sequence[str] = ("model.vision_model", "model.connector", "lm_head")
    image_token = "<image>"
    picture_tokens: Sequence[str] = (AROUND, WHOLE, *TILE_TOKENS)
    position_axes = 1
    vision_axes: Mapping[str, str] = {}
    tiled = True

    def image_spec(self, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ImageSpec:
        size = preprocessor.get("size") or {}
        tile_size = preprocessor.get("max_image_size") or {}
        longest = size.get("longest_edge", 4 * 364)
        own = {
            "tile": tile_size.get("longest_edge", 364),
            "longest": longest,
            "split": bool(preprocessor.get("do_image_splitting", True)),
        }
        return ImageSpec(
            patch=config["vision_config"]["patch_size"],
            merge=config.get("scale_factor", 2),
            temporal_patch=1,
            mean=tuple(preprocessor["image_mean"]),
            std=tuple(preprocessor["image_std"]),
            min_pixels=1,
            max_pixels=preprocessor.get("max_pixels") or longest**2,
            resample="lanczos",
            own=own,
        )

    def default_max_pixels(self, image: ImageSpec) -> int:
        """Two tiles by two for a picture of 4 : 3, beside the whole: 320 visual tokens, or 405."""
        tile = image.own["tile"]
        return 2 * tile * (3 * tile // 2)

    def deepstack(self, vision_config: Mapping[str, Any]) -> Sequence[int]:  # noqa: ARG002
        return ()

    def grid_of(self, height: int, width: int, image: ImageSpec) -> Grid:
        """Rows and columns of tiles; (0, 0) for one tile."""
        tile = image.own["tile"]
        _, (resized_height, resized_width) = _sizes(height, width, image)
        rows = resized_height // tile
        columns = resized_width // tile
        if image.own["split"] and rows * columns > 1:
            return Grid(rows, columns)
        return Grid(0, 0)

    def frames(self, picture: Image.Image, image: ImageSpec) -> tuple[list[Image.Image], Grid]:
        """Its tiles in reading order, then the whole of it at the size of a tile."""
        grid = self.grid_of(picture.height, picture.width, image)
        first, second = _sizes(picture.height, picture.width, image)
        picture = _resize(picture, first)
        if image.own["split"]:
            picture = _resize(picture, second)
        tile = image.own["tile"]
        frames = []
        for row in range(grid.rows):
            for column in range(grid.columns):
                x = column * tile
                y = row * tile
                frames.append(picture.crop((x, y, x + tile, y + tile)))
        frames.append(_resize(picture, (tile, tile)))
        return frames, grid

    def patches(self, pixels: np.ndarray, values: np.ndarray, image: ImageSpec) -> np.ndarray:
        """Pixels beyond the last whole patch are left out, as the tower's convolution leaves them
        (SmolVLM2-2.2B: 384 pixels, patches of 14).
        """
        side = _tokens_along(image) * image.token_side
        return cut_patches(pixels[:side, :side], values, image)

    def vision_inputs(self, grids: Sequence[Grid], image: ImageSpec) -> dict[str, np.ndarray]:  # noqa: ARG002
        """Nothing: all tiles are alike."""
        return {}

    def token_grid(self, grid: Grid, image: ImageSpec) -> Grid:
        """Rows and columns of the visual tokens of all tiles together."""
        side = _tokens_along(image)
        rows, columns = _tiles(grid)
        return Grid(rows * side, columns * side)

    def token_places(self, grid: Grid, image: ImageSpec) -> np.ndarray:
        """Visual tokens lie tile by tile."""
        side = _tokens_along(image)
        rows, columns = _tiles(grid)
        places = np.arange(rows * columns * side**2)
        tiles = places.reshape(rows, columns, side, side)
        # (rows, side, columns, side): in reading order
        return np.asarray(tiles.transpose(0, 2, 1, 3).ravel())

    def picture_text(self, grid: Grid, image: ImageSpec) -> str:
        visual_tokens = self.image_token * _tokens_along(image) ** 2
        whole = f"{AROUND}{WHOLE}{visual_tokens}{AROUND}"
        if grid.rows == 0:
            return whole
        lines = []
        for row in range(grid.rows):
            marks = [tile_token(row, column) for column in range(grid.columns)]
            tiles = [f"{AROUND}{mark}{visual_tokens}" for mark in marks]
            lines.append("".join(tiles))
        return "\n".join([*lines, "", whole])

    def positions(
        self,
        ids: np.ndarray,
        image_token: int,  # noqa: ARG002
        grids: Sequence[Grid],  # noqa: ARG002
        image: ImageSpec,  # noqa: ARG002
    ) -> np.ndarray:
        """They count on, the same on every axis."""
        return np.tile(np.arange(len(ids), dtype=np.int64), (3, 1))

    def rope_axes(self, sections: Sequence[int] | None, frequencies: int) -> np.ndarray:  # noqa: ARG002
        return np.zeros(frequencies, np.int64)

    def learned_places(self, side: int, merge: int) -> np.ndarray:
        """The learned position (side**2,) of each patch of a tile, in blocks of merge x merge.

        transformers compares fractions in float32 to find it; their rounding is part of the model
        where 1 / side is not exact.
        """
        step = 1 / side
        edges = step + np.arange(side - 1) * step
        edges = edges.astype(np.float32)
        fractions = np.arange(side, dtype=np.float32) * np.float32(step)
        fractions = np.minimum(fractions, np.float32(1 - 1e-6))
        bucket = np.searchsorted(edges, fractions, side="right")
        rows, columns = rows_columns(Grid(side, side), merge).T
        places = bucket[rows] * side + bucket[columns]
        return np.asarray(places, np.int64)

    def image_inputs(self, pixel_values: Any, grid_thw: Any, config: Any) -> dict[str, Any]:  # noqa: ARG002
        """Tiles (1, N / P, 3, side, side); pixel_values may be an array of numpy or torch."""
        vision = config.vision_config
        merge = config.scale_factor
        patch = vision.patch_size
        blocks = vision.image_size // patch // merge
        x = pixel_values.reshape(-1, blocks, blocks, merge, merge, 3, patch, patch)
        # (tiles, 3, blocks, merge, patch, blocks, merge, patch)
        x = x.swapaxes(1, 5).swapaxes(2, 5).swapaxes(4, 6)
        side = blocks * merge * patch
        tiles = x.reshape(1, -1, 3, side, side)
        return {"pixel_values": tiles}


def _tokens_along(image: ImageSpec) -> int:
    """Visual tokens along the side of a tile."""
    return image.own["tile"] // image.patch // image.merge


def _tiles(grid: Grid) -> Grid:
    """Rows and columns of tiles, of a picture that is one tile too."""
    return Grid(max(1, grid.rows), max(1, grid.columns))


def _resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """size: height and width."""
    height, width = size
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _sizes(height: int, width: int, image: ImageSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) after the first resizing, which sets the longer side, and after the second,
    which makes both multiples of a tile."""
    shorter = min(height, width)
    longer = max(height, width)
    by_area = int(math.sqrt(image.max_pixels * longer / shorter))
    longest = min(image.own["longest"], by_area, LARGEST)
    tile = image.own["tile"]
    ratio = width / height
    if width >= height:
        w = longest
        h = int(longest / ratio)
        h += h % 2
    else:
        h = longest
        w = int(longest * ratio)
        w += w % 2
    first = (max(h, 1), max(w, 1))
    h, w = first
    ratio = w / h
    if w >= h:
        wide = _whole_tiles(w, tile)
        tall = _whole_tiles(int(wide / ratio), tile)
    else:
        tall = _whole_tiles(h, tile)
        wide = _whole_tiles(int(tall * ratio), tile)
    return first, (tall, wide)


def _whole_tiles(length: int, tile: int) -> int:
    """The length of as many tiles as hold `length` pixels."""
    return math.ceil(length / tile) * tile


FAMILY = SmolVLM()
