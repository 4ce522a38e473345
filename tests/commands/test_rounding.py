"""How weights are to be written: what is refused, and what reaches the quantization."""

from __future__ import annotations

from pathlib import Path
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
    calls = {}
    monkeypatch.setattr(
        "lvr_lite.quant.search.quantize_calibrated",
        lambda source, target, precision, data, _, block, bits, steps: calls.update(
            calibrated=(source, target, precision, block, bits, data, steps)
        ),
    )
    monkeypatch.setattr(
        "lvr_lite.quant.quantize.quantize_bundle",
        lambda source, target, precision, _, block: calls.update(
            whole=(source, target, precision, block)
        ),
    )
    quantize("fp32", "out", rounding)
    r = rounding
    rest = (r.bits or 5.0, r.calibration or "scenes", r.tune_steps) if kind == "calibrated" else ()
    assert calls == {kind: (Path("fp32"), Path("out"), r.precision, r.block, *rest)}
