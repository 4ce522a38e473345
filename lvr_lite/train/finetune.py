"""`lvr-lite finetune`: QLoRA over a 4-bit base with transformers' Trainer. May import: torch,
transformers, peft and the core.

OUT holds the adapter (adapter_model.safetensors), lvr_config.json, the resolved settings,
metrics.json, TensorBoard logs and checkpoint-N folders; a checkpoint counts as whole when its
marker file, written last, is there, so a killed run loses one interval at most.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvr_lite.config import Settings
from lvr_lite.data.samples import SampleFile
from lvr_lite.data.sources import (
    FileSource,
    Item,
    JoinedSource,
    PickedSamples,
    Source,
    open_source,
)
from lvr_lite.errors import BundleError, DataError, LvrError, UsageError
from lvr_lite.files import write_atomically
from lvr_lite.generate.runtime import Runtime
from lvr_lite.generate.torch import TorchRuntime, visual_tokens
from lvr_lite.model.checkpoint import LVR_CONFIG, Checkpoint, trained_over
from lvr_lite.model.prompt import prompt_ids
from lvr_lite.model.spec import LatentSpec
from lvr_lite.system import peak_rss_mb
from lvr_lite.train.batches import Collator, LengthGrouped, check_samples
from lvr_lite.train.methods import METHODS
from lvr_lite.train.sft import LatentSFT

COMPLETE = "complete"
SMALL = 10**9  # parameters of a base that a CPU may hold without 4-bit storage
EVAL_SEED = 500_000  # evaluation during training sees other scenes than `eval` and `demo`


def computes_in_bf16(device: str) -> bool:
    """Whether bf16 is the machine's fast type: any recent GPU, and CPUs with AVX512_BF16 or AMX."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def training_device() -> str:
    """The GPU of this process, or "cpu"."""
    return f"cuda:{_local_rank()}" if torch.cuda.is_available() else "cpu"


def training_dtype(settings: Settings, device: str) -> torch.dtype:
    """What the base is held in and computed with; "auto" takes bf16 where it is the machine's fast
    type.
    """
    bf16 = {"auto": computes_in_bf16(device), "bf16": True, "fp32": False}[settings.train.precision]
    return torch.bfloat16 if bf16 else torch.float32


def adapted(model: Any, checkpoint: Checkpoint, settings: Settings) -> Any:
    """The 4-bit model with LoRA on every linear of the language model and the three marker rows
    trainable; all else is frozen (checked).
    """
    from peft import LoraConfig, get_peft_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tokens = checkpoint.tokens
    config = LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=checkpoint.family.LORA_TARGETS,
        trainable_token_indices=[tokens.lvr_start, tokens.lvr, tokens.lvr_end],
        task_type="CAUSAL_LM",
    )
    _begin_markers(model, checkpoint)
    torch.manual_seed(settings.train.seed)  # the adapters' random start
    tuned = get_peft_model(model, config)
    text = checkpoint.family.LANGUAGE_MODEL
    wrong = [
        n
        for n, p in tuned.named_parameters()
        if p.requires_grad
        and not ("lora_" in n and f".{text}." in n)
        and "trainable_tokens" not in n
    ]
    if wrong:
        raise LvrError(
            f"{wrong[0]} would be trained, but only adapters and the three token rows may be"
        )
    if settings.train.gradient_checkpointing:
        keep_less(tuned)
    return tuned


def keep_less(model: Any) -> None:
    """Gradient checkpointing for a model with adapters: layers are read again instead of kept."""
    model.get_base_model().gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )


@torch.no_grad()
def _begin_markers(model: Any, checkpoint: Checkpoint) -> None:
    """Start the marker rows where the base model understands them: both markers as the prompt's
    last token, after which the model says what it found, the place of a latent as that of a visual
    token. Their spare rows were never trained.
    """
    prompt = prompt_ids(
        checkpoint.tokenizer,
        checkpoint.template,
        "",
        checkpoint.family.IMAGE_TOKEN,
        [checkpoint.family.IMAGE_TOKEN],
    )
    picture = prompt.index(checkpoint.tokens.image)
    rows = model.get_input_embeddings().weight
    tokens = checkpoint.tokens
    rows[tokens.lvr_start], rows[tokens.lvr], rows[tokens.lvr_end] = (
        rows[prompt[-1]],
        rows[prompt[picture]],
        rows[prompt[-1]],
    )


@torch.no_grad()
def norm_of_visual_tokens(
    core: Any, collator: Collator, examples: Source | list[Item], samples: int = 32
) -> float:
    """Mean L2 norm of the visual tokens of the first samples."""
    width = core.config.text_config.hidden_size
    seen = (collator([examples[i]]) for i in range(min(samples, len(examples))))
    norms = [
        visual_tokens(core, batch["pixel_values"], batch["grid_thw"])[:, :width]
        .float()
        .norm(dim=-1)
        for batch in seen
    ]
    return float(torch.cat(norms).mean())


def load_examples(data: str, settings: Settings) -> tuple[Source, Source]:
    """Training examples, replayed ones among them, and held-out ones, for `--data scenes` or a file
    of samples with boxes.
    """
    train, held_out = _load_own(data, settings)
    replay = settings.data.replay
    if replay is None:
        return train, held_out
    share = settings.data.replay_share
    count = round(len(train) * share / (1 - share))
    if replay == "skills":
        skills = open_source(replay, "train", settings.data.seed, max(1, count))
        return JoinedSource(train, skills, count), held_out
    if not Path(replay).is_file():
        raise UsageError(f"data.replay={replay}: neither skills nor a file of samples")
    held = {picture.resolve() for sample in held_out.samples for picture in sample.images}
    others = SampleFile(Path(replay))
    free = [
        i
        for i in range(len(others))
        if not held & {picture.resolve() for picture in others[i].images}
    ]
    if not free:
        raise DataError(
            f"{replay}: all of its pictures are held out, so none can be replayed; give samples of other pictures"
        )
    return JoinedSource(train, FileSource(PickedSamples(others, free)), count), held_out


def _load_own(data: str, settings: Settings) -> tuple[Source, Source]:
    if data == "scenes":
        own = settings.data
        held_out = open_source(data, "test", own.seed + EVAL_SEED, own.eval_count)
        return open_source(data, "train", own.seed, own.count), held_out
    samples = SampleFile(Path(data))
    if (
        METHODS[settings.latent.method].latents
        and settings.latent.samples == "boxed"
        and not any(samples.boxed)
    ):
        free = settings.latent.runs_freely and settings.latent.loss != "none"
        untargeted = "latent.samples=all" + (" and latent.loss=none" if free else "")
        raise DataError(
            f"{data}: no sample has boxes, so none would be answered through latents; add `boxes` (normalized xyxy), or set {untargeted}"
        )
    if settings.data.eval_file is not None:
        held_out = open_source(
            settings.data.eval_file, count=settings.data.eval_count, registered=()
        )
        return FileSource(samples), held_out
    numbers, first = np.unique(np.array(samples.pictures), return_index=True)
    last = np.argsort(first)[
        -max(1, min(settings.data.eval_count, len(first) // 10)) :
    ]  # in the order in which pictures come first
    held = np.isin(np.array(samples.pictures), numbers[last])
    if held.all():
        raise DataError(
            f"{data}: all samples share one picture, so none can be held out; add pictures, or name data.eval_file"
        )
    train, last_ones = (
        FileSource(PickedSamples(samples, array("q", np.flatnonzero(which))))
        for which in (~held, held)
    )
    return train, last_ones


def last_whole_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint-N in `out` that was written to its end."""
    found = [
        p
        for p in out.glob("checkpoint-*")
        if (p / COMPLETE).is_file() and p.name.split("-")[1].isdigit()
    ]
    return max(found, key=_steps_of, default=None)


def _steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def finetune(
    checkpoint: Checkpoint,
    load_base: Callable[[Checkpoint, torch.dtype, str], Any],
    data: str,
    out: Path,
    settings: Settings,
    resume: bool = False,
    accuracy: Callable[[Runtime, Iterable[Item]], float] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Tune `checkpoint`'s base on `data` into `out`; returns the metrics that metrics.json holds.

    load_base: loads the 4-bit model (checkpoint, dtype, device). accuracy: free-running accuracy on
    held-out examples, run at every evaluation. Raises UsageError where `out` holds another run,
    LvrError where the loss is no longer finite.
    """
    import transformers

    started = time.time()
    device = training_device()
    dtype = training_dtype(settings, device)
    begin_from = begin(out, resume, checkpoint)
    if settings.max_pixels is not None:
        checkpoint = replace(
            checkpoint, image_spec=checkpoint.image_spec | {"max_pixels": settings.max_pixels}
        )
    train, held_out = load_examples(data, settings)
    for examples in (train, held_out):
        check_samples(examples, checkpoint)
    base = load_base(checkpoint, dtype, device)
    if device == "cpu" and settings.train.dequantize == "auto" and base.num_parameters() < SMALL:
        # the same NF4 values, held in `dtype`: without a GPU taking them apart costs a quarter of a
        # step
        base = base.dequantize()
    model = adapted(base, checkpoint, settings)
    collator = Collator(checkpoint, settings.latent)
    matched = settings.latent.feedback == "norm-matched"
    norm = norm_of_visual_tokens(model.get_base_model(), collator, train) if matched else 0.0
    sft = LatentSFT(model, checkpoint.tokens, settings.latent, norm)
    spec = sft.spec
    write_side_files(out, checkpoint, spec, settings)
    trainer = trainer_class(transformers)(
        model=sft,
        args=arguments(transformers, out, settings, dtype, device),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=[marker(transformers, out, checkpoint, spec, settings)],
    )
    if settings.data.group_by_length and data != "scenes":
        grouped = LengthGrouped(
            len(train),
            lambda i: collator.length(train.samples[i], train.sizes(i)),
            settings.train.batch,
            settings.train.seed,
        )
        trainer.sampler = grouped
    if accuracy is not None:
        runtime = TorchRuntime(model, replace(checkpoint, latent=spec))
        trainer.answer_accuracy = lambda: accuracy(runtime, held_out.items())
    trainable, total = model.get_nb_trainable_parameters()
    say(
        f"{trainable:,} of {total:,} parameters are trained; {len(train):,} samples, {len(held_out):,} held out; {dtype} on {device}"
    )
    return train_to_end(trainer, out, settings, begin_from, device, started, say)


def train_to_end(
    trainer: Any,
    out: Path,
    settings: Settings,
    begin_from: Path | None,
    device: str,
    started: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run a trainer of `trainer_class`, or go on from a checkpoint-N of its own; write the adapter
    and the metrics, which are returned.
    """
    import transformers

    model = trainer.model.model
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    trainer.add_callback(_progress_class(transformers))
    if begin_from is not None:
        say(f"resuming from {begin_from}")
    if begin_from is not None and _steps_of(begin_from) >= settings.train.steps:
        # Trainer looks at max_steps after a step only: it would train one more
        trainer._load_from_checkpoint(str(begin_from))
        trainer.state = transformers.TrainerState.load_from_json(
            str(begin_from / "trainer_state.json")
        )
    else:
        trainer.train(resume_from_checkpoint=str(begin_from) if begin_from else None)
    if trainer.is_world_process_zero():
        model.save_pretrained(str(out), safe_serialization=True)
    history = trainer.state.log_history
    trainable, _ = model.get_nb_trainable_parameters()
    metrics = {
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "minutes": round((time.time() - started) / 60, 2),
        "peak_memory_gb": round(_peak_gb(device), 3),
        "trainable_parameters": trainable,
        "history": history,
    }
    if trainer.is_world_process_zero():
        write_atomically(out / "metrics.json", json.dumps(metrics, indent=1))
        write_atomically(out / COMPLETE, "")
    return metrics


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def begin(out: Path, resume: bool, checkpoint: Checkpoint) -> Path | None:
    """Where to go on from: None for a new run. A folder that holds a run is not overwritten
    unasked, nor gone on with over another base.
    """
    last = last_whole_checkpoint(out) if out.is_dir() else None
    if resume:
        if last is None:
            raise UsageError(
                f"{out}: nothing to resume (no whole checkpoint-N in it); start it without --resume"
            )
        if trained_over(last) not in (None, checkpoint.base_sha256):
            raise UsageError(
                f"{out}: was begun over another base than {checkpoint.base}, whose weights have another sha256; give that one"
            )
        return last
    first = (
        os.environ.get("RANK", "0") == "0"
    )  # another process may come here after the first has begun to write
    if first and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists; continue it with --resume, or choose another --out")
    return None


def write_side_files(
    out: Path, checkpoint: Checkpoint, spec: LatentSpec, settings: Settings
) -> None:
    """What makes `out` (or a checkpoint-N in it) a checkpoint that every command reads, beside the
    adapter.
    """
    import yaml

    try:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.tokenizer.save(str(out / "tokenizer.json"))
        (out / "chat_template.jinja").write_text(checkpoint.template)
        shutil.copyfile(
            checkpoint.base / "preprocessor_config.json", out / "preprocessor_config.json"
        )
    except OSError as error:
        raise BundleError(
            f"{out}: cannot be written ({error.strerror or error}); free some space or choose another --out"
        ) from error
    from importlib import resources

    embedded = Path(str(resources.files("lvr_lite") / "toy" / "model"))
    base = "tiny" if checkpoint.base == embedded else str(checkpoint.base.resolve())
    image = {} if settings.max_pixels is None else {"max_pixels": settings.max_pixels}
    content = {
        "version": 1,
        "base": base,
        "base_sha256": checkpoint.base_sha256,
        "base_precision": "nf4",
        "latent": spec.to_json(),
        "image": image,
    }
    write_atomically(out / LVR_CONFIG, json.dumps(content, indent=1))
    write_atomically(out / "settings.yaml", yaml.safe_dump(settings.to_json(), sort_keys=False))


def arguments(
    transformers: Any, out: Path, settings: Settings, dtype: torch.dtype, device: str
) -> Any:
    t = settings.train
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
        use_cpu=device == "cpu",
        eval_strategy="steps",
        eval_steps=t.eval_every,
        save_strategy="steps",
        save_steps=t.save_every,
        save_total_limit=t.keep,
        logging_steps=t.log_every,
        logging_first_step=True,
        report_to=["tensorboard"],
        disable_tqdm=False,  # else it follows the verbosity of transformers, which is turned down
        dataloader_num_workers=t.workers,
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        label_names=[],
        prediction_loss_only=True,
        seed=t.seed,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if device == "cpu" and "WORLD_SIZE" in os.environ else None,
    )


def trainer_class(transformers: Any) -> Any:
    class SftTrainer(transformers.Trainer):
        """transformers' Trainer over LatentSFT: logs the parts of the loss, saves the adapter
        alone, stops at a loss that is not finite.
        """

        answer_accuracy: Callable[[], float] | None = None
        sampler: Any = None  # Trainer's own order without one

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False
            self.parts: dict[str, list[float]] = {}

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> Any:
            self.model.progress = self.state.global_step / self.state.max_steps
            out = model(**inputs)
            if not torch.isfinite(out["loss"]):
                raise LvrError(
                    f"step {self.state.global_step}: the loss is {out['loss'].item()}; lower train.lr, or look at the samples"
                )
            for name in (
                ("ce", "latent", "right", "found") if len(inputs["pool"]) else ("ce", "right")
            ):
                self.parts.setdefault(name if model.training else f"eval_{name}", []).append(
                    float(out[name])
                )
            return (out["loss"], out) if return_outputs else out["loss"]

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return self.sampler or super()._get_train_sampler(*args, **kwargs)

        def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(inputs))
            return loss.detach(), None, None

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            for name in [
                n
                for n in self.parts
                if n.startswith("eval_") == any(k.startswith("eval_") for k in logs)
            ]:
                logs[name] = round(float(np.mean(self.parts.pop(name))), 5)
            super().log(logs, *args, **kwargs)

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            if self.answer_accuracy is not None and self.is_world_process_zero():
                self.model.eval()
                metrics["eval_accuracy"] = self.answer_accuracy()
                self.log({"eval_accuracy": metrics["eval_accuracy"]})
                self.model.train()
            return metrics

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            self.model.model.save_pretrained(
                output_dir or self.args.output_dir, safe_serialization=True
            )

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            set_peft_model_state_dict(
                self.model.model,
                load_file(str(Path(resume_from_checkpoint) / "adapter_model.safetensors")),
            )

    return SftTrainer


def _progress_class(transformers: Any) -> Any:
    class Progress(transformers.trainer_callback.ProgressCallback):
        """The progress bar, with one short line a log instead of a dictionary."""

        def on_log(
            self,
            args: Any,
            state: Any,
            control: Any,
            logs: dict[str, float] | None = None,
            **_: Any,
        ) -> None:
            quiet = re.compile(
                r"epoch|grad_norm|learning_rate|total_flos|train_.*|eval_(runtime|.*_per_second)"
            )
            said = "  ".join(
                f"{name} {float(value):.3f}"
                for name, value in (logs or {}).items()
                if not quiet.fullmatch(name)
            )
            if said and self.training_bar is not None:
                self.training_bar.write(f"step {state.global_step}: {said}")

    return Progress


def marker(
    transformers: Any, out: Path, checkpoint: Checkpoint, spec: LatentSpec, settings: Settings
) -> Any:
    class Marker(transformers.TrainerCallback):
        """Makes each checkpoint-N a checkpoint of its own, and marks it whole, last of all."""

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                folder = out / f"checkpoint-{state.global_step}"
                write_side_files(folder, checkpoint, spec, settings)
                (folder / COMPLETE).touch()

    return Marker()


def _peak_gb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return (peak_rss_mb() or 0.0) / 2**10
