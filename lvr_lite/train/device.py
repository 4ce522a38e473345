"""What a model is trained on, and in which type.

May import: torch and what stands above `train`.
"""

from __future__ import annotations

import os

import torch

from lvr_lite.config import Settings
from lvr_lite.errors import UsageError
from lvr_lite.system import peak_rss_mb


def local_rank() -> int:
    """The number of this process among those of its machine that train together."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def training_device() -> str:
    """The GPU of this process, or "cpu"."""
    return f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"


def computes_in_bf16(device: str) -> bool:
    """Whether bf16 is the machine's fast type: cards from compute capability 8.0 on (older ones
    emulate it, and torch calls that supported), and CPUs with AVX512_BF16 or AMX.
    """
    if device.startswith("cuda"):
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    return bool(torch.cpu._is_avx512_bf16_supported())


def training_dtype(settings: Settings, device: str) -> torch.dtype:
    """What the base is held in and computed with. "auto" takes bf16 where it is the machine's fast
    type, else fp16 on a card and fp32 on a CPU.

    Raises UsageError for fp16 on a CPU.
    """
    on_card = device.startswith("cuda")
    precision: str = settings.train.precision
    if precision == "fp16" and not on_card:
        raise UsageError(
            "train.precision=fp16 is for cards, and no card is used here; set bf16, fp32 or auto"
        )
    if precision == "auto":
        fallback = "fp16" if on_card else "fp32"
        precision = "bf16" if computes_in_bf16(device) else fallback
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def peak_gb(device: str) -> float:
    """Peak memory in GiB: of the card's tensors, or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return (peak_rss_mb() or 0.0) / 2**10
