"""What the Qwen-VL families share: patches, visual tokens, positions. May import: numpy, Pillow.

Arrays follow transformers' layout: patches come in blocks of `merge` x `merge`, so that each run of
merge**2 patches is one visual token; tokens are in reading order. A grid counts patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lvr_lite.model.families.base import Grid, ImageSpec


class QwenVL:
    """The base of the Qwen-VL families; each sets `model_type` and `architecture`."""

    model_type = ""
    architecture = ""
    language_model = "language_model"
    lora_targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    # "visual" alone would match nothing (docs/decisions.md).
    keep_unquantized: Sequence[str] = ("model.visual", "lm_head")
    image_token = "<|image_pad|>"
    picture_tokens: Sequence[str] = ()
    position_axes = 3
    vision_axes: Mapping[str, str] = {"position_ids": "patches", "image_id": "patches"}
    tiled = False

    def image_spec(self, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ImageSpec:
        size = preprocessor.get("size") or {}
        vision = config["vision_config"]
        return ImageSpec(
            patch=vision["patch_size"],
            merge=vision["spatial_merge_size"],
            temporal_patch=vision.get("temporal_patch_size", 2),
            mean=tuple(preprocessor["image_mean"]),
            std=tuple(preprocessor["image_std"]),
            min_pixels=preprocessor.get("min_pixels") or size["shortest_edge"],
            max_pixels=preprocessor.get("max_pixels") or size["longest_edge"],
            resample="bicubic",
            own=self._own(vision),
        )

    def _own(self, vision: Mapping[str, Any]) -> dict[str, int]:  # noqa: ARG002
        """What `ImageSpec.own` holds, from config.json's `vision_config`."""
        return {}

    def default_max_pixels(self, image: ImageSpec) -> int:
        return 512 * image.token_side**2

    def deepstack(self, vision_config: Mapping[str, Any]) -> Sequence[int]:  # noqa: ARG002
        return ()

    def grid_of(self, height: int, width: int, image: ImageSpec) -> Grid:
        """Rows and columns of patches."""
        resized_height, resized_width = resized(height, width, image)
        return Grid(resized_height // image.patch, resized_width // image.patch)

    def frames(self, picture: Image.Image, image: ImageSpec) -> tuple[list[Image.Image], Grid]:
        """The whole picture, resized."""
        height, width = resized(picture.height, picture.width, image)
        frame = picture.resize((width, height), Image.Resampling.BICUBIC)
        return [frame], self.grid_of(picture.height, picture.width, image)

    def patches(self, pixels: np.ndarray, values: np.ndarray, image: ImageSpec) -> np.ndarray:
        return cut_patches(pixels, values, image)

    def vision_inputs(self, grids: Sequence[Grid], image: ImageSpec) -> dict[str, np.ndarray]:
        """Row and column of each patch, position_ids (N, 2) int64, and the picture in which it
        attends, image_id (N,) int64."""
        positions = [rows_columns(grid, image.merge) for grid in grids]
        patches = [len(of_picture) for of_picture in positions]
        pictures = np.repeat(np.arange(len(grids)), patches)
        return {
            "position_ids": np.concatenate(positions).astype(np.int64),
            "image_id": pictures.astype(np.int64),
        }

    def token_grid(self, grid: Grid, image: ImageSpec) -> Grid:
        return Grid(grid.rows // image.merge, grid.columns // image.merge)

    def token_places(self, grid: Grid, image: ImageSpec) -> np.ndarray:
        """All visual tokens of a picture are those of its token grid, in reading order."""
        return np.arange(self._tokens(grid, image))

    def picture_text(self, grid: Grid, image: ImageSpec) -> str:
        return self.image_token * self._tokens(grid, image)

    def _tokens(self, grid: Grid, image: ImageSpec) -> int:
        """Number of the visual tokens of a picture."""
        rows, columns = self.token_grid(grid, image)
        return rows * columns

    def positions(
        self, ids: np.ndarray, image_token: int, grids: Sequence[Grid], image: ImageSpec
    ) -> np.ndarray:
        """mRoPE: text counts on, a picture's tokens carry (start, row, column) (transformers:
        get_rope_index)."""
        out = np.zeros((3, len(ids)), np.int64)
        i = 0
        position = 0
        picture = 0
        while i < len(ids):
            if ids[i] != image_token:
                out[:, i] = position
                position += 1
                i += 1
                continue
            rows, columns = self.token_grid(grids[picture], image)
            end = i + rows * columns
            row_of_token = np.repeat(np.arange(rows), columns)
            column_of_token = np.tile(np.arange(columns), rows)
            out[0, i:end] = position
            out[1, i:end] = position + row_of_token
            out[2, i:end] = position + column_of_token
            position += max(rows, columns)
            picture += 1
            i = end
        return out

    def rope_axes(self, sections: Sequence[int] | None, frequencies: int) -> np.ndarray:
        """One section of frequencies after another."""
        assert sections is not None
        assert sum(sections) == frequencies
        axes = np.arange(len(sections)) % 3
        return np.repeat(axes, sections)

    def learned_places(self, side: int, merge: int) -> np.ndarray:
        raise NotImplementedError("only tiled families have learned places")

    def image_inputs(self, pixel_values: Any, grid_thw: Any, config: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"pixel_values": pixel_values, "image_grid_thw": grid_thw}


def resized(height: int, width: int, image: ImageSpec) -> tuple[int, int]:
    """Height and width in pixels that a picture is resized to.

    Both are multiples of a visual token's side; their area lies within the spec's limits
    (transformers: smart_resize).
    """
    factor = image.token_side
    # A thin side becomes 0: then the area lies below min_pixels, as in transformers.
    h = round(height / factor)
    w = round(width / factor)
    area = h * factor * w * factor
    if area > image.max_pixels:
        beta = math.sqrt(height * width / image.max_pixels)
        h = max(1, math.floor(height / beta / factor))
        w = max(1, math.floor(width / beta / factor))
    elif area < image.min_pixels:
        beta = math.sqrt(image.min_pixels / (height * width))
        h = math.ceil(height * beta / factor)
        w = math.ceil(width * beta / factor)
    return h * factor, w * factor


def cut_patches(pixels: np.ndarray, values: np.ndarray, image: ImageSpec) -> np.ndarray:
    """See `Family.patches`; H and W are multiples of patch * merge."""
    p = image.patch
    m = image.merge
    t = image.temporal_patch
    height, width = pixels.shape[:2]
    rows = height // p
    columns = width // p
    blocks = pixels.reshape(rows // m, m, p, columns // m, m, p, 3)
    # (block rows, block columns, m, m, 3, p, p), copied while pixels are bytes: as floats it takes
    # three times as long.
    blocks = np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5))
    out = np.empty((*blocks.shape[:5], t, p, p), np.float32)
    for c in range(3):
        of_colour = values[c].take(blocks[:, :, :, :, c])
        # A still picture fills every temporal slot.
        out[:, :, :, :, c] = of_colour[:, :, :, :, None]
    return out.reshape(rows * columns, 3 * t * p * p)


def rows_columns(grid: Grid, merge: int) -> np.ndarray:
    """Row and column (N, 2) of each patch of a picture, block by block."""
    rows = np.arange(grid.rows)
    columns = np.arange(grid.columns)
    pairs = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
    block_rows = grid.rows // merge
    block_columns = grid.columns // merge
    blocks = pairs.reshape(block_rows, merge, block_columns, merge, 2)
    blocks = blocks.transpose(0, 2, 1, 3, 4)
    return np.asarray(blocks.reshape(-1, 2))
