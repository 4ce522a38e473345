"""Qwen3-VL: learned positions of patches, interleaved mRoPE, features for several decoder layers.

A visual token is (1 + D) * H wide: what stands in the prompt, then what is added after each of the
first D decoder layers (deepstack). May import: numpy, Pillow. Checked against transformers in
tests/model/test_families.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvr_lite.model.families.base import Grid, ImageSpec
from lvr_lite.model.families.qwen import QwenVL, rows_columns


class Qwen3VL(QwenVL):
    """`ImageSpec.own` holds position_side: the learned positions along one side of their square."""

    model_type = "qwen3_vl"
    architecture = "Qwen3VLForConditionalGeneration"
    vision_axes: Mapping[str, str] = QwenVL.vision_axes | {  # type: ignore[operator]
        "near_ids": "patches",
        "near_weights": "patches",
    }

    def _own(self, vision: Mapping[str, Any]) -> dict[str, int]:
        return {"position_side": int(vision["num_position_embeddings"] ** 0.5)}

    def deepstack(self, vision_config: Mapping[str, Any]) -> Sequence[int]:
        return list(vision_config["deepstack_visual_indexes"])

    def vision_inputs(self, grids: Sequence[Grid], image: ImageSpec) -> dict[str, np.ndarray]:
        """Beside those of `QwenVL`, of each patch:

        near_ids (N, 4) int64: the four learned positions that it lies between.
        near_weights (N, 4) float32: their bilinear weights.
        """
        side = image.own["position_side"]
        ids = []
        weights = []
        for grid in grids:
            at = rows_columns(grid, image.merge).astype(np.float32)
            # The corners of the picture lie on the corners of the square.
            steps = np.array(grid, np.float32) - 1
            steps = np.maximum(steps, 1)
            place = at * np.float32(side - 1) / steps
            low = np.floor(place)
            high = np.minimum(low + 1, side - 1)
            part = place - low
            # (N, axis, 2): the positions below and above, and their shares
            taps = np.stack([low, high], -1).astype(np.int64)
            shares = np.stack([1 - part, part], -1)
            # (N, 2, 2): rows below and above, columns below and above
            near = taps[:, 0, :, None] * side + taps[:, 1, None]
            weight = shares[:, 0, :, None] * shares[:, 1, None]
            ids.append(near.reshape(-1, 4))
            weights.append(weight.reshape(-1, 4))
        inputs = super().vision_inputs(grids, image)
        inputs["near_ids"] = np.concatenate(ids)
        inputs["near_weights"] = np.concatenate(weights).astype(np.float32)
        return inputs

    def rope_axes(self, sections: Sequence[int] | None, frequencies: int) -> np.ndarray:
        """Time, row and column take turns, as far as the sections of row and column reach."""
        assert sections is not None
        axes = np.zeros(frequencies, np.int64)
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = axis
        return axes


FAMILY = Qwen3VL()
