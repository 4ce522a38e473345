"""What is measured: systems, requests, settings, and how often. May import: Pillow, generate/.

system   what is measured under one name: a runtime, its precision, the bytes of its graphs
request  one picture and one question about it
setting  latent steps, visual tokens a picture, requests in a batch; every system is measured in
         each
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from PIL import Image

from lvr_lite.bench.record import Accuracy
from lvr_lite.errors import UsageError
from lvr_lite.generate.records import Look, Options, check_look
from lvr_lite.generate.runtime import Runtime

# Precisions that the quality of the others is measured against.
EXACT = ("fp32", "exact")


def _check_least(options: Setting | Plan, **least: int) -> None:
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UsageError(f"{name} must be {smallest} or more, not {value}")


@dataclass(frozen=True)
class System:
    """What is measured under `name`.

    bytes: {graph: bytes on disk}; those of "decoder" are what one step reads.
    peak_rss_mb: MiB, where the caller measured this system in a process of its own.
    accuracy: of a suite, to stand beside the speed.
    """

    name: str
    precision: str
    runtime: Runtime
    bytes: dict[str, int]
    peak_rss_mb: float | None = None
    accuracy: Accuracy | None = None

    @property
    def exact(self) -> bool:
        return self.precision in EXACT


@dataclass(frozen=True)
class Request:
    """One picture and one question about it."""

    picture: Image.Image
    question: str

    def scaled(self, runtime: Runtime, tokens: int | None) -> Request:
        """The request with its picture in a size of about `tokens` visual tokens, rows and columns
        as equal as that allows; as it is for None.
        """
        if tokens is None:
            return self
        side = runtime.processor.image.token_side
        rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
        if tokens // rows > 2 * rows:
            # No good rectangle: that of the next best number.
            rows = math.isqrt(tokens)
        size = (tokens // rows * side, rows * side)
        return replace(self, picture=self.picture.resize(size))


@dataclass(frozen=True)
class Setting:
    """How systems are measured.

    steps: latent steps; None takes each model's own.
    image_tokens: visual tokens that pictures are scaled to; None leaves them as they are.
    batch: requests decoded together.
    """

    steps: int | None = None
    image_tokens: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        _check_least(self, steps=0, image_tokens=1, batch=1)


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    rounds: timed requests per system and setting; round r asks request r modulo their number, and
        in a batch those after it.
    seconds: go on for at least so long, since the machine's speed drifts over seconds and a short
        run sees one of its levels.
    warmup: untimed requests per system and setting, in the timed form.
    tokens: text tokens of every answer, forced (end tokens are forbidden until then), so that a
        one-word answer still gives a time per token.
    settings: what each system is measured in.
    seed: of the order within rounds.
    threads: that read memory for the bandwidth.
    look: whether answers look; None is "always" where a model has latent steps, so that what is
        measured is what the setting claims.
    """

    rounds: int = 10
    seconds: float = 0.0
    warmup: int = 2
    tokens: int = 16
    settings: tuple[Setting, ...] = (Setting(),)
    seed: int = 0
    threads: int = 1
    look: Look | None = None

    def __post_init__(self) -> None:
        _check_least(self, rounds=1, seconds=0, warmup=0, tokens=2, threads=1)
        if not self.settings:
            raise UsageError(
                "nothing to measure: name at least one number of steps, of image tokens and of "
                "requests in a batch"
            )
        for setting in self.settings:
            check_look(self.look or "auto", setting.steps)

    def options(self, runtime: Runtime, setting: Setting) -> Options:
        """How a system answers in a setting. The end of turn is not forbidden yet."""
        steps = runtime.latent.steps if setting.steps is None else setting.steps
        claims = bool(steps and runtime.latent.steps)
        look = self.look or ("always" if claims else "auto")
        return Options(max_tokens=self.tokens, steps=setting.steps, look=look)
