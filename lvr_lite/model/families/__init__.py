"""One file per architecture, named after its `model_type`. May import: numpy, Pillow, errors."""

from __future__ import annotations

import importlib

from lvr_lite.errors import BundleError
from lvr_lite.model.families.base import Family, Grid, ImageSpec

__all__ = ["KNOWN", "Family", "Grid", "ImageSpec", "get"]

KNOWN = ("idefics3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm")


def get(model_type: str) -> Family:
    """The family of a `model_type`. Raises BundleError for one that is not supported."""
    if model_type not in KNOWN:
        raise BundleError(
            f"architecture {model_type!r} is not supported (supported: {', '.join(KNOWN)})"
        )
    family: Family = importlib.import_module(f"lvr_lite.model.families.{model_type}").FAMILY
    return family
