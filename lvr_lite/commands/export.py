"""`lvr-lite export` and `quantize`: from a checkpoint to a bundle, or to a folder that other tools
read; from fp32 weights to fewer bits.
May import: the standard library and all that stands above `commands`; what needs torch or onnx
inside functions.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lvr_lite.errors import UsageError
from lvr_lite.files import JsonObject, check_free_space, fresh_folder, move_up
from lvr_lite.model.bundle import MANIFEST, Bundle
from lvr_lite.model.checkpoint import Checkpoint, check_max_pixels, read_checkpoint
from lvr_lite.terminal import quiet_libraries, say

PRECISIONS = ("exact", "fp32", "int8", "int4", "mixed", "fp16")
SYNTHETIC = ("fp32", "int8", "int4", "fp16")
FOUR_BITS = ("int4", "mixed")
# Of a folder that other tools read. Models are published in bf16.
HF_PRECISIONS = ("bf16", "fp32", "fp16")


@dataclass(frozen=True)
class Rounding:
    """How weights are written. Raises UsageError for an option that would do nothing.

    precision: exact (as trained), fp32, int8, int4, mixed (4 or 8 bits a layer) or fp16.
    block: weights of 4 bits that share a scale, a power of two; 128 by default, 32 for mixed.
    bits: of mixed, the budget in bits a weight of decoder, embedding and head, scales included; 5
        by default.
    calibration: of int4 and mixed, what they are rounded for: "scenes" (the default) or a file of
        samples; "none" for int4 alone.
    tune_steps: of int4 and mixed, steps that train scales and norms after rounding; by default 96,
        and 0 beyond 4 GiB.
    """

    precision: str = "int8"
    block: int | None = None
    bits: float | None = None
    calibration: str | None = None
    tune_steps: int | None = None

    def __post_init__(self) -> None:
        of_four_bits = {
            "--block": self.block,
            "--calibration": self.calibration,
            "--tune-steps": self.tune_steps,
        }
        for flag, value in of_four_bits.items():
            if value is not None and self.precision not in FOUR_BITS:
                raise UsageError(
                    f"{flag} is for weights of 4 bits, which --precision {self.precision} has none "
                    "of; leave it out"
                )
        if self.calibration == "none" and self.tune_steps:
            raise UsageError(
                "--tune-steps trains on what --calibration gives, which is none here; leave one of "
                "them out"
            )
        if self.bits is not None and self.precision != "mixed":
            raise UsageError(
                f"--bits is the budget of --precision mixed, not of {self.precision}; leave it out"
            )


@dataclass(frozen=True)
class Written:
    """A bundle, or a folder of `export_hf`, that was written and checked.

    command: "export" or "quantize".
    report: what was measured on the way: parity with torch, or what quantization did.
    """

    command: str
    bundle: Path
    precision: str
    report: JsonObject

    def to_json(self) -> JsonObject:
        own = {"bundle": str(self.bundle), "precision": self.precision}
        return {"schema": f"lvr-lite/{self.command}", "version": 1} | own | self.report


def export_model(
    checkpoint: str | Path,
    bundle: str | Path,
    rounding: Rounding | None = None,
    max_pixels: int | None = None,
) -> Written:
    """Write a checkpoint as ONNX graphs cut at the latent loop, checked against torch.

    checkpoint: a folder, `tiny`, or a hub id.
    bundle: the folder to write; an earlier bundle there is replaced.
    max_pixels: area that the bundle shrinks pictures to; by default as the model was tuned, and of
        a base model what is usual for its family.

    Raises LvrError where a graph is not torch's equal, OutputError where `bundle` cannot be
    written; then nothing is left of it, and an earlier bundle stays as it was.
    """
    rounding = rounding or Rounding()
    precision = _known(rounding.precision)
    quiet_libraries()
    from lvr_lite.export.write import write_bundle
    from lvr_lite.train import load
    from lvr_lite.train.trained_weights import TrainedWeights

    read = _with_picture_size(read_checkpoint(checkpoint), max_pixels)
    target = Path(bundle)
    if precision == "exact":
        return Written("export", target, precision, {"parity": _write_exact(read, target)})
    weights = TrainedWeights(read)
    reference = partial(load.load_merged, read)
    if precision == "fp32":
        parity = write_bundle(read, weights, target, say, reference).manifest.parity
        return Written("export", target, precision, {"parity": parity})
    # In float32 first, then quantized beside it.
    bytes_a_weight = 6.5 if precision == "fp16" else 5.5
    parameters = sum(p.numel() for p in weights.model.parameters())
    check_free_space(target, int(parameters * bytes_a_weight))
    # All that is made on the way lies in one folder, which a killed run leaves to be swept.
    with fresh_folder(target, MANIFEST) as staged:
        fp32 = write_bundle(read, weights, staged / "fp32", say, reference)
        report = _quantize(fp32, staged / "quantized", rounding)
        shutil.rmtree(fp32.folder)
        move_up(staged / "quantized")
    return Written("export", target, precision, report)


def _with_picture_size(checkpoint: Checkpoint, max_pixels: int | None) -> Checkpoint:
    """The checkpoint with the size of pictures that its bundle will have, which is said."""
    check_max_pixels(str(checkpoint.folder), max_pixels)
    processor = checkpoint.processor
    usual = processor.image.max_pixels if checkpoint.adapter else processor.default_max_pixels
    processor = processor.with_max_pixels(max_pixels or usual)
    say(processor.size_in_words + " (--max-pixels)")
    return replace(checkpoint, processor=processor)


def export_hf(
    checkpoint: str | Path,
    folder: str | Path,
    precision: str = "bf16",
    text_only: bool = False,
    max_pixels: int | None = None,
) -> Written:
    """Write a checkpoint as merged weights with tokenizer, template and processor files, which
    transformers loads without this project and other tools convert from (docs/export.md).

    checkpoint: a folder, `tiny`, or a hub id.
    folder: to write; an earlier one of this function there is replaced.
    precision: bf16, fp32 or fp16.
    text_only: accept that a model tuned with a bottleneck answers without its latents there.
    max_pixels: area to which readers of the folder shrink pictures.

    Raises UsageError for another precision, and unless `text_only` is given for a model with a
    bottleneck and for no other;
    LvrError where transformers answers otherwise than the decode loop; OutputError where `folder`
    cannot be written. Then nothing is left of it, and an earlier folder stays as it was.
    """
    if precision not in HF_PRECISIONS:
        raise UsageError(
            f"--precision {precision}: a folder for hf holds {', '.join(HF_PRECISIONS[:-1])} or "
            f"{HF_PRECISIONS[-1]}; tools that read it quantize by themselves"
        )
    read = read_checkpoint(checkpoint)
    bottleneck = read.latent.steps > 0 and read.latent.mode == "bottleneck"
    if text_only and not bottleneck:
        raise UsageError(f"--text-only: {checkpoint} was not tuned with a bottleneck; leave it out")
    if bottleneck and not text_only:
        raise UsageError(
            f"{checkpoint}: was tuned to answer from its latents alone (a bottleneck), which no "
            "runtime of such folders computes; --text-only writes it as a model that answers "
            "from the picture, in text alone"
        )
    read = _with_picture_size(read, max_pixels)
    quiet_libraries()
    from lvr_lite.export.hf import lost, write_hf
    from lvr_lite.train import load

    for sentence in lost(read):
        say(f"lost: {sentence}")
    record = write_hf(read, load.load_merged(read), Path(folder), precision, say)
    return Written("export", Path(folder), precision, record)


def export_synthetic(
    shape: str,
    bundle: str | Path,
    rounding: Rounding | None = None,
    max_pixels: int | None = None,
) -> Written:
    """Write random weights of a known model's shape, such as qwen2-vl-2b, as a bundle: for size and
    speed. Nothing is compared with torch.
    """
    rounding = rounding or Rounding()
    precision = _known(rounding.precision)
    if rounding.calibration is not None:
        raise UsageError(
            "--calibration: random weights have nothing to be calibrated for; leave it out"
        )
    if rounding.tune_steps is not None:
        raise UsageError(
            "--tune-steps: random weights have nothing to be trained for; leave it out"
        )
    quiet_libraries()
    from lvr_lite.export.synthetic import SyntheticWeights, shape_of
    from lvr_lite.export.write import write_bundle
    from lvr_lite.quant.form import check_form
    from lvr_lite.quant.quantize import Converter
    from lvr_lite.quant.schemes import plan_of

    checkpoint = shape_of(shape)
    # Its own size is the one that published figures were measured at.
    own = checkpoint.processor.image.max_pixels
    checkpoint = _with_picture_size(checkpoint, max_pixels or own)
    if precision not in SYNTHETIC:
        raise UsageError(
            f"--synthetic writes {', '.join(SYNTHETIC[:-1])} or {SYNTHETIC[-1]}, not {precision}: "
            "random weights have nothing to search or to keep"
        )
    plan = plan_of(precision, rounding.block) if precision.startswith("int") else None
    written = write_bundle(
        checkpoint,
        SyntheticWeights(checkpoint),
        Path(bundle),
        say,
        precision=precision,
        convert=None if precision == "fp32" else Converter(plan),
        source={"synthetic": shape, "base": shape, "adapter": False},
    )
    check_form(written)
    sizes = {name: graph.bytes for name, graph in written.manifest.graphs.items()}
    return Written("export", Path(bundle), precision, {"bytes": sizes})


def quantize(source: str | Path, target: str | Path, rounding: Rounding | None = None) -> Written:
    """Write the fp32 bundle `source` with fewer bits a weight to `target`.

    Raises UsageError for a precision or a budget that cannot be written, BundleError where `source`
    is no fp32 bundle.
    """
    rounding = rounding or Rounding()
    from lvr_lite.quant.quantize import check_precision

    check_precision(rounding.precision)
    report = _quantize(Bundle.open(Path(source)), Path(target), rounding)
    return Written("quantize", Path(target), rounding.precision, report)


def _quantize(source: Bundle, target: Path, rounding: Rounding) -> JsonObject:
    """report.json of the bundle that was written."""
    from lvr_lite.quant.calibrated import quantize_calibrated
    from lvr_lite.quant.quantize import quantize_bundle

    precision = rounding.precision
    data = rounding.calibration or "scenes"
    if precision == "mixed" or (precision == "int4" and data != "none"):
        return quantize_calibrated(
            source,
            target,
            precision,
            data,
            say,
            rounding.block,
            rounding.bits,
            rounding.tune_steps,
        ).to_json()
    return quantize_bundle(source, target, precision, say, rounding.block).to_json()


def _write_exact(checkpoint: Checkpoint, target: Path) -> JsonObject:
    """The base's own 4 bits, with the adapter beside them; returns the parity with torch."""
    import torch

    from lvr_lite.export.write import write_bundle
    from lvr_lite.quant.exact import ExactConvert
    from lvr_lite.train import load
    from lvr_lite.train.trained_weights import TrainedWeights

    weights = TrainedWeights(checkpoint, unmerged=True)
    reference = partial(load.load_trained, checkpoint, torch.float32)
    convert = ExactConvert(weights)
    return write_bundle(
        checkpoint, weights, target, say, reference, "exact", convert
    ).manifest.parity


def _known(precision: str) -> str:
    if precision not in PRECISIONS:
        raise UsageError(
            f"--precision {precision}: must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        )
    return precision
