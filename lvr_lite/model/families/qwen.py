"""What the Qwen-VL families share: patches, visual tokens, positions. May import: numpy, Pillow.

Arrays follow transformers' layout: patches come in blocks of `merge` x `merge`, so that each run of
merge**2 patches is one visual token; tokens are in reading order. A grid is (rows, columns) of
patches.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

# What a family is made of (docs/families.md); those that share it import all and define anew what
# differs.
__all__ = [
    "IMAGE_TOKEN", "KEEP_UNQUANTIZED", "LANGUAGE_MODEL", "LORA_TARGETS", "PICTURE_TOKENS", "POSITION_AXES", "VISION_AXES", "frames",
    "grid_of", "image_inputs", "image_spec", "patches", "picture_text", "positions", "rope_axes", "token_grid", "token_places",
    "vision_inputs",
]  # fmt: skip

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
KEEP_UNQUANTIZED = ["model.visual", "lm_head"]  # "visual" alone matches nothing (docs/decisions.md)
IMAGE_TOKEN = "<|image_pad|>"
LANGUAGE_MODEL = "language_model"  # what transformers calls it
POSITION_AXES = 3
PICTURE_TOKENS: tuple[str, ...] = ()  # others that `picture_text` writes


def image_spec(config: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    """The manifest's `image` block from a checkpoint's config.json and preprocessor_config.json."""
    size = preprocessor.get("size") or {}
    return {
        "patch": config["vision_config"]["patch_size"],
        "merge": config["vision_config"]["spatial_merge_size"],
        "temporal_patch": config["vision_config"].get("temporal_patch_size", 2),
        "mean": preprocessor["image_mean"],
        "std": preprocessor["image_std"],
        "min_pixels": preprocessor.get("min_pixels") or size["shortest_edge"],
        "max_pixels": preprocessor.get("max_pixels") or size["longest_edge"],
        "resample": "bicubic",
    }


def resized(height: int, width: int, spec: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels that a picture is resized to: multiples of patch * merge, area
    within the spec's limits.
    """
    factor = spec["patch"] * spec["merge"]
    h, w = (
        round(height / factor) * factor,
        round(width / factor) * factor,
    )  # 0 for a thin side: then below min_pixels, as in transformers
    if h * w > spec["max_pixels"]:
        beta = math.sqrt(height * width / spec["max_pixels"])
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif h * w < spec["min_pixels"]:
        beta = math.sqrt(spec["min_pixels"] / (height * width))
        h, w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return h, w


def grid_of(height: int, width: int, spec: dict[str, Any]) -> tuple[int, int]:
    """The grid of a picture of this size in pixels."""
    h, w = resized(height, width, spec)
    return h // spec["patch"], w // spec["patch"]


def frames(picture: Image.Image, spec: dict[str, Any]) -> tuple[list[Image.Image], tuple[int, int]]:
    """What the tower sees of an RGB picture, and its grid: the whole picture, resized."""
    height, width = resized(picture.height, picture.width, spec)
    return [picture.resize((width, height), Image.Resampling.BICUBIC)], grid_of(
        picture.height, picture.width, spec
    )


def patches(pixels: np.ndarray, values: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
    """Pixels (H, W, 3) uint8, H and W multiples of patch * merge -> (N, 3 * temporal * patch**2)
    float32; values (3, 256) float32: what each pixel becomes, by channel.
    """
    p, m, t = spec["patch"], spec["merge"], spec["temporal_patch"]
    gh, gw = pixels.shape[0] // p, pixels.shape[1] // p
    blocks = pixels.reshape(gh // m, m, p, gw // m, m, p, 3).transpose(
        0, 3, 1, 4, 6, 2, 5
    )  # (bh, bw, m, m, 3, p, p)
    blocks = np.ascontiguousarray(
        blocks
    )  # while they are bytes: as floats it takes three times as long
    out = np.empty((*blocks.shape[:5], t, p, p), np.float32)
    for c in range(3):
        out[:, :, :, :, c] = values[c].take(blocks[:, :, :, :, c])[
            :, :, :, :, None
        ]  # a still picture fills every temporal slot
    return out.reshape(gh * gw, 3 * t * p * p)


def rows_columns(grid: tuple[int, int], merge: int) -> np.ndarray:
    """Row and column (N, 2) of each patch of a picture, block by block."""
    gh, gw = grid
    rows, columns = np.meshgrid(np.arange(gh), np.arange(gw), indexing="ij")
    blocks = np.stack([rows, columns], -1).reshape(gh // merge, merge, gw // merge, merge, 2)
    return np.asarray(blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2))


VISION_AXES = {"position_ids": "patches", "image_id": "patches"}


def vision_inputs(grids: list[tuple[int, int]], spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the vision graph needs beside pixels, for pictures of `grids` (rows, columns in
    patches), one after another: row and column of each patch, position_ids (N, 2) int64, and in
    which picture it attends, image_id (N,) int64. VISION_AXES names their first axes.
    """
    positions = [rows_columns(grid, spec["merge"]) for grid in grids]
    return {
        "position_ids": np.concatenate(positions).astype(np.int64),
        "image_id": np.repeat(np.arange(len(grids)), [len(p) for p in positions]).astype(np.int64),
    }


def token_grid(grid: tuple[int, int], spec: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of visual tokens for a patch grid."""
    return grid[0] // spec["merge"], grid[1] // spec["merge"]


def token_places(grid: tuple[int, int], spec: dict[str, Any]) -> np.ndarray:
    """Where each token of the token grid (rows * columns,) stands among the visual tokens of its
    picture: there are no others.
    """
    return np.arange(math.prod(token_grid(grid, spec)))


def picture_text(grid: tuple[int, int], spec: dict[str, Any]) -> str:
    """What stands in the prompt for a picture."""
    return IMAGE_TOKEN * math.prod(token_grid(grid, spec))


def image_inputs(pixel_values: Any, grid_thw: Any, config: Any) -> dict[str, Any]:
    """Patches (N, C) and (1, rows, columns) of each picture -> what transformers'
    get_image_features takes.
    """
    return {"pixel_values": pixel_values, "image_grid_thw": grid_thw}


def positions(
    ids: np.ndarray, image_token: int, grids: list[tuple[int, int]], spec: dict[str, Any]
) -> np.ndarray:
    """mRoPE position ids (3, S) int64 of one prompt (S,): text counts on, a picture's tokens carry
    (start, row, column).

    The next position after the prompt is `positions.max() + 1` (transformers: get_rope_index).
    """
    out = np.zeros((3, len(ids)), np.int64)
    i = following = picture = 0
    while i < len(ids):
        if ids[i] == image_token:
            rows, columns = token_grid(grids[picture], spec)
            n = rows * columns
            out[0, i : i + n] = following
            out[1, i : i + n] = following + np.repeat(np.arange(rows), columns)
            out[2, i : i + n] = following + np.tile(np.arange(columns), rows)
            following += max(rows, columns)
            picture += 1
            i += n
        else:
            out[:, i] = following
            following += 1
            i += 1
    return out


def rope_axes(sections: list[int], frequencies: int) -> np.ndarray:
    """Which of time, row, column (0, 1, 2) each rotary frequency (head_dim / 2,) follows: one
    section after another.
    """
    assert sum(sections) == frequencies
    return np.repeat(np.arange(len(sections)) % 3, sections)
