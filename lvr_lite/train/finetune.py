"""`lvr-lite finetune`: QLoRA over a 4-bit base (stage 1).

May import: torch and what stands above `train`; this folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lvr_lite.config import Settings
from lvr_lite.data.sources import Item, Source
from lvr_lite.data.validate import check_samples, special_tokens
from lvr_lite.export.weights import check_names
from lvr_lite.generate.torch import TorchRuntime, visual_tokens
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.train.batches import Collator, LengthGrouped
from lvr_lite.train.device import training_device, training_dtype
from lvr_lite.train.examples import load_examples
from lvr_lite.train.load import adapted, kept_tokens, load_base
from lvr_lite.train.out_of_memory import told_in_one_line
from lvr_lite.train.run_folder import (
    begin_writing,
    check_resumed,
    is_first_process,
    origin_of,
    resume_point,
    run_folder,
)
from lvr_lite.train.sft import LatentSFT
from lvr_lite.train.trainer import LatentTrainer, Named, Run

# Samples whose visual tokens give the norm that norm-matched feedback takes.
NORM_SAMPLES = 32


def finetune(
    checkpoint: Checkpoint,
    data: str,
    out: Path,
    settings: Settings,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Tune `checkpoint`'s base on `data` into `out`; returns the metrics that metrics.json holds.

    data: a registered source such as "scenes", or a file of samples.
    resume: go on from the last whole checkpoint-N in `out`.
    say: is told what is trained, a line at a time.

    Raises UsageError where `out` holds another run, or one that began otherwise; OutputError where
    another process is writing into it, or it cannot be written; DataError for samples that cannot
    be trained on; BundleError for a checkpoint-N that is damaged; NotFiniteError where too many
    losses are not finite; StoppedError after Ctrl-C or SIGTERM; LvrError where memory is used up.
    """
    device = training_device()
    max_pixels = checkpoint.processor.default_max_pixels
    with run_folder(out), told_in_one_line(out, settings, max_pixels, device, stage=1):
        return _finetune(checkpoint, data, out, settings, resume, say)


def _finetune(
    checkpoint: Checkpoint,
    data: str,
    out: Path,
    settings: Settings,
    resume: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """`finetune` in a folder that is this run's alone."""
    began = time.time()
    device = training_device()
    dtype = training_dtype(settings, device)
    resume_from = resume_point(out, resume, checkpoint)
    checkpoint, settings = with_picture_size(checkpoint, settings)
    origin = origin_of(data, settings)
    if resume_from is not None:
        check_resumed(resume_from, settings, origin)
    # Minutes before they are loaded, where there are many samples to check.
    check_names(checkpoint)
    say(checkpoint.processor.size_in_words + " (--max-pixels)")
    train, held_out = load_examples(data, settings)
    tokens = special_tokens(checkpoint.processor)
    check_samples(train, tokens)
    check_samples(held_out, tokens)
    base = load_base(checkpoint, dtype, device, settings)
    model = adapted(base, checkpoint, settings)
    collator = Collator(checkpoint, settings.latent)
    norm = 0.0
    if settings.latent.feedback == "norm-matched":
        norm = norm_of_visual_tokens(model.get_base_model(), collator, train)
    kept = kept_tokens(checkpoint, settings)
    sft = LatentSFT(model, checkpoint.processor.tokens, settings.latent, norm, kept)
    checkpoint = replace(checkpoint, latent=sft.spec)
    if is_first_process():
        begin_writing(out, checkpoint, settings, origin)
    run = Run(checkpoint, out, settings, device, dtype, resume_from, began, origin)
    runtime = TorchRuntime(model, checkpoint, kept)
    # Scenes are all of about one length, and come as they are drawn.
    grouped = settings.data.group_by_length and data != "scenes"
    trainer = LatentTrainer(run, sft, runtime, train, held_out, Named(collator))
    if grouped:
        trainer.sampler = LengthGrouped(
            len(train),
            lambda i: collator.length(train.samples[i], train.sizes(i)),
            settings.train.batch,
            settings.train.seed,
        )
    trainable, total = model.get_nb_trainable_parameters()
    say(
        f"{trainable:,} of {total:,} parameters are trained; {len(train):,} samples, "
        f"{len(held_out):,} held out; {dtype} on {device}"
    )
    return trainer.to_end(say)


def with_picture_size(checkpoint: Checkpoint, settings: Settings) -> tuple[Checkpoint, Settings]:
    """A model and settings that agree on the size of pictures: that of the settings, or what is
    usual for the family where these name none.
    """
    processor = checkpoint.processor
    size = settings.max_pixels or processor.default_max_pixels
    if size == processor.image.max_pixels:
        return checkpoint, settings
    checkpoint = replace(checkpoint, processor=processor.with_max_pixels(size))
    return checkpoint, replace(settings, max_pixels=size)


@torch.no_grad()
def norm_of_visual_tokens(
    core: Any, collator: Collator, samples: Source | list[Item], count: int = NORM_SAMPLES
) -> float:
    """Mean L2 norm of the visual tokens of the first `count` samples."""
    width = core.config.text_config.hidden_size
    norms = []
    for index in range(min(count, len(samples))):
        batch = collator([samples[index]])
        features = visual_tokens(core, batch["pixel_values"], batch["grid_thw"])
        norms.append(features[:, :width].float().norm(dim=-1))
    return float(torch.cat(norms).mean())
