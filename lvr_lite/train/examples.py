"""Training samples and held-out ones, from what `--data` names. May import: numpy and what stands
above `train`.
"""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from lvr_lite.config import Settings
from lvr_lite.data.sample_files import SampleFile
from lvr_lite.data.sources import FileSource, JoinedSource, PickedSamples, Source, open_source
from lvr_lite.errors import DataError, UsageError
from lvr_lite.train.methods import METHODS

# Evaluation during training sees other scenes than `eval` and `demo`.
EVAL_SEED = 500_000


def load_examples(data: str, settings: Settings) -> tuple[Source, Source]:
    """Samples to train on, replayed ones among them, and held-out ones.

    data: "scenes", or a file of samples.

    Raises DataError for a file without boxes where latents need them, and where nothing is left to
    hold out or to replay; UsageError for a `data.replay` that is not there.
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
    return JoinedSource(train, _without_pictures_of(held_out, replay), count), held_out


def _without_pictures_of(held_out: Source, replay: str) -> Source:
    """The samples of a file that show no held-out picture."""
    if not Path(replay).is_file():
        raise UsageError(f"data.replay={replay}: neither skills nor a file of samples")
    held = {picture.resolve() for sample in held_out.samples for picture in sample.images}
    samples = SampleFile(Path(replay))
    free = []
    for index, sample in enumerate(samples):
        if held.isdisjoint(picture.resolve() for picture in sample.images):
            free.append(index)
    if not free:
        raise DataError(
            f"{replay}: all of its pictures are held out, so none can be replayed; "
            "give samples of other pictures"
        )
    return FileSource(PickedSamples(samples, free))


def _load_own(data: str, settings: Settings) -> tuple[Source, Source]:
    own = settings.data
    if data == "scenes":
        held_out = open_source(data, "test", own.seed + EVAL_SEED, own.eval_count)
        return open_source(data, "train", own.seed, own.count), held_out
    samples = SampleFile(Path(data))
    _check_boxes(data, samples, settings)
    if own.eval_file is not None:
        held_out = open_source(own.eval_file, count=own.eval_count, registered=())
        return FileSource(samples), held_out
    pictures = np.array(samples.pictures)
    numbers, first = np.unique(pictures, return_index=True)
    # A tenth at most; the last ones, in the order in which pictures first come.
    count = max(1, min(own.eval_count, len(numbers) // 10))
    held = np.isin(pictures, numbers[np.argsort(first)[-count:]])
    if held.all():
        raise DataError(
            f"{data}: all samples share one picture, so none can be held out; "
            "add pictures, or name data.eval_file"
        )
    return _picked(samples, ~held), _picked(samples, held)


def _picked(samples: SampleFile, which: np.ndarray) -> Source:
    """The samples that a mask (samples,) marks."""
    return FileSource(PickedSamples(samples, array("q", np.flatnonzero(which))))


def _check_boxes(data: str, samples: SampleFile, settings: Settings) -> None:
    """Raises DataError where no sample would be answered through latents, though some should."""
    latent = settings.latent
    if not METHODS[latent.method].latents or latent.samples == "all" or any(samples.boxed):
        return
    also = " and latent.loss=none" if latent.runs_freely and latent.loss != "none" else ""
    raise DataError(
        f"{data}: no sample has boxes, so none would be answered through latents; "
        f"add `boxes` (normalized xyxy), or set latent.samples=all{also}"
    )
