"""How weights are to be written: what is refused, and what reaches the quantization."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lvr_lite import Rounding, quantize
from lvr_lite.errors import UsageError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp32", "block": 32}, "--block is for weights of 4 bits, which --prec"),
        ({"precision": "int8", "calibration": "scenes"}, "--calibration is for weights of 4 bits"),
        ({"precision": "fp16", "tune_steps": 0}, "--tune-steps is for weights of 4 bits"),
        (
            {"precision": "int4", "calibration": "none", "tune_steps": 5},
            "--tune-steps trains on what --calibration gives",
        ),
        ({"precision": "int4", "bits": 5.0}, "--bits is the budget of --precision mixed, not of"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Rounding(**options)


@pytest.mark.parametrize(
    ("rounding", "kind"),
    [
        (Rounding("mixed", 32, 4.8, "set.jsonl", 7), "calibrated"),
        (Rounding("int4"), "calibrated"),
        (Rounding("int4", 32, calibration="none"), "whole"),
        (Rounding("int8"), "whole"),
    ],
)
def test_every_option_reaches_the_quantization(
    monkeypatch: pytest.MonkeyPatch, rounding: Rounding, kind: str
) -> None:
    calls: dict[str, tuple[Any, ...]] = {}
    report = SimpleNamespace(to_json=dict)

    def calibrated(*arguments: Any) -> SimpleNamespace:
        source, target, precision, data, _, *rest = arguments
        calls["calibrated"] = (source, target, precision, data, *rest)
        return report

    def whole(*arguments: Any) -> SimpleNamespace:
        source, target, precision, _, block = arguments
        calls["whole"] = (source, target, precision, block)
        return report

    monkeypatch.setattr("lvr_lite.commands.export.Bundle.open", lambda folder: folder)
    monkeypatch.setattr("lvr_lite.quant.calibrated.quantize_calibrated", calibrated)
    monkeypatch.setattr("lvr_lite.quant.quantize.quantize_bundle", whole)
    quantize("fp32", "out", rounding)
    r = rounding
    options: tuple[Any, ...] = (r.block,)
    if kind == "calibrated":
        options = (r.calibration or "scenes", r.block, r.bits, r.tune_steps)
    assert calls == {kind: (Path("fp32"), Path("out"), r.precision, *options)}
