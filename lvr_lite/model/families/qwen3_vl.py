"""Qwen3-VL: learned positions of patches, interleaved mRoPE, and features of the vision tower that
enter several decoder layers.

A visual token is (1 + D) * H wide: what stands in the prompt, then what is added after each of the
first D decoder layers (deepstack). May import: numpy. Checked against transformers in
tests/families/test_families.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lvr_lite.model.families import qwen
from lvr_lite.model.families.qwen import *
from lvr_lite.model.families.qwen import rows_columns

MODEL_TYPE = "qwen3_vl"
ARCHITECTURE = "Qwen3VLForConditionalGeneration"
VISION_AXES = qwen.VISION_AXES | {"near_ids": "patches", "near_weights": "patches"}


def image_spec(config: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    side = int(config["vision_config"]["num_position_embeddings"] ** 0.5)
    return qwen.image_spec(config, preprocessor) | {"position_side": side}


def vision_inputs(grids: list[tuple[int, int]], spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the vision graph needs beside pixels (`qwen.vision_inputs`), and for each patch the four
    learned positions that it lies between, near_ids (N, 4) int64, of a square of `position_side`,
    with their bilinear weights, near_weights (N, 4) float32.
    """
    side = spec["position_side"]
    ids, weights = [], []
    for grid in grids:
        at = rows_columns(grid, spec["merge"]).astype(np.float32)
        place = (
            at * np.float32(side - 1) / np.maximum(np.array(grid, np.float32) - 1, 1)
        )  # the corners on the corners
        low = np.floor(place)
        part = place - low
        taps = np.stack([low, np.minimum(low + 1, side - 1)], -1).astype(np.int64)  # (N, axis, 2)
        shares = np.stack([1 - part, part], -1)
        ids.append((taps[:, 0, :, None] * side + taps[:, 1, None]).reshape(-1, 4))
        weights.append((shares[:, 0, :, None] * shares[:, 1, None]).reshape(-1, 4))
    return qwen.vision_inputs(grids, spec) | {
        "near_ids": np.concatenate(ids),
        "near_weights": np.concatenate(weights).astype(np.float32),
    }


def rope_axes(sections: list[int], frequencies: int) -> np.ndarray:
    """Which of time, row, column (0, 1, 2) each rotary frequency (head_dim / 2,) follows: in turn,
    as far as row and column reach.
    """
    axes = np.zeros(frequencies, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes
