"""`lvr-lite export` and `quantize`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvr_lite.cli.options import JsonOut, write_json

if TYPE_CHECKING:
    from lvr_lite.commands.export import Written

Block = Annotated[
    int | None,
    typer.Option(
        help="Weights of 4 bits that share a scale, a power of two; 128 by default, 32 for mixed."
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        help="For mixed: bits a weight of decoder, embedding and head, scales included; 5 by "
        "default."
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="For int4 and mixed: scenes (drawn; the default), or a file of samples; none, for "
        "int4 alone."
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        metavar="N",
        help="The bundle shrinks pictures to this area in pixels; by default as the model was "
        "tuned, of a base model some 512 visual tokens.",
    ),
]
TuneSteps = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="For int4 and mixed: steps that train scales and norms after rounding; 0 for none. "
        "[96; 0 beyond 4 GiB]",
    ),
]


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A checkpoint's folder, `tiny`, or a hub id; BUNDLE, with --synthetic."
        ),
    ],
    bundle: Annotated[Path | None, typer.Argument(help="Folder to write.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="exact, fp32, int8, int4, mixed or fp16; for hf bf16, fp32 or fp16. "
            "[int8; bf16 for hf]"
        ),
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="hf",
            help="Write merged weights, tokenizer and processor files instead of graphs: a folder "
            "that transformers loads and other tools convert from.",
        ),
    ] = None,
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only",
            help="With --for hf: accept that a model tuned with a bottleneck answers without its "
            "latents there.",
        ),
    ] = False,
    max_pixels: MaxPixels = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            help="Random weights of a known model's shape, such as qwen2-vl-2b, instead of a "
            "checkpoint.",
        ),
    ] = None,
    block: Block = None,
    bits: Bits = None,
    calibration: Calibration = None,
    tune_steps: TuneSteps = None,
    json_: JsonOut = None,
) -> None:
    """Write a checkpoint as ONNX graphs cut at the latent loop, checked against torch; or, for hf,
    as a folder that transformers loads.

    Example: lvr-lite export tuned bundle --precision int8
    """
    from lvr_lite.commands.export import Rounding, export_hf, export_model, export_synthetic
    from lvr_lite.errors import UsageError

    began = time.time()
    if for_ not in (None, "hf"):
        raise UsageError(f"--for {for_}: must be hf, or left out for a bundle")
    if text_only and for_ is None:
        raise UsageError("--text-only is for --for hf; leave it out")
    if for_ is not None and synthetic is not None:
        raise UsageError("--synthetic writes a bundle; leave --for out")
    quantizing = {
        "--block": block,
        "--bits": bits,
        "--calibration": calibration,
        "--tune-steps": tune_steps,
    }
    for name, value in quantizing.items():
        if for_ is not None and value is not None:
            raise UsageError(f"{name}: nothing is quantized with --for hf; leave it out")
    rounding = Rounding(
        precision or ("bf16" if for_ else "int8"), block, bits, calibration, tune_steps
    )
    if synthetic is not None:
        if bundle is not None:
            raise UsageError("--synthetic takes no checkpoint; give the folder to write alone")
        written = export_synthetic(synthetic, checkpoint, rounding, max_pixels)
    elif bundle is None:
        raise UsageError(
            "export needs a checkpoint and the folder to write (or --synthetic SHAPE and the "
            "folder)"
        )
    elif for_ is not None:
        written = export_hf(checkpoint, bundle, rounding.precision, text_only, max_pixels)
    else:
        written = export_model(checkpoint, bundle, rounding, max_pixels)
    _say_done(written, began, json_)


def quantize(
    bundle: Annotated[Path, typer.Argument(help="An fp32 bundle.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    precision: Annotated[str, typer.Option(help="int8, int4, mixed or fp16.")] = "int8",
    block: Block = None,
    bits: Bits = None,
    calibration: Calibration = None,
    tune_steps: TuneSteps = None,
    json_: JsonOut = None,
) -> None:
    """Quantize the weights of an fp32 bundle, and say what was replaced and what was not.

    mixed gives each layer 4 or 8 bits under a budget, by what this costs in answers and latents on
    a calibration set.

    Example: lvr-lite quantize fp32 mixed --precision mixed --bits 4.8
    """
    from lvr_lite.commands import export

    began = time.time()
    rounding = export.Rounding(precision, block, bits, calibration, tune_steps)
    _say_done(export.quantize(bundle, target, rounding), began, json_)


def _say_done(written: Written, began: float, json_: Path | None) -> None:
    from lvr_lite.system import peak_rss_mb
    from lvr_lite.terminal import say

    say(
        f"{written.bundle}: written and checked in {time.time() - began:.0f} s, "
        f"peak memory {(peak_rss_mb() or 0) / 1024:.1f} GiB"
    )
    write_json(json_, written.to_json())
