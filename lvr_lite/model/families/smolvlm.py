"""SmolVLM: square tiles of a picture, then the whole picture as one more, each seen by itself;
positions that count on. May import: numpy, Pillow.

A grid is (rows, columns) of tiles, (0, 0) for a picture that is one tile. Boxes select among the
tiles' visual tokens; those of the whole picture, which come last, are never a target. Checked
against transformers in tests/families/test_families.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from lvr_lite.model.families.qwen import patches, rows_columns  # noqa: F401 (patches are cut alike)

MODEL_TYPE = "smolvlm"
ARCHITECTURE = "SmolVLMForConditionalGeneration"
LANGUAGE_MODEL = "text_model"
LORA_TARGETS = r".*text_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
KEEP_UNQUANTIZED = ["model.vision_model", "model.connector", "lm_head"]
IMAGE_TOKEN = "<image>"
POSITION_AXES = 1
PICTURE_TOKENS = (
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
)
VISION_AXES: dict[str, str] = {}
LARGEST = 4096  # pixels of a side, whatever the settings say (transformers)


def image_spec(config: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    """The manifest's `image` block from a checkpoint's config.json and preprocessor_config.json."""
    longest = (preprocessor.get("size") or {}).get("longest_edge", 4 * 364)
    return {
        "patch": config["vision_config"]["patch_size"],
        "merge": config.get("scale_factor", 2),
        "temporal_patch": 1,
        "tile": (preprocessor.get("max_image_size") or {}).get("longest_edge", 364),
        "longest": longest,
        "split": bool(preprocessor.get("do_image_splitting", True)),
        "mean": preprocessor["image_mean"],
        "std": preprocessor["image_std"],
        "min_pixels": 1,
        "max_pixels": preprocessor.get("max_pixels") or longest**2,
        "resample": "lanczos",
    }


def _sizes(
    height: int, width: int, spec: dict[str, Any]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) after the first resizing, which sets the longer side, and after the second,
    which makes both multiples of a tile.
    """
    longest = min(
        spec["longest"],
        int(math.sqrt(spec["max_pixels"] * max(height, width) / min(height, width))),
        LARGEST,
    )
    ratio, tile = width / height, spec["tile"]
    if width >= height:
        w, h = longest, int(longest / ratio)
        h += h % 2
    else:
        h, w = longest, int(longest * ratio)
        w += w % 2
    h, w = max(h, 1), max(w, 1)
    ratio = w / h
    if w >= h:
        wide = math.ceil(w / tile) * tile
        return (h, w), (math.ceil(int(wide / ratio) / tile) * tile, wide)
    tall = math.ceil(h / tile) * tile
    return (h, w), (tall, math.ceil(int(tall * ratio) / tile) * tile)


def grid_of(height: int, width: int, spec: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of tiles of a picture of this size in pixels; (0, 0) for one tile."""
    _, (h, w) = _sizes(height, width, spec)
    rows, columns = h // spec["tile"], w // spec["tile"]
    return (rows, columns) if spec["split"] and rows * columns > 1 else (0, 0)


def frames(picture: Image.Image, spec: dict[str, Any]) -> tuple[list[Image.Image], tuple[int, int]]:
    """What the tower sees of an RGB picture, and its grid: its tiles in reading order, then the
    whole of it at the size of a tile.
    """
    first, second = _sizes(picture.height, picture.width, spec)
    tile, (rows, columns) = spec["tile"], grid_of(picture.height, picture.width, spec)
    picture = picture.resize(first[::-1], Image.Resampling.LANCZOS)
    if spec["split"]:
        picture = picture.resize(second[::-1], Image.Resampling.LANCZOS)
    corners = [(c * tile, r * tile) for r in range(rows) for c in range(columns)]
    tiles = [picture.crop((x, y, x + tile, y + tile)) for x, y in corners]
    return [*tiles, picture.resize((tile, tile), Image.Resampling.LANCZOS)], (rows, columns)


def _side(spec: dict[str, Any]) -> int:
    """Visual tokens along a tile."""
    return int(spec["tile"] // spec["patch"] // spec["merge"])


def vision_inputs(grids: list[tuple[int, int]], spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """Nothing: all tiles are alike."""
    return {}


def learned_places(side: int, merge: int) -> np.ndarray:
    """Which learned position each of side**2 patches of a tile has, in blocks of merge x merge:
    transformers finds it by comparing fractions in float32, whose rounding is part of the model
    where 1 / side is not exact.
    """
    edges = (1 / side + np.arange(side - 1) * (1 / side)).astype(np.float32)
    fractions = np.minimum(
        np.arange(side, dtype=np.float32) * np.float32(1 / side), np.float32(1 - 1e-6)
    )
    bucket = np.searchsorted(edges, fractions, side="right")
    at = rows_columns((side, side), merge)
    return np.asarray(bucket[at[:, 0]] * side + bucket[at[:, 1]], np.int64)


def token_grid(grid: tuple[int, int], spec: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of the visual tokens that boxes select among: those of all tiles
    together.
    """
    return max(1, grid[0]) * _side(spec), max(1, grid[1]) * _side(spec)


def token_places(grid: tuple[int, int], spec: dict[str, Any]) -> np.ndarray:
    """Where each token of the token grid (rows * columns,) stands among the visual tokens of its
    picture: tile by tile.
    """
    side = _side(spec)
    tiles = np.arange(max(1, grid[0] * grid[1]) * side**2).reshape(
        max(1, grid[0]), max(1, grid[1]), side, side
    )
    return np.asarray(tiles.transpose(0, 2, 1, 3).ravel())


def picture_text(grid: tuple[int, int], spec: dict[str, Any]) -> str:
    """What stands in the prompt for a picture."""
    around, seen = "<fake_token_around_image>", IMAGE_TOKEN * _side(spec) ** 2
    whole = f"{around}<global-img>{seen}{around}"
    rows, columns = grid
    if rows == 0:
        return whole
    lines = [
        "".join(f"{around}<row_{r + 1}_col_{c + 1}>{seen}" for c in range(columns)) + "\n"
        for r in range(rows)
    ]
    return "".join(lines) + "\n" + whole


def positions(
    ids: np.ndarray, image_token: int, grids: list[tuple[int, int]], spec: dict[str, Any]
) -> np.ndarray:
    """Position ids (3, S) int64 of one prompt (S,): they count on, the same on every axis."""
    return np.tile(np.arange(len(ids), dtype=np.int64), (3, 1))


def rope_axes(sections: list[int] | None, frequencies: int) -> np.ndarray:
    return np.zeros(frequencies, np.int64)


def image_inputs(pixel_values: Any, grid_thw: Any, config: Any) -> dict[str, Any]:
    """Patches (N, C), an array of numpy or torch -> what transformers' get_image_features takes:
    tiles (1, N / P, 3, side, side).
    """
    merge, patch = config.scale_factor, config.vision_config.patch_size
    blocks = config.vision_config.image_size // patch // merge
    x = pixel_values.reshape(-1, blocks, blocks, merge, merge, 3, patch, patch)
    x = (
        x.swapaxes(1, 5).swapaxes(2, 5).swapaxes(4, 6)
    )  # (tiles, 3, blocks, merge, patch, blocks, merge, patch)
    side = blocks * merge * patch
    return {"pixel_values": x.reshape(1, -1, 3, side, side)}
