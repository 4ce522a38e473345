"""Training samples and held-out ones, from what `--data` names. May import: numpy and what stands
above `train`.
"""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from lvr_lite.config import Settings
from lvr_lite.data.samples import PickedSamples, SampleFile
from lvr_lite.data.sources import FileSource, JoinedSource, Source, open_source
from lvr_lite.errors import DataError, UsageError
from lvr_lite.train.methods import METHODS

# Evaluation during training sees other scenes than `eval` and `demo`.
EVAL_SEED = 500_000


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
