"""Peak memory of training, measured against the trace that `finetune --plan` is; weights are
random, nothing is downloaded.

A CUDA card, with the sizes of Qwen2.5-VL-3B and Qwen2-VL-2B. The JSON also has what CONTEXT, SLACK
and WORKSPACE of lvr_lite/train/memory.py stand for:

    python -m lvr_lite.bench.experiments.memory --out memory.json

The same code on a CPU, where tensors are counted as they are made; and the trace alone:

    python -m lvr_lite.bench.experiments.memory --shape tiny,quarter --device cpu --precision fp32
    python -m lvr_lite.bench.experiments.memory --trace

Measured is a step of training by phase, and on a card the answering of 16 held-out questions.
Shapes are 3b, 2b, quarter and tiny; lists have commas between.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from lvr_lite.bench.experiments import runner
from lvr_lite.bench.experiments.live_bytes import CardBytes, LiveBytes, model_tensors
from lvr_lite.bench.experiments.memory_model import build, config_of
from lvr_lite.bench.experiments.runner import header, launch, row, to_json, write_results
from lvr_lite.config import Settings, load_settings
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.train.load import adapted
from lvr_lite.train.memory import (
    MIB,
    Stepper,
    Trace,
    computed_in,
    trace_finetune,
    with_latents,
    with_pictures,
)

SIDE = 28


@dataclass(frozen=True)
class Case:
    """One row of the table. visual: tokens of a picture; checkpointing: "on" or "off"."""

    shape: str
    method: str
    visual: int
    batch: int
    checkpointing: str


@dataclass(frozen=True)
class Measured:
    """Bytes by phase of a step, traced and measured; None is not measured.

    reserved, context: of a card, see CardBytes.
    """

    traced: dict[str, int]
    saved: int
    measured: dict[str, int] | None = None
    reserved: int | None = None
    context: int | None = None

    @property
    def peaks(self) -> tuple[int, int | None]:
        """Of training, traced and measured."""
        phases = [name for name in self.traced if name not in ("loading", "evaluation")]
        traced = max(self.traced[name] for name in phases)
        if self.measured is None:
            return traced, None
        return traced, max(self.measured[name] for name in phases)


def checkpoint_of(shape: str, settings: Settings) -> Checkpoint:
    """A checkpoint of these sizes, with the embedded model's tokenizer, that exists nowhere."""
    tiny = read_checkpoint("tiny")
    checkpoint = replace(tiny, config=config_of(shape, None))
    return with_latents(with_pictures(checkpoint, settings), settings)


def measure(shape: str, settings: Settings, device: str) -> Measured:
    """A step, traced and really done."""
    checkpoint = checkpoint_of(shape, settings)
    trace = trace_finetune(checkpoint, settings, kernels(device))
    dtype = computed_in(settings)
    model = adapted(build(checkpoint.config, checkpoint, dtype, device), checkpoint, settings)
    if device == "cpu":
        with LiveBytes(model_tensors(model)) as counted:
            Stepper(model, checkpoint, settings, dtype, counted).finetune()
        return Measured(trace.phases, trace.saved, counted.peaks)
    card = CardBytes()
    stepper = Stepper(model, checkpoint, settings, dtype, card)
    stepper.finetune()
    stepper.evaluate()
    return Measured(trace.phases, trace.saved, card.peaks, card.reserved, card.context)


def kernels(device: str) -> tuple[torch.dtype, ...] | None:
    """Types in which a device's attention without a mask is flash attention; None for a card's."""
    return (torch.float32, torch.bfloat16) if device == "cpu" else None


def traced(shape: str, settings: Settings) -> Measured:
    trace: Trace = trace_finetune(checkpoint_of(shape, settings), settings)
    return Measured(trace.phases, trace.saved)


def cases(
    shapes: str, methods: str, visual: str, batch: str, overrides: list[str]
) -> Iterator[tuple[Case, Settings]]:
    product = itertools.product(
        shapes.split(","),
        methods.split(","),
        map(int, visual.split(",")),
        map(int, batch.split(",")),
        ("on", "off"),
    )
    for shape, method, tokens, rows, checkpointing in product:
        on = "true" if checkpointing == "on" else "false"
        settings = load_settings(
            None,
            [
                "train.accumulation=1",
                f"latent.method={method}",
                f"max_pixels={SIDE * SIDE * tokens}",
                f"train.batch={rows}",
                f"train.gradient_checkpointing={on}",
                *overrides,
            ],
        )
        yield Case(shape, method, tokens, rows, checkpointing), settings


TITLES = ("shape", "method", "visual tokens", "batch", "checkpointing", "traced MiB")
MEASURED_TITLES = ("measured MiB", "traced / measured")


def main(
    shape: str = "3b,2b",
    device: str = "cuda",
    precision: str = "bf16",
    visual: str = "256,512,1024",
    batch: str = "1,2",
    method: str = "lvr,lvr-bottleneck",
    settings: runner.Settings = None,
    only_trace: Annotated[bool, typer.Option("--trace")] = False,
    out: Path | None = None,
) -> None:
    warnings.filterwarnings("ignore")
    place = "trace alone" if only_trace else device
    print(f"{place}; torch {torch.__version__}; {precision}\n")
    print(header(list(TITLES if only_trace else TITLES + MEASURED_TITLES)))
    rows = []
    overrides = [f"train.precision={precision}", *(settings or [])]
    for case, chosen in cases(shape, method, visual, batch, overrides):
        found = traced(case.shape, chosen) if only_trace else measure(case.shape, chosen, device)
        rows.append(to_json(case) | to_json(found))
        trace, measured = found.peaks
        cells: list[object] = [*vars(case).values(), f"{trace / MIB:,.1f}"]
        if measured is not None:
            cells += [f"{measured / MIB:,.1f}", f"{trace / measured:.3f}"]
        print(row(cells), flush=True)
    if out is not None:
        write_results(out, {"device": place, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    launch(main, __doc__)
