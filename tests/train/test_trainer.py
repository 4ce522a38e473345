"""What a machine computes in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lvr_lite.config import load_settings
from lvr_lite.errors import UsageError
from lvr_lite.train.device import training_dtype
from lvr_lite.train.trainer import training_arguments


@pytest.mark.parametrize(
    ("capability", "precision", "dtype"),
    [
        # RTX 20xx and T4: torch emulates bf16 there, and calls that supported.
        ((7, 5), "auto", torch.float16),
        ((8, 0), "auto", torch.bfloat16),
        ((8, 9), "auto", torch.bfloat16),
        ((7, 5), "bf16", torch.bfloat16),
        ((8, 9), "fp16", torch.float16),
        ((8, 9), "fp32", torch.float32),
    ],
)
def test_a_card_computes_in_what_it_is_made_for(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    precision: str,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    settings = load_settings(None, [f"train.precision={precision}"])
    assert training_dtype(settings, "cuda:0") == dtype


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_computes_in_bf16_or_fp32(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    wanted = torch.bfloat16 if fast else torch.float32
    assert training_dtype(load_settings(None), "cpu") == wanted


def test_fp16_without_a_card_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.precision=fp16 is for cards"):
        training_dtype(load_settings(None, ["train.precision=fp16"]), "cpu")


def test_fp16_is_trained_with_a_gradient_scaler(tmp_path: Path) -> None:
    """accelerate makes the scaler where transformers is told fp16."""
    settings = load_settings(None)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        arguments = training_arguments(tmp_path, settings, dtype, "cpu")
        assert (arguments.fp16, arguments.bf16) == (
            dtype == torch.float16,
            dtype == torch.bfloat16,
        )
