"""What both stages of training share: the device, and transformers' Trainer over a `Reader`.

May import: torch, transformers, peft and what stands above `train`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from lvr_lite.config import Settings
from lvr_lite.data.sources import Item, Source
from lvr_lite.errors import NotFiniteError, StoppedError
from lvr_lite.eval.suite import accuracy_on
from lvr_lite.files import JsonObject, saving
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.checkpoint import ADAPTER, Checkpoint
from lvr_lite.train.batches import Collator
from lvr_lite.train.device import peak_gb
from lvr_lite.train.run_folder import (
    last_whole_checkpoint,
    loading,
    mark_whole,
    steps_of,
    whole_or_not,
    write_result,
    write_side_files,
)
from lvr_lite.train.stopping import StopRequest, begin_worker

# Of a batch: the ids of its samples.
SAMPLES = "samples"
# How many ids a line names.
NAMED = 8
# What a log line leaves out: the progress bar shows it, or nobody reads it.
QUIET = re.compile(
    r"epoch|grad_norm|learning_rate|total_flos|train_.*|eval_(runtime|.*_per_second)"
)


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
        # Trainer would remove an older one before the new one is whole (`run_folder.mark_whole`).
        save_total_limit=None,
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


@dataclass
class StepNumbers:
    """The samples of a step by their ids, and those of them whose loss is not finite."""

    samples: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)

    def add(self, samples: list[str], is_finite: bool) -> None:
        self.samples += samples
        if not is_finite:
            self.not_finite += samples


@dataclass(frozen=True)
class Named:
    """A collator whose batches also hold the ids of their samples, in `samples`."""

    collator: Collator

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        ids = [sample.id for sample, _ in items]
        return {**self.collator(items), SAMPLES: ids}


class LatentTrainer(transformers.Trainer):
    """transformers' Trainer over a `Reader`: logs the parts of the loss, saves the adapter alone,
    and goes on after a step whose numbers are not finite, and after a signal when it is resumed.

    runtime: the model that is trained, as what answers held-out samples at every evaluation.
    sampler: the order of the samples; None for Trainer's own.
    steps_to_stop: a run may stop after each multiple of so many steps.
    """

    def __init__(
        self,
        run: Run,
        model: torch.nn.Module,
        runtime: Runtime,
        train: Source,
        held_out: Source,
        collator: Callable[[list[Any]], Any],
        steps_to_stop: int = 1,
    ) -> None:
        super().__init__(
            model=model,
            args=training_arguments(run.out, run.settings, run.dtype, run.device),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collator,
            callbacks=[WhenAsked(self)],
        )
        self.run = run
        self.runtime = runtime
        self.sampler: torch.utils.data.Sampler[int] | None = None
        self.model_accepts_loss_kwargs = False
        self.steps_to_stop = steps_to_stop
        self.parts: dict[str, list[float]] = {}
        self.step = StepNumbers()
        # Of the steps since the last line of the log.
        self.steps_to_log = 0
        self.skipped_to_log = 0
        self.not_finite_held_out = 0
        self.request = StopRequest()
        # The signal that all processes know of, after each step; 0 for none.
        self.agreed_signal = 0
        self.remove_callback(transformers.trainer_callback.ProgressCallback)
        self.lines = ShortLines()
        self.add_callback(self.lines)

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
        batch = {name: value for name, value in inputs.items() if name != SAMPLES}
        out = model(**batch)
        is_finite = bool(torch.isfinite(out["loss"]))
        if model.training:
            self.step.add(inputs[SAMPLES], is_finite)
        elif not is_finite:
            self.not_finite_held_out += len(inputs[SAMPLES])
        names = ("ce", "latent", "right", "found") if len(inputs["pool"]) else ("ce", "right")
        for name in names if is_finite else ():
            self.note(name if model.training else f"eval_{name}", float(out[name]))
        return (out["loss"], out) if return_outputs else out["loss"]

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    # ------------------------------------------------------------------------ what is not finite

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Trainer's, called once a step between the backward pass and the optimizer: here a step
        is left out whose loss or gradient is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient that is not finite anywhere is not finite in all processes; a loss need not be.
        mine = bool(self.step.not_finite) or not math.isfinite(float(norm))
        wrong, self.agreed_signal = self.agreed(int(mine), self.request.signal)
        self.steps_to_log += 1
        if wrong:
            self._leave_out(model)
            norm = None
        self.step = StepNumbers()
        return norm

    def agreed(self, *numbers: int) -> list[int]:
        """The largest of each number in all processes."""
        if self.args.world_size == 1:
            return list(numbers)
        shared = torch.tensor(numbers, device=self.args.device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        return [int(number) for number in shared.tolist()]

    def _leave_out(self, model: Any) -> None:
        """Take the gradients away, so that the optimizer changes nothing, and write down whose they
        were. Raises NotFiniteError when this happened too often.
        """
        model.zero_grad()
        step = self.state.global_step + 1
        mine = (self.step.not_finite, self.step.samples)
        everybody = [mine]
        if self.args.world_size > 1:
            everybody = [mine] * self.args.world_size
            torch.distributed.all_gather_object(everybody, mine)
        # The samples whose loss it was; all of the step where only their gradient is not finite.
        not_finite = [name for of_process, _ in everybody for name in of_process]
        samples = not_finite or [name for _, of_process in everybody for name in of_process]
        # Kept with the checkpoints, so that a run that goes on counts all of them.
        self.state.log_history.append({"step": step, "skipped": samples})
        self.skipped_to_log += 1
        what = "loss" if not_finite else "gradient"
        self.lines.tell(f"step {step}: skipped, its {what} is not finite ({_listed(samples)})")
        skipped = len(self.skipped())
        most = self.run.settings.train.max_skipped
        if skipped > most:
            last = last_whole_checkpoint(self.run.out)
            then = "" if last is None else f"; {last} was saved before"
            raise NotFiniteError(
                f"step {step}: the {what} of {skipped} steps was not finite, and train.max_skipped "
                f"is {most}; lower train.lr, or look at the samples ({_listed(samples)}){then}"
            )

    def skipped(self) -> list[JsonObject]:
        """{"step", "samples"} of each step that was left out, those before a stop among them."""
        entries = [entry for entry in self.state.log_history if "skipped" in entry]
        return [{"step": entry["step"], "samples": entry["skipped"]} for entry in entries]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logs = dict(logs)
        of_evaluation = any(name.startswith("eval_") for name in logs)
        for name in [n for n in self.parts if n.startswith("eval_") == of_evaluation]:
            logs[name] = round(float(np.mean(self.parts.pop(name))), 5)
        if "loss" in logs:
            # Trainer puts the mean of the others in the place of a loss that is not finite.
            if self.skipped_to_log == self.steps_to_log:
                del logs["loss"]
            self.steps_to_log = 0
            self.skipped_to_log = 0
        # JSON has no number for the others.
        logs = {name: value for name, value in logs.items() if math.isfinite(value)}
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------------------- evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on held-out samples, and how many of them are answered right."""
        self.not_finite_held_out = 0
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return metrics | self._not_finite() | self.free_running_accuracy()

    def _not_finite(self) -> dict[str, float]:
        """{"eval_not_finite"}: of how many held-out samples the loss is not finite, in the process
        with the most of them, which is logged; {} where there is none.
        """
        (count,) = self.agreed(self.not_finite_held_out)
        if not count:
            return {}
        metrics = {"eval_not_finite": float(count)}
        self.log(metrics)
        return metrics

    def free_running_accuracy(self) -> dict[str, float]:
        """{"eval_accuracy", "eval_looked"} of held-out samples, which are logged; {} in all
        processes but the first, and where the model's numbers are not finite.
        """
        if not self.is_world_process_zero():
            return {}
        self.model.eval()
        held_out = self.eval_dataset
        expected = held_out.answers().values()
        try:
            accuracy, looked = accuracy_on(self.runtime, held_out.items(), expected)
        except NotFiniteError as error:
            self.lines.tell(f"step {self.state.global_step}: held-out samples: {error}")
            return {}
        finally:
            self.model.train()
        metrics = {"eval_accuracy": accuracy, "eval_looked": looked}
        self.log(dict(metrics))
        return metrics

    # --------------------------------------------------------------------------- from end to end

    def to_end(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Train, or go on from a checkpoint-N; write the adapter and the metrics, which are
        returned.

        Raises StoppedError where a signal ended the training, NotFiniteError where too many steps
        were left out, OutputError where something cannot be written, BundleError for a
        checkpoint-N that cannot be read.
        """
        resume_from = self.run.resume_from
        if resume_from is not None:
            say(f"resuming from {resume_from}")
        if resume_from is not None and steps_of(resume_from) >= self.args.max_steps:
            # Trainer looks at max_steps after a step only: it would train one more.
            self._load_from_checkpoint(str(resume_from))
            state = str(resume_from / "trainer_state.json")
            self.state = transformers.TrainerState.load_from_json(state)
        else:
            # An error is a line of its own, not the rest of the progress bar's.
            with saving(self.run.out), contextlib.closing(self.lines), self.request:
                self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if self.agreed_signal and self.state.global_step < self.args.max_steps:
            saved = self.run.out / f"checkpoint-{self.state.global_step}"
            raise StoppedError(self.agreed_signal, self.state.global_step, str(saved))
        skipped = self.skipped()
        if len(skipped) >= self.args.max_steps:
            raise NotFiniteError(
                f"{self.run.out}: nothing was learned, the loss or the gradient of every step was "
                f"not finite; lower train.lr, or look at the samples "
                f"({_listed(skipped[-1]['samples'])})"
            )
        adapted = self.model.model
        trainable, _ = adapted.get_nb_trainable_parameters()
        metrics = {
            "steps": self.state.global_step,
            "processes": self.args.world_size,
            "minutes": round((time.time() - self.run.began) / 60, 2),
            "peak_memory_gb": round(peak_gb(self.run.device), 3),
            "trainable_parameters": trainable,
            "skipped": skipped,
            "history": [entry for entry in self.state.log_history if "skipped" not in entry],
        }
        if self.is_world_process_zero():
            with saving(self.run.out):
                write_result(self.run.out, adapted, metrics)
        return metrics

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self.sampler or super()._get_train_sampler(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        if loader.num_workers:
            loader.worker_init_fn = partial(begin_worker, loader.worker_init_fn)
        return loader

    # -------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's, and what makes a checkpoint-N one of its own and whole."""
        folder = self.run.out / f"checkpoint-{self.state.global_step}"
        if not self.is_world_process_zero():
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            return
        with whole_or_not(folder):
            with saving(folder):
                super()._save_checkpoint(model, trial)
            # The other processes write the states of their random numbers.
            self.accelerator.wait_for_everyone()
            with saving(folder):
                write_side_files(folder, self.run.checkpoint, self.run.settings, self.run.origin)
                mark_whole(folder, self.run.settings.train.keep)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        folder = output_dir or self.args.output_dir
        self.model.model.save_pretrained(folder, safe_serialization=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        file = Path(resume_from_checkpoint) / ADAPTER
        with loading(Path(resume_from_checkpoint)):
            set_peft_model_state_dict(self.model.model, load_file(str(file)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Trainer reads all of them with `weights_only`: what lies there cannot run code.
        with loading(self.run.resume_from):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(self.run.resume_from):
            super()._load_rng_state(checkpoint)


def _listed(samples: list[str]) -> str:
    """The first ids of a list."""
    more = len(samples) - NAMED
    return ", ".join(samples[:NAMED]) + (f" and {more} more" if more > 0 else "")


class ShortLines(transformers.trainer_callback.ProgressCallback):
    """The progress bar, with one short line a log instead of a dictionary."""

    training_bar: Any

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

    def tell(self, line: str) -> None:
        """A line beside the progress bar, which the first process alone has."""
        if self.training_bar is not None:
            self.training_bar.write(line)

    def close(self) -> None:
        """End the bar's line, where training did not."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class WhenAsked(transformers.TrainerCallback):
    """Saves and stops at the end of a step, when a signal has asked for it."""

    def __init__(self, trainer: LatentTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self,
        args: Any,  # noqa: ARG002
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **_: Any,
    ) -> None:
        ends_anyway = state.global_step >= state.max_steps
        may_stop = state.global_step % self.trainer.steps_to_stop == 0
        if self.trainer.agreed_signal and may_stop and not ends_anyway:
            control.should_save = True
            control.should_training_stop = True
            # It may take minutes, and the one who sent the signal waits.
            control.should_evaluate = False
