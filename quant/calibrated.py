"""int4 and mixed bundles, rounded for what flows through their weights on calibration prompts. May
import: onnx, numpy, torch, matplotlib and what stands above `quant`.

    source = Bundle.open(Path("bundles/first-fp32"))
    quantize_calibrated(source, Path("bundles/first-int4"), "int4", "scenes", print)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lvr_lite.errors import UsageError
from lvr_lite.files import scratch_folder
from lvr_lite.model.bundle import MANIFEST, Bundle
from lvr_lite.quant.calibration import Calibration
from lvr_lite.quant.quantize import check_source, quantize_bundle
from lvr_lite.quant.reports import QuantizationReport
from lvr_lite.quant.schemes import RoundingPlan, plan_of
from lvr_lite.quant.search import Search, write_mixed

# Budget of a mixed bundle, in bits a weight.
BITS = 5.0


def quantize_calibrated(
    source: Bundle,
    target: Path,
    precision: str,
    data: str,
    progress: Callable[[str], None],
    block: int | None = None,
    bits: float | None = None,
    steps: int | None = None,
) -> QuantizationReport:
    """Write an fp32 bundle to `target` with weights of 4 bits that are rounded with GPTQ; scales
    and norms are trained then.

    source: was opened with `check`.
    precision: "int4", or "mixed", where some weights of decoder, embedding and head have 8 bits.
    data: "scenes", or the path of a file of samples to calibrate on.
    progress: is told a line a stage.
    block: values that share a scale where weights have 4 bits.
    bits: of "mixed", a weight of decoder, embedding and head at most, scales included; None is 5.
    steps: of training; None takes the number for this size, 0 leaves it out.
    Returns what report.json says, and for "mixed" the seconds of everything. Raises UsageError for
    a budget below what 4 bits take, and as `quantize_bundle` does.
    """
    began = time.perf_counter()
    check_source(source, target, precision)
    plan = plan_of("int4", block)
    if data != "scenes" and not Path(data).is_file():
        none = ", or none" if precision == "int4" else ""
        raise UsageError(
            f"--calibration {data}: no such file; give scenes, a file of samples{none}"
        )
    with scratch_folder(target, MANIFEST) as scratch:
        calibration = Calibration.load(source, data, scratch, progress)
        if precision == "int4":
            return _write_int4(calibration, target, plan, steps)
        products = calibration.products()
        tuner = calibration.tuner(products, steps)
        search = Search(calibration, products, block)
        report = write_mixed(search, target, bits or BITS, tuner)
        return replace(report, search_seconds=round(time.perf_counter() - began, 1))


def _write_int4(
    calibration: Calibration,
    target: Path,
    plan: RoundingPlan,
    steps: int | None,
) -> QuantizationReport:
    calibration.progress(
        f"calibration: {len(calibration.prompts)} prompts (`--calibration none` goes without: "
        "faster, and worse)"
    )
    products = calibration.products()
    return quantize_bundle(
        calibration.source,
        target,
        "int4",
        calibration.progress,
        plan=replace(plan, products=products),
        tuner=calibration.tuner(products, steps),
    )
