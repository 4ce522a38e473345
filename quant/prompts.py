"""Questions that quantized models are compared on. May import: numpy, Pillow and what stands above
`quant`.
"""

from __future__ import annotations

from lvr_lite.data.sources import open_source
from lvr_lite.errors import DataError
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Prompt
from lvr_lite.generate.runtime import Runtime

# Of the scenes that weights are calibrated on, of the training split.
CALIBRATION_SEED = 90_001


def load_prompts(
    runtime: Runtime,
    data: str,
    count: int,
    seed: int = CALIBRATION_SEED,
) -> list[Prompt]:
    """Questions of the training split.

    data: "scenes", or the path of a file of samples.
    count: at most.
    seed: of scenes.
    Raises DataError for a file without samples.
    """
    source = open_source(data, "train", seed, count, registered=("scenes",))
    if not len(source):
        raise DataError(f"{data}: holds no samples; --calibration needs some")
    return [
        prepare_prompt(runtime, pictures, sample.question)[0] for sample, pictures in source.items()
    ]
