"""Short runs of fine-tuning on a small random model, for tests of several files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvr_lite.config import Settings, load_settings
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.train.finetune import finetune
from tests.short_run import SHORT_RUN

TINY_RUN = [
    *SHORT_RUN,
    "train.steps=4",
    "train.eval_every=4",
    "train.lr=1e-3",
    "data.count=16",
]


def settings(*more: str) -> Settings:
    return load_settings(None, [*TINY_RUN, *more])


def tune(
    base: Path, out: Path, *more: str, data: str = "scenes", **options: Any
) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    checkpoint = read_checkpoint(base)
    return finetune(checkpoint, data, out, settings(*more), say=lines.append, **options), lines


def losses(metrics: dict[str, Any]) -> dict[int, float]:
    return {h["step"]: h["loss"] for h in metrics["history"] if "loss" in h}
