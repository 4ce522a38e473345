"""What both stages of training share: device, folders, and transformers' Trainer over a `Reader`.

May import: torch, transformers, peft and what stands above `train`.

OUT holds the adapter (adapter_model.safetensors), lvr_config.json, the resolved settings,
metrics.json, TensorBoard logs and checkpoint-N folders. A checkpoint counts as whole when its
marker file, written last, is there, so a killed run loses one interval at most.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from lvr_lite.config import Settings
from lvr_lite.data.sources import Source
from lvr_lite.errors import LvrError, OutputError, UsageError
from lvr_lite.eval.suite import accuracy_on
from lvr_lite.files import JsonObject, kept_sha256, write_atomically
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.checkpoint import LVR_CONFIG, VERSION, Checkpoint, base_fields, trained_over
from lvr_lite.model.processor_files import read_json, read_preprocessor
from lvr_lite.system import peak_rss_mb

COMPLETE = "complete"
SETTINGS = "settings.yaml"
# What a run that goes on may have otherwise: how long it is, how it reports, and how the same
# numbers are computed.
MAY_CHANGE = (
    *("train.steps", "train.eval_every", "train.save_every", "train.log_every", "train.keep"),
    *("train.workers", "train.gradient_checkpointing", "train.dequantize"),
)
# The name of a checkpoint within a run.
CHECKPOINT = re.compile(r"checkpoint-\d+")
# What a log line leaves out: the progress bar shows it, or nobody reads it.
QUIET = re.compile(
    r"epoch|grad_norm|learning_rate|total_flos|train_.*|eval_(runtime|.*_per_second)"
)


# ------------------------------------------------------------------------------------- device


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
    precision = settings.train.precision
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


# ------------------------------------------------------------------------------------- folders


def last_whole_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint-N in `out` that was written to its end."""
    whole = [
        path
        for path in out.glob("checkpoint-*")
        if (path / COMPLETE).is_file() and path.name.split("-")[1].isdigit()
    ]
    return max(whole, key=steps_of, default=None)


def steps_of(checkpoint: Path) -> int:
    """The N of a checkpoint-N."""
    return int(checkpoint.name.split("-")[1])


def resume_point(out: Path, resume: bool, checkpoint: Checkpoint) -> Path | None:
    """The checkpoint-N in `out` to go on from; None for a new run.

    Raises UsageError where `out` holds something and nobody asked to go on with it, where it holds
    nothing to go on from, and where it was begun over another base.
    """
    last = last_whole_checkpoint(out) if out.is_dir() else None
    if resume:
        if last is None:
            raise UsageError(
                f"{out}: nothing to resume (no whole checkpoint-N in it); start it without --resume"
            )
        if trained_over(last) not in (None, checkpoint.base_sha256):
            raise UsageError(
                f"{out}: was begun over another base than {checkpoint.base}, whose weights have "
                "another sha256; give that one"
            )
        return last
    # Another process may come here after the first one has begun to write.
    first = os.environ.get("RANK", "0") == "0"
    if first and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists; continue it with --resume, or choose another --out")
    return None


def origin_of(data: str, settings: Settings, start: Checkpoint | None = None) -> JsonObject:
    """What tells a run's samples from others', and what it began from: fields of lvr_config.json.

    start: the tuned checkpoint that stage 2 goes on with.
    """
    own = settings.data
    named = {"data": data, "data.replay": own.replay, "data.eval_file": own.eval_file}
    files = {key: Path(name) for key, name in named.items() if name and Path(name).is_file()}
    origin: JsonObject = {"samples": {key: kept_sha256(path) for key, path in files.items()}}
    if "data" not in files:
        origin["samples"]["data"] = data
    if start is not None:
        origin["begun_from"] = start.adapter_sha256
    return origin


def check_resumed(last: Path, settings: Settings, origin: JsonObject) -> None:
    """Raises UsageError where a run would go on as another one than it was: with other settings
    than MAY_CHANGE, other samples, or from another checkpoint.

    last: the checkpoint-N to go on from.
    origin: as `origin_of` gives it now.
    """
    out = last.parent
    before = _read_settings(last / SETTINGS)
    now = _flat(settings.to_json())
    # Settings that one of the two versions of lvr-lite does not know are no choice of the user's.
    changed = [k for k in now if k in before and k not in MAY_CHANGE and before[k] != now[k]]
    if changed:
        said = "; ".join(
            f"{key}: {_yaml(now[key])}, and {_yaml(before[key])} then" for key in changed
        )
        again = " ".join(f"--set {key}={_yaml(before[key])}" for key in changed)
        raise UsageError(
            f"{out}: was begun with other settings ({said}); go on with {again}, or choose "
            "another --out"
        )
    recorded = read_json(last / LVR_CONFIG).get("origin", {})
    for name, then in recorded.get("samples", {}).items():
        if then != (given := origin["samples"].get(name)):
            raise UsageError(
                f"{out}: was begun on other samples ({name}: {_short(given)}, and {_short(then)} "
                "then); give those, or choose another --out"
            )
    if recorded.get("begun_from", origin.get("begun_from")) != origin.get("begun_from"):
        raise UsageError(
            f"{out}: was begun from another checkpoint (--checkpoint: an adapter of sha256 "
            f"{_short(origin['begun_from'])}, and {_short(recorded['begun_from'])} then); give "
            "that one, or choose another --out"
        )


def _short(digest: object) -> str:
    """A sha256, or the name of a source, as a message shows it."""
    return str(digest)[:12]


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if value in (True, False) else str(value)


def _flat(data: JsonObject, prefix: str = "") -> JsonObject:
    """{"section.key": value} of nested settings."""
    flat: JsonObject = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _read_settings(path: Path) -> JsonObject:
    """The settings of a run by "section.key"; {} where none were written."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); it says what the run was "
            "begun with"
        ) from error
    return _flat(data) if isinstance(data, dict) else {}


def write_side_files(
    out: Path, checkpoint: Checkpoint, settings: Settings, origin: JsonObject | None = None
) -> None:
    """What makes `out` (or a checkpoint-N in it) a checkpoint that every command reads, beside the
    adapter.

    checkpoint: the base, with the latent loop and the picture size that are trained.
    origin: as `origin_of` gives it; None where nothing is recorded.
    """
    processor = checkpoint.processor
    try:
        out.mkdir(parents=True, exist_ok=True)
        processor.tokenizer.save(str(out / "tokenizer.json"))
        (out / "chat_template.jinja").write_text(processor.template)
        preprocessor = json.dumps(read_preprocessor(checkpoint.base), indent=1)
        (out / "preprocessor_config.json").write_text(preprocessor)
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be written ({error.strerror or error}); "
            "free some space or choose another --out"
        ) from error
    run = out.parent if CHECKPOINT.fullmatch(out.name) else out
    content = {
        "version": VERSION,
        **base_fields(checkpoint.base, out, run.resolve().parent),
        "base_sha256": checkpoint.base_sha256,
        "base_precision": "nf4",
        "latent": checkpoint.latent.to_json(),
        "image": {} if settings.max_pixels is None else {"max_pixels": settings.max_pixels},
        "origin": origin or {},
    }
    write_atomically(out / LVR_CONFIG, json.dumps(content, indent=1))
    write_atomically(out / SETTINGS, yaml.safe_dump(settings.to_json(), sort_keys=False))


# ------------------------------------------------------------------------------------- trainer


def training_arguments(
    out: Path, settings: Settings, dtype: torch.dtype, device: str
) -> transformers.TrainingArguments:
    t = settings.train
    on_cpu = device == "cpu"
    return transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=t.steps,
        per_device_train_batch_size=t.batch,
        per_device_eval_batch_size=t.batch,
        gradient_accumulation_steps=t.accumulation,
        learning_rate=t.lr,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(t.warmup * t.steps),
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        optim=t.optimizer,
        adam_beta2=0.98,
        bf16=dtype == torch.bfloat16,
        # With a gradient scaler.
        fp16=dtype == torch.float16,
        use_cpu=on_cpu,
        eval_strategy="steps",
        eval_steps=t.eval_every,
        save_strategy="steps",
        save_steps=t.save_every,
        save_total_limit=t.keep,
        logging_steps=t.log_every,
        logging_first_step=True,
        report_to=["tensorboard"],
        # Otherwise it follows the verbosity of transformers, which is turned down.
        disable_tqdm=False,
        dataloader_num_workers=t.workers,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=[],
        prediction_loss_only=True,
        seed=t.seed,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if on_cpu and "WORLD_SIZE" in os.environ else None,
    )


@dataclass(frozen=True)
class Run:
    """One run of training, as it was asked for.

    checkpoint: the base, with the latent loop and the picture size that are trained.
    out: the folder of its files.
    device, dtype: what it computes on and in.
    resume_from: the checkpoint-N that it goes on from; None for a new run.
    began: `time.time()` when it was asked for.
    origin: as `origin_of` gives it.
    """

    checkpoint: Checkpoint
    out: Path
    settings: Settings
    device: str
    dtype: torch.dtype
    resume_from: Path | None
    began: float
    origin: JsonObject


class LatentTrainer(transformers.Trainer):
    """transformers' Trainer over a `Reader`: logs the parts of the loss, saves the adapter alone,
    stops at a loss that is not finite.

    runtime: the model that is trained, as what answers held-out samples at every evaluation.
    sampler: the order of the samples; None for Trainer's own.
    """

    def __init__(
        self,
        run: Run,
        model: torch.nn.Module,
        runtime: Runtime,
        train: Source,
        held_out: Source,
        collator: Callable[[list[Any]], Any],
    ) -> None:
        super().__init__(
            model=model,
            args=training_arguments(run.out, run.settings, run.dtype, run.device),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collator,
            callbacks=[WholeCheckpoints(run)],
        )
        self.run = run
        self.runtime = runtime
        self.sampler: torch.utils.data.Sampler[int] | None = None
        self.model_accepts_loss_kwargs = False
        self.parts: dict[str, list[float]] = {}
        self.remove_callback(transformers.trainer_callback.ProgressCallback)
        self.add_callback(ShortLines())

    def note(self, name: str, value: float) -> None:
        """A value whose mean the next log line tells."""
        self.parts.setdefault(name, []).append(value)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        **_: Any,
    ) -> Any:
        self.model.progress = self.state.global_step / self.state.max_steps
        out = model(**inputs)
        if not torch.isfinite(out["loss"]):
            raise LvrError(
                f"step {self.state.global_step}: the loss is {out['loss'].item()}; "
                "lower train.lr, or look at the samples"
            )
        names = ("ce", "latent", "right", "found") if len(inputs["pool"]) else ("ce", "right")
        for name in names:
            self.note(name if model.training else f"eval_{name}", float(out[name]))
        return (out["loss"], out) if return_outputs else out["loss"]

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        of_evaluation = any(name.startswith("eval_") for name in logs)
        for name in [n for n in self.parts if n.startswith("eval_") == of_evaluation]:
            logs[name] = round(float(np.mean(self.parts.pop(name))), 5)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on held-out samples, and how many of them are answered right."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics | self.free_running_accuracy()

    def free_running_accuracy(self) -> dict[str, float]:
        """{"eval_accuracy", "eval_looked"} of held-out samples, which are logged; {} in all
        processes but the first.
        """
        if not self.is_world_process_zero():
            return {}
        self.model.eval()
        held_out = self.eval_dataset
        expected = held_out.answers().values()
        accuracy, looked = accuracy_on(self.runtime, held_out.items(), expected)
        metrics = {"eval_accuracy": accuracy, "eval_looked": looked}
        self.log(dict(metrics))
        self.model.train()
        return metrics

    def to_end(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Train, or go on from a checkpoint-N; write the adapter and the metrics, which are
        returned."""
        resume_from = self.run.resume_from
        if resume_from is not None:
            say(f"resuming from {resume_from}")
        if resume_from is not None and steps_of(resume_from) >= self.args.max_steps:
            # Trainer looks at max_steps after a step only: it would train one more.
            self._load_from_checkpoint(str(resume_from))
            state = str(resume_from / "trainer_state.json")
            self.state = transformers.TrainerState.load_from_json(state)
        else:
            self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        adapted = self.model.model
        trainable, _ = adapted.get_nb_trainable_parameters()
        metrics = {
            "steps": self.state.global_step,
            "processes": self.args.world_size,
            "minutes": round((time.time() - self.run.began) / 60, 2),
            "peak_memory_gb": round(peak_gb(self.run.device), 3),
            "trainable_parameters": trainable,
            "history": self.state.log_history,
        }
        if self.is_world_process_zero():
            adapted.save_pretrained(str(self.run.out), safe_serialization=True)
            write_atomically(self.run.out / "metrics.json", json.dumps(metrics, indent=1))
            write_atomically(self.run.out / COMPLETE, "")
        return metrics

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self.sampler or super()._get_train_sampler(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        folder = output_dir or self.args.output_dir
        self.model.model.save_pretrained(folder, safe_serialization=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        file = Path(resume_from_checkpoint) / "adapter_model.safetensors"
        set_peft_model_state_dict(self.model.model, load_file(str(file)))


class ShortLines(transformers.trainer_callback.ProgressCallback):
    """The progress bar, with one short line a log instead of a dictionary."""

    def on_log(
        self,
        args: Any,  # noqa: ARG002
        state: transformers.TrainerState,
        control: Any,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        shown = {name: value for name, value in (logs or {}).items() if not QUIET.fullmatch(name)}
        line = "  ".join(f"{name} {float(value):.3f}" for name, value in shown.items())
        if line and self.training_bar is not None:
            self.training_bar.write(f"step {state.global_step}: {line}")


class WholeCheckpoints(transformers.TrainerCallback):
    """Makes each checkpoint-N a checkpoint of its own, and marks it whole, last of all."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_save(
        self,
        args: Any,  # noqa: ARG002
        state: transformers.TrainerState,
        control: Any,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if state.is_world_process_zero:
            folder = self.run.out / f"checkpoint-{state.global_step}"
            write_side_files(folder, self.run.checkpoint, self.run.settings, self.run.origin)
            (folder / COMPLETE).touch()
