"""Peak memory of training against what `finetune --plan` predicts, on random weights of real sizes;
nothing is downloaded.

A CUDA card, with the sizes of Qwen2.5-VL-3B and Qwen2-VL-2B; then what it will be held against:

    python -m lvr_lite.bench.experiments.memory --out memory.json
    python -m lvr_lite.bench.experiments.memory --predict

The same code on a CPU, tensors counted as they are made; real widths with few layers:

    python -m lvr_lite.bench.experiments.memory --shape tiny --device cpu
    python -m lvr_lite.bench.experiments.memory --shape 3b --layers 2 --device cpu

Measured are training steps through the collator, LatentSFT and the optimizer of the settings, and
answering 16 held-out questions (--answering, and always on a card). Shapes are 3b, 2b, quarter and
tiny; --layers are of both towers; --visual is of tokens; lists have commas between.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from lvr_lite.bench.experiments import runner
from lvr_lite.bench.experiments.live_bytes import Peak, Saved, metered
from lvr_lite.bench.experiments.memory_model import build, config_of, make_optimizer
from lvr_lite.bench.experiments.runner import (
    JsonObject,
    header,
    launch,
    row,
    to_json,
    write_results,
)
from lvr_lite.config import Settings, load_settings
from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item
from lvr_lite.eval.suite import accuracy_on
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.train import memory as plan
from lvr_lite.train.batches import Collator
from lvr_lite.train.load import adapted
from lvr_lite.train.methods import Batch
from lvr_lite.train.sft import LatentSFT

ANSWERING = "answering held-out questions"
# Visual tokens: rows and columns of a picture.
SIDES = {
    64: (8, 8),
    256: (16, 16),
    512: (16, 32),
    1024: (32, 32),
    2048: (32, 64),
}


@dataclass(frozen=True)
class Options:
    """What to measure, on what. overrides: settings as of `finetune`."""

    layers: int | None
    device: str
    precision: str
    visual: list[int]
    batch: list[int]
    method: list[str]
    answering: bool
    overrides: list[str]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def settings(self, *more: str) -> Settings:
        precision = f"train.precision={self.precision}"
        return load_settings(None, [precision, "train.accumulation=1", *self.overrides, *more])


@dataclass(frozen=True)
class Case:
    """One row of the table: a method of training, or "answering". visual: tokens of a picture.
    checkpointing: "on", "off" or "".
    """

    settings: Settings
    method: str
    visual: int
    batch: int
    checkpointing: str


@dataclass(frozen=True)
class Prediction:
    """Of the plan, in bytes. phase: of the step, where the peak is. saved: what autograd holds
    between forward and backward; None where it is not asked for.
    """

    peak: int
    phase: str
    saved: int | None = None


@dataclass(frozen=True)
class Measured:
    """Bytes but for `seconds` (of a step, or of all answers) and the ratios (predicted over
    measured). None is not measured.

    predicted, saved_predicted, phase: of the prediction.
    peak: of live tensors. saved: what autograd holds between forward and backward.
    reserved, context: see live_bytes.Peak.
    """

    phase: str
    predicted: int | None = None
    peak: int | None = None
    ratio: float | None = None
    saved: int | None = None
    saved_predicted: int | None = None
    saved_ratio: float | None = None
    seconds: float | None = None
    reserved: int | None = None
    context: int | None = None

    @classmethod
    def of(
        cls, prediction: Prediction, peak: Peak, seconds: float, saved: int | None = None
    ) -> Measured:
        saved_ratio = prediction.saved / saved if prediction.saved and saved else None
        return cls(
            phase=prediction.phase,
            predicted=prediction.peak,
            peak=peak.live,
            ratio=prediction.peak / peak.live,
            saved=saved,
            saved_predicted=prediction.saved,
            saved_ratio=saved_ratio,
            seconds=seconds,
            reserved=peak.reserved,
            context=peak.context,
        )


def items_of(visual: int, count: int) -> list[Item]:
    """Questions about pictures of exactly so many visual tokens; they differ in length, as real
    ones do, so that batches are padded, and in their pictures, since rows that read the same are
    read once.
    """
    rows, columns = SIDES[visual]
    noise = np.random.default_rng(0).integers(0, 255, (count, 28 * rows, 28 * columns, 3), np.uint8)
    boxes = ((0.2, 0.2, 0.6, 0.6),)
    items: list[Item] = []
    for i in range(count):
        question = "what colour is the star " * 10 + "left " * (i % 2)
        sample = Sample(
            str(i),
            (Path("none"),),
            question,
            "red and blue",
            boxes=boxes,
        )
        items.append((sample, (Image.fromarray(noise[i]),)))
    return items


@contextlib.contextmanager
def as_on_a_card(device: str, dtype: torch.dtype) -> Iterator[None]:
    """PEFT asks for the card's autocast switch, also where checkpointing runs a layer again: it is
    on while a CPU stands in for a card.
    """
    before = torch.is_autocast_enabled("cuda")
    if device == "cpu":
        torch.set_autocast_enabled("cuda", dtype == torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def tokens_of(batch: Batch, checkpoint: Checkpoint, settings: Settings) -> plan.Tokens:
    """The tokens of a batch's longest row, as the plan has them."""
    (rows,) = [batch] if "ids" in batch else batch["direct"]
    visual = int((rows["ids"][0] == checkpoint.processor.tokens.image).sum())
    latents = plan.latents(settings, plan.Tokens(visual))
    text = int(rows["response"]) - visual
    markers = 2 if latents else 0
    answer = rows["ids"].shape[1] - visual - text - latents - markers
    return plan.Tokens(visual, text, answer)


def copied(batch: Any, device: str) -> Any:
    """A batch's tensors as new ones on the device."""
    if isinstance(batch, dict):
        return {key: copied(value, device) for key, value in batch.items()}
    if isinstance(batch, list):
        return [copied(value, device) for value in batch]
    return batch.to(device, copy=True)


def set_checkpointing(model: Any, on: bool) -> None:
    """Switch gradient checkpointing of an adapted model."""
    core = model.get_base_model()
    core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # What switches it off has another name in each transformers.
    for module in core.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on


def measure_training(
    model: Any,
    checkpoint: Checkpoint,
    settings: Settings,
    visual: int,
    dtype: torch.dtype,
    device: str,
) -> Measured:
    """A few steps: peak bytes, on CPUs also what autograd saved, and the seconds of a step."""
    set_checkpointing(model, settings.train.gradient_checkpointing)
    batch = Collator(checkpoint, settings.latent)(items_of(visual, settings.train.batch))
    tokens = tokens_of(batch, checkpoint, settings)
    sft = LatentSFT(model, checkpoint.processor.tokens, settings.latent).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(settings.train.optimizer, trained)
    saved = Saved(sft)
    saved_bytes = 0
    seconds = []
    with metered(model, device) as peak:
        for _ in range(3 if device == "cuda" else 2):
            began = time.perf_counter()
            there = copied(batch, device)
            with as_on_a_card(device, dtype):
                count = saved.hooks() if device == "cpu" else contextlib.nullcontext()
                with count, torch.autocast(device, torch.bfloat16, dtype == torch.bfloat16):
                    loss = sft(**there)["loss"]
                saved_bytes = saved.bytes()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del loss, there
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    prediction = predict_training(plan.shape_of(checkpoint.config), settings, tokens, device)
    if device == "cuda":
        return Measured.of(replace(prediction, saved=None), peak, min(seconds))
    return Measured.of(prediction, peak, min(seconds), saved_bytes)


def predict_training(
    shape: plan.Shape, settings: Settings, tokens: plan.Tokens, device: str
) -> Prediction:
    phases = plan.phase_bytes(shape, settings, tokens)
    del phases[ANSWERING]
    phase = max(phases, key=phases.__getitem__)
    peak = phases[phase] + sum(plan.standing_bytes(shape, settings).values())
    if device == "cuda":
        peak += plan.WORKSPACE
    else:
        # What a card would page lies with the other states of the optimizer.
        trained = plan.trained(shape, settings.lora.rank)
        _, paged = plan.optimizer_bytes(settings.train.optimizer, trained)
        peak += paged
    return Prediction(peak, phase, plan.saved_bytes(shape, settings, tokens))


def measure_answering(
    model: Any, checkpoint: Checkpoint, settings: Settings, visual: int, device: str
) -> Measured:
    """Peak bytes of answering held-out questions, as evaluation during training does."""
    runtime = TorchRuntime(model.eval(), checkpoint)
    began = time.perf_counter()
    with metered(model, device) as peak:
        items = items_of(visual, plan.EVAL_ROWS)
        accuracy_on(runtime, items, [sample.answer for sample, _ in items])
    seconds = time.perf_counter() - began
    shape = plan.shape_of(checkpoint.config)
    prediction = predict_answering(
        shape,
        settings,
        visual,
        device,
        optimizer=False,
    )
    return Measured.of(prediction, peak, seconds)


def predict_answering(
    shape: plan.Shape, settings: Settings, visual: int, device: str, optimizer: bool
) -> Prediction:
    """optimizer: its states stay meanwhile."""
    stays = plan.standing_bytes(shape, settings)
    if not optimizer:
        del stays["optimizer"]
    answering = plan.phase_bytes(shape, settings, plan.Tokens(visual))[ANSWERING]
    workspace = plan.WORKSPACE if device == "cuda" else 0
    return Prediction(sum(stays.values()) + answering + workspace, "answering")


def cases(options: Options) -> Iterator[Case]:
    """What to measure; last of all the answering of held-out questions."""
    product = itertools.product(options.method, options.visual, options.batch, ("on", "off"))
    for method, visual, batch, checkpointing in product:
        settings = options.settings(
            f"latent.method={method}",
            f"train.batch={batch}",
            f"train.gradient_checkpointing={checkpointing}",
        )
        yield Case(settings, method, visual, batch, checkpointing)
    if options.answering or options.device == "cuda":
        for visual in options.visual:
            yield Case(options.settings(), "answering", visual, plan.EVAL_ROWS, "")


def measure(shape: str, options: Options) -> Iterator[tuple[Case, Measured]]:
    """The rows of one shape."""
    tiny = read_checkpoint("tiny")
    config = config_of(shape, options.layers)
    processor = tiny.processor.with_max_pixels(28 * 28 * max(SIDES))
    checkpoint = replace(tiny, config=config, processor=processor)
    device = options.device
    base = build(config, checkpoint, options.dtype, device)
    model = adapted(base, checkpoint, options.settings())
    for case in cases(options):
        settings = case.settings
        try:
            if case.method == "answering":
                measured = measure_answering(model, checkpoint, settings, case.visual, device)
            else:
                measured = measure_training(
                    model, checkpoint, settings, case.visual, options.dtype, device
                )
        except torch.cuda.OutOfMemoryError:
            measured = Measured("out of memory")
        yield case, measured


def predict(shape: str, options: Options) -> Iterator[tuple[Case, Measured]]:
    """The same rows, planned and not measured, of a card and the plan's own number of text
    tokens.
    """
    sizes = plan.shape_of(config_of(shape, options.layers))
    for case in cases(options):
        settings = case.settings
        if case.method == "answering":
            prediction = predict_answering(
                sizes,
                settings,
                case.visual,
                "cuda",
                optimizer=True,
            )
        else:
            prediction = predict_training(sizes, settings, plan.Tokens(case.visual), "cuda")
        yield case, Measured(prediction.phase, prediction.peak, saved_predicted=prediction.saved)


@dataclass(frozen=True)
class Column:
    """Of the table: what it shows of a row's JSON, how, and in what unit."""

    title: str
    key: str
    form: str = ""
    unit: int = 1

    def cell(self, values: JsonObject) -> str:
        value = values.get(self.key, "")
        if self.form and isinstance(value, float | int):
            return format(value / self.unit, self.form)
        return str(value)


COLUMNS = (
    Column("shape", "shape"),
    Column("method", "method"),
    Column("visual tokens", "visual"),
    Column("batch", "batch"),
    Column("checkpointing", "checkpointing"),
    Column("s/step", "seconds", ".2f"),
    Column("measured MiB", "peak", ",.1f", plan.MIB),
    Column("predicted MiB", "predicted", ",.1f", plan.MIB),
    Column("at", "phase"),
    Column("ratio", "ratio", ".3f"),
    Column("saved MiB", "saved", ",.2f", plan.MIB),
    Column("predicted saved MiB", "saved_predicted", ",.2f", plan.MIB),
    Column("saved, ratio", "saved_ratio", ".3f"),
)
MEASURED: tuple[str, ...] = ("seconds", "peak", "ratio", "saved", "saved_ratio")
SAVED = ("saved", "saved_predicted", "saved_ratio")


def main(
    shape: str = "3b,2b",
    layers: int | None = None,
    device: str = "cuda",
    precision: str = "bf16",
    visual: str = "256,512,1024",
    batch: str = "1,2",
    method: str = "lvr,lvr-bottleneck",
    answering: bool = False,
    settings: runner.Settings = None,
    only_predict: Annotated[bool, typer.Option("--predict")] = False,
    out: Path | None = None,
) -> None:
    options = Options(
        layers=layers,
        device=device,
        precision=precision,
        visual=[int(tokens) for tokens in visual.split(",")],
        batch=[int(rows) for rows in batch.split(",")],
        method=method.split(","),
        answering=answering,
        overrides=settings or [],
    )
    warnings.filterwarnings("ignore")
    if only_predict:
        place = "predictions"
        hidden = MEASURED
    elif device == "cpu":
        place = "CPU (live tensors counted)"
        hidden = ()
    else:
        place = torch.cuda.get_device_name()
        hidden = SAVED
    columns = [column for column in COLUMNS if column.key not in hidden]
    print(f"{place}; torch {torch.__version__}; {precision}\n")
    print(header([column.title for column in columns]))
    rows = []
    for name in shape.split(","):
        for case, measured in (predict if only_predict else measure)(name, options):
            values = {"shape": name} | to_json(case) | to_json(measured)
            del values["settings"]
            rows.append(values)
            print(row(column.cell(values) for column in columns), flush=True)
    if out is not None:
        results = {
            "device": place,
            "torch": torch.__version__,
            "layers": layers,
            "rows": rows,
        }
        write_results(out, results)


if __name__ == "__main__":
    launch(main, __doc__)
