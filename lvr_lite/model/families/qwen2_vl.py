"""Qwen2-VL: the vision tower attends within whole pictures. May import: numpy, Pillow.

Checked against transformers in tests/model/test_families.py.
"""

from lvr_lite.model.families.qwen import QwenVL


class Qwen2VL(QwenVL):
    model_type = "qwen2_vl"
    architecture = "Qwen2VLForConditionalGeneration"


FAMILY = Qwen2VL()
