"""What calibration works with: a runtime that reasons and answers, and prompts. May import: onnx,
numpy, torch and what stands above `quant`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lvr_lite.errors import DataError
from lvr_lite.generate.decode import Prompt
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.quant.drift import LARGE
from lvr_lite.quant.products import Products
from lvr_lite.quant.prompts import load_prompts
from lvr_lite.quant.quantize import quantize_bundle
from lvr_lite.quant.tune import Tuner

PROMPTS = 64
PROMPTS_LARGE = 24
# Of training scales and norms after rounding; at 2B a step takes 80 s on 2 cores.
STEPS = 96
STEPS_LARGE = 0


@dataclass(frozen=True)
class Calibration:
    """An fp32 bundle, and what it is asked.

    source: the fp32 bundle.
    runtime: the same; of one larger than 4 GiB an int8 copy, since fp32 would fill a small machine.
    prompts: that weights are rounded for.
    large: True where the bundle is larger than 4 GiB.
    scratch: folder for files that nobody needs afterwards.
    progress: is told a line a stage.
    """

    source: Bundle
    runtime: OnnxRuntime
    prompts: list[Prompt]
    large: bool
    scratch: Path
    progress: Callable[[str], None]

    @classmethod
    def load(
        cls,
        source: Bundle,
        data: str,
        scratch: Path,
        progress: Callable[[str], None],
    ) -> Calibration:
        """data: "scenes", or the path of a file of samples. Raises DataError for a file without
        samples.
        """
        if data == "scenes" and not _knows_scenes(source):
            progress(
                "warning: weights are rounded for drawn scenes, which say little about the work of "
                "this model; give --calibration FILE, samples of what it will be asked"
            )
        large = source.bytes > LARGE
        answering = source
        if large:
            progress(
                "calibration: an int8 copy reasons and answers, since fp32 would take too much "
                "memory"
            )
            quantize_bundle(
                source=source, target=scratch / "int8", precision="int8", progress=lambda _: None
            )
            answering = Bundle.open(scratch / "int8", check=False)
        runtime = OnnxRuntime(answering)
        prompts = load_prompts(runtime, data, PROMPTS_LARGE if large else PROMPTS)
        return cls(source, runtime, prompts, large, scratch, progress)

    def products(self) -> Products:
        return Products(self.runtime, self.prompts, self.source)

    def tuner(self, products: Products, steps: int | None = None) -> Tuner | None:
        """Trains the scales and norms of a bundle that was rounded for these products.

        steps: of training; None takes STEPS, or STEPS_LARGE; 0 makes no tuner. Raises DataError for
        a single prompt, which cannot be held out and trained on.
        """
        if steps is None:
            steps = STEPS_LARGE if self.large else STEPS
        if not steps:
            return None
        if len(self.prompts) < 2:
            raise DataError(
                "training scales takes two prompts or more to calibrate on; give more samples, or "
                "--tune-steps 0"
            )
        return Tuner(self.runtime, products, steps, self.progress)


def _knows_scenes(source: Bundle) -> bool:
    """Whether a bundle has the embedded model's sizes: drawn scenes are its work."""
    sizes = read_checkpoint("tiny").config["text_config"]
    decoder = source.manifest.decoder
    own = (decoder.layers, decoder.hidden_size, decoder.vocab_size)
    names = ("num_hidden_layers", "hidden_size", "vocab_size")
    return own == tuple(sizes[name] for name in names)
