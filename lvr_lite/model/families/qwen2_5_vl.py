"""Qwen2.5-VL: most layers of the vision tower attend within windows. May import: numpy.

Checked against transformers in tests/families/test_families.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lvr_lite.model.families import qwen
from lvr_lite.model.families.qwen import *

MODEL_TYPE = "qwen2_5_vl"
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
VISION_AXES = {
    "position_ids": "patches",
    "window_index": "tokens",
    "reverse_index": "tokens",
    "window_id": "patches",
    "image_id": "patches",
}


def image_spec(config: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    return qwen.image_spec(config, preprocessor) | {
        "window": config["vision_config"]["window_size"]
    }


def vision_inputs(grids: list[tuple[int, int]], spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the vision graph needs beside pixels (`qwen.vision_inputs`), and the windows.

    window_index (N / merge**2,): visual tokens ordered window by window; reverse_index undoes it.
    window_id (N,), in window order, and image_id (N,): which window and picture a patch attends in.
    All int64.
    """
    m, unit = spec["merge"], spec["merge"] ** 2
    side = spec["window"] // m // spec["patch"]
    order, windows = [], []
    first_token = first_window = 0
    for gh, gw in grids:
        rows, columns = gh // m, gw // m
        token = np.arange(rows * columns).reshape(rows, columns)
        window = (np.arange(rows)[:, None] // side) * math.ceil(columns / side) + np.arange(
            columns
        )[None] // side
        by_window = np.argsort(window.ravel(), kind="stable")
        order.append(token.ravel()[by_window] + first_token)
        windows.append(np.repeat(window.ravel()[by_window], unit) + first_window)
        first_token += rows * columns
        first_window += int(window.max()) + 1
    window_index, whole = np.concatenate(order), qwen.vision_inputs(grids, spec)
    return {
        "position_ids": whole["position_ids"],
        "window_index": window_index.astype(np.int64),
        "reverse_index": np.argsort(window_index).astype(np.int64),
        "window_id": np.concatenate(windows).astype(np.int64),
        "image_id": whole["image_id"],
    }
