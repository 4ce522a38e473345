"""Qwen2-VL: the vision tower attends within whole pictures. May import: numpy.

Checked against transformers in tests/families/test_families.py.
"""

from lvr_lite.model.families.qwen import *

MODEL_TYPE = "qwen2_vl"
ARCHITECTURE = "Qwen2VLForConditionalGeneration"
