"""Qwen2.5-VL: most layers of the vision tower attend within windows. May import: numpy, Pillow.

Checked against transformers in tests/model/test_families.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvr_lite.model.families.base import Grid, ImageSpec
from lvr_lite.model.families.qwen import QwenVL


class Qwen25VL(QwenVL):
    """`ImageSpec.own` holds window: the side of a window, pixels."""

    model_type = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"
    vision_axes: Mapping[str, str] = {
        "position_ids": "patches",
        "window_index": "tokens",
        "reverse_index": "tokens",
        "window_id": "patches",
        "image_id": "patches",
    }

    def _own(self, vision: Mapping[str, Any]) -> dict[str, int]:
        return {"window": vision["window_size"]}

    def vision_inputs(self, grids: Sequence[Grid], image: ImageSpec) -> dict[str, np.ndarray]:
        """Beside those of `QwenVL`, all int64:

        window_index (N / merge**2,): visual tokens ordered window by window.
        reverse_index (N / merge**2,): undoes that order.
        window_id (N,): the window in which a patch attends, in window order.
        """
        side = image.own["window"] // image.merge // image.patch
        order = []
        windows = []
        first_token = 0
        first_window = 0
        for grid in grids:
            rows, columns = self.token_grid(grid, image)
            window_row = np.arange(rows)[:, None] // side
            window_column = np.arange(columns)[None] // side
            window = (window_row * math.ceil(columns / side) + window_column).ravel()
            by_window = np.argsort(window, kind="stable")
            order.append(by_window + first_token)
            windows.append(np.repeat(window[by_window], image.merge**2) + first_window)
            first_token += rows * columns
            first_window += int(window.max()) + 1
        window_index = np.concatenate(order)
        whole = super().vision_inputs(grids, image)
        return {
            "position_ids": whole["position_ids"],
            "window_index": window_index.astype(np.int64),
            "reverse_index": np.argsort(window_index).astype(np.int64),
            "window_id": np.concatenate(windows).astype(np.int64),
            "image_id": whole["image_id"],
        }


FAMILY = Qwen25VL()
