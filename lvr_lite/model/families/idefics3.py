"""Idefics3: what SmolVLM's first models (256M, 500M, 2.2B) call themselves; SmolVLM renamed.

May import: numpy, Pillow. Checked against transformers in tests/model/test_families.py.
"""

from lvr_lite.model.families.smolvlm import SmolVLM


class Idefics3(SmolVLM):
    model_type = "idefics3"
    architecture = "Idefics3ForConditionalGeneration"


FAMILY = Idefics3()
