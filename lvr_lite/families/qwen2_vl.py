"""Qwen2-VL: the vision tower attends within whole pictures. May import: numpy.

Checked against transformers in tests/families/test_families.py.
"""

from lvr_lite.families.qwen import (
    IMAGE_TOKEN,
    KEEP_UNQUANTIZED,
    LANGUAGE_MODEL,
    LORA_TARGETS,
    POSITION_AXES,
    VISION_AXES,
    frames,
    grid_of,
    image_inputs,
    image_spec,
    patches,
    picture_text,
    positions,
    rope_axes,
    token_grid,
    token_places,
    vision_inputs,
)

__all__ = [
    "ARCHITECTURE",
    "IMAGE_TOKEN",
    "KEEP_UNQUANTIZED",
    "LANGUAGE_MODEL",
    "LORA_TARGETS",
    "MODEL_TYPE",
    "POSITION_AXES",
    "VISION_AXES",
    "frames",
    "grid_of",
    "image_inputs",
    "image_spec",
    "patches",
    "picture_text",
    "positions",
    "rope_axes",
    "token_grid",
    "token_places",
    "vision_inputs",
]

MODEL_TYPE = "qwen2_vl"
ARCHITECTURE = "Qwen2VLForConditionalGeneration"
