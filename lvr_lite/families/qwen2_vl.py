"""Qwen2-VL: the vision tower attends within whole pictures. May import: numpy.

Checked against transformers in tests/families/test_families.py.
"""

from lvr_lite.families.qwen import (
    IMAGE_TOKEN,
    KEEP_UNQUANTIZED,
    LORA_TARGETS,
    VISION_AXES,
    image_spec,
    patches,
    positions,
    resized,
    rope_axes,
    token_grid,
    vision_inputs,
)

__all__ = [
    "ARCHITECTURE",
    "IMAGE_TOKEN",
    "KEEP_UNQUANTIZED",
    "LORA_TARGETS",
    "MODEL_TYPE",
    "VISION_AXES",
    "image_spec",
    "patches",
    "positions",
    "resized",
    "rope_axes",
    "token_grid",
    "vision_inputs",
]

MODEL_TYPE = "qwen2_vl"
ARCHITECTURE = "Qwen2VLForConditionalGeneration"
