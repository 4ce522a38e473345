"""One file per architecture, found by its `model_type`. May import: the core."""

from __future__ import annotations

import importlib
from typing import Any

from lvr_lite.errors import BundleError

KNOWN = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm")


def get(model_type: str) -> Any:
    """The family module of a `model_type`. Raises BundleError for one that is not supported."""
    if model_type not in KNOWN:
        raise BundleError(
            f"architecture {model_type!r} is not supported (supported: {', '.join(KNOWN)})"
        )
    return importlib.import_module(f"lvr_lite.model.families.{model_type}")
