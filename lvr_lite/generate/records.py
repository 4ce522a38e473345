"""What the decode loop is asked, and what it gives: prompts, options, events, results, times.

May import: numpy, errors, this folder.

Shapes: S columns, T visual tokens, K latent steps, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from lvr_lite.errors import UsageError
from lvr_lite.generate.prefix import PrefixCache
from lvr_lite.generate.runtime import Runtime

# Whether an answer looks: where the model chooses to, always before its first word, or never.
Look = Literal["auto", "always", "never"]
LOOKS: tuple[Look, ...] = get_args(Look)


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    ids: (S,) int64, the image token in the place of each visual token.
    features: (T, H), the visual tokens. They may be wider than H: what lies beyond is added in
        later layers by the runtime (lvr_lite/model/families/qwen3_vl.py).
    positions: (3, S) int64.
    prefix: a cache shared with other prompts that begin with the same ids and features.
    """

    ids: np.ndarray
    features: np.ndarray
    positions: np.ndarray
    prefix: PrefixCache | None = None

    def followed_by(self, tokens: list[int]) -> Prompt:
        """This prompt with the first words of its answer after it; without a cache."""
        ids = np.array(tokens, np.int64)
        following = self.positions.max() + 1 + np.arange(len(ids))
        on_all_axes = np.broadcast_to(following, (3, len(ids)))
        return Prompt(
            ids=np.concatenate([self.ids, ids]),
            features=self.features,
            positions=np.concatenate([self.positions, on_all_axes], 1),
        )


@dataclass(frozen=True)
class Options:
    """How to decode.

    max_tokens: text tokens at most; markers and latents are not counted.
    min_tokens: no end of turn before so many text tokens (benchmarks).
    steps: latent steps K; None takes the model's own number, 0 forbids latents.
    look: "auto" lets the model choose whether it looks. "always" makes <|lvr_start|> its first
        choice. "never" forbids it.
    temperature: of sampling; 0 is greedy.
    top_p: in (0, 1], sample from the smallest set of tokens of this probability.
    seed: of sampling.
    keep_hidden: keep the hidden state of every step (evaluation, parity).

    Raises UsageError for a value out of range, and for a look that contradicts the steps.
    """

    max_tokens: int = 32
    min_tokens: int = 0
    steps: int | None = None
    look: Look = "auto"
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    keep_hidden: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens must be 1 or more, not {self.max_tokens}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise UsageError(
                f"min_tokens must lie between 0 and max_tokens ({self.max_tokens}), "
                f"not {self.min_tokens}"
            )
        if self.steps is not None and self.steps < 0:
            raise UsageError(f"steps must be 0 or more, not {self.steps}")
        check_look(self.look, self.steps)
        if not self.temperature >= 0:
            raise UsageError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.seed < 0:
            raise UsageError(f"seed must be 0 or more, not {self.seed}")

    def steps_of(self, runtime: Runtime) -> int:
        """The latent steps of a look; 0 where none is allowed. Raises UsageError for latent steps,
        or a look that is forced, where the model was not tuned for them.
        """
        own = runtime.latent.steps
        if self.look == "always" and not own:
            raise UsageError(
                f"look always: {runtime.name} was not tuned for latent steps and cannot look; "
                "use look auto"
            )
        if self.steps and not own:
            raise UsageError(
                f"this model was not tuned for latent steps: use steps 0, not {self.steps}"
            )
        if self.look == "never":
            return 0
        return own if self.steps is None else self.steps


def check_look(look: str, steps: int | None) -> None:
    """Raises UsageError for a look that is not known, or that contradicts the latent steps."""
    if look not in LOOKS:
        raise UsageError(f"look must be {', '.join(LOOKS[:-1])} or {LOOKS[-1]}, not {look!r}")
    if look == "always" and steps == 0:
        raise UsageError("look always needs latent steps, and steps is 0: leave one of them out")
    if look == "never" and steps:
        raise UsageError(f"look never forbids latent steps: leave out steps {steps}")


EventKind = Literal["token", "start", "latent", "end", "done"]


@dataclass(frozen=True)
class Event:
    """What one row did in one step.

    row: its place in the batch.
    kind: "token" (a text token), "start", "latent", "end" (the markers and the latents between
        them) or "done".
    id: of a text token.
    reason: of "done": "stop" (an end id was chosen) or "length" (the limit was reached).
    at: seconds from the start of decoding until the event was known.
    """

    row: int
    kind: EventKind
    id: int = -1
    reason: str = ""
    at: float = 0.0


@dataclass
class Result:
    """The outcome of one row.

    tokens: text ids, without markers and end.
    choices: all ids that the head chose, <|lvr_start|> and the end among them.
    latents: K arrays (H,), what was fed back.
    hidden: the states (H,) after the prompt and after every step, where `Options.keep_hidden`.
    reason: "stop" or "length".
    ttft: seconds from the start of decoding to the first text token; None without one.
    ttfa: the same to the first token of the answer, which comes after the latents.
    look_forced: whether <|lvr_start|> is the first choice because `Options.look` made it so.
    """

    tokens: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    hidden: list[np.ndarray] = field(default_factory=list)
    reason: str = ""
    ttft: float | None = None
    ttfa: float | None = None
    look_forced: bool = False

    @property
    def looked(self) -> bool:
        """Whether latent steps were taken."""
        return bool(self.latents)


@dataclass
class Clock:
    """Seconds spent by stage over one batch; a list has one entry a step.

    prefill: reading the prompts. hand_over: reading them again with the latents (bottleneck).
    embed: looking up embeddings, first those of the prompts.
    latent_step: steps in which every row that is not done is fed a latent.
    text_step: all other steps.
    lm_head: hidden states to logits. sampling: choosing tokens from logits.
    """

    prefill: float = 0.0
    hand_over: float = 0.0
    embed: list[float] = field(default_factory=list)
    latent_step: list[float] = field(default_factory=list)
    text_step: list[float] = field(default_factory=list)
    lm_head: list[float] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)
