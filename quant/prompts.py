"""Questions that quantized models are compared on. May import: numpy, Pillow and the core."""

from __future__ import annotations

from pathlib import Path

from lvr_lite.data.samples import read_samples
from lvr_lite.errors import DataError
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Prompt
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.images import open_picture
from lvr_lite.toy.make import scene_samples

# Of the scenes that weights are calibrated on, of the training split.
CALIBRATION_SEED = 90_001


def scene_prompts(runtime: Runtime, count: int, seed: int) -> list[Prompt]:
    """Questions about drawn scenes of the training split."""
    return [
        prepare_prompt(runtime, [picture], sample.question)[0]
        for sample, picture in scene_samples(count, seed, "train")
    ]


def load_prompts(runtime: Runtime, data: str, count: int) -> list[Prompt]:
    """Prompts to calibrate on.

    data: "scenes", or the path of a file of samples.
    count: at most.
    Raises DataError for a file without samples.
    """
    if data == "scenes":
        return scene_prompts(runtime, count, CALIBRATION_SEED)
    samples = read_samples(Path(data))[:count]
    if not samples:
        raise DataError(f"{data}: holds no samples; --calibration needs some")
    prompts = []
    for sample in samples:
        pictures = [open_picture(path) for path in sample.images]
        prompts.append(prepare_prompt(runtime, pictures, sample.question)[0])
    return prompts
