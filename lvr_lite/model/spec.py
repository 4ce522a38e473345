"""The specification of the latent loop: its tokens, when it starts and stops, what is fed back, and
what the text sees afterwards.

    open         prompt with pictures -> <|lvr_start|> -> K latent steps -> <|lvr_end|> -> text
    bottleneck   prompt with pictures -> <|lvr_start|> -> K latent steps; then all K/V is dropped and the prompt is read again
                 with the K latents as its picture, each in the place of the visual token that it is nearest to (several in one
                 place become their mean) -> text

In a latent step the final hidden state (after the last norm), through `feedback`, is the next input
embedding: no head, no embedding look-up, no sampling. Position ids go on one by one (arXiv
2509.24251, section 3). Everything that trains, exports or runs a loop reads it from here. May
import: the standard library.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lvr_lite.errors import BundleError, UsageError

START, LATENT, END = "<|lvr_start|>", "<|lvr|>", "<|lvr_end|>"
FEEDBACKS = ("identity", "norm-matched", "token")
MODES = ("open", "bottleneck")


@dataclass(frozen=True)
class LatentSpec:
    """How a model reasons in latents.

    steps: number of latent steps K; 0 means that the model was never tuned for them, and it answers
    in text at once. feedback: what a hidden state becomes before it is fed: itself ("identity", the
    paper), itself at length `norm` ("norm-matched"), or nothing: the embedding of <|lvr|> is fed
    instead ("token", the control whose latents carry nothing). mode: "open" (the paper): text after
    the latents still sees the picture; "bottleneck": it sees nothing but the question and the
    latents, neither the picture nor anything else that has seen it (docs/decisions.md). norm: L2
    norm of what "norm-matched" feeds.
    """

    steps: int = 0
    feedback: str = "identity"
    mode: str = "open"
    norm: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError(f"latent steps must be 0 or more, not {self.steps}")
        if self.feedback not in FEEDBACKS:
            raise BundleError(
                f"latent feedback {self.feedback!r} is not known here (known: {', '.join(FEEDBACKS)}): update lvr-lite"
            )
        if self.mode not in MODES:
            raise BundleError(
                f"latent mode {self.mode!r} is not known here (known: {', '.join(MODES)}): update lvr-lite"
            )
        if self.feedback == "norm-matched" and not self.norm > 0:
            raise BundleError(
                f"norm-matched feedback needs a norm above 0, not {self.norm}: write the checkpoint or bundle again"
            )

    def fed(self, hidden: Any) -> Any:
        """What is fed for hidden states (..., H), an array of numpy or torch; the same object for
        "identity". Not for "token".
        """
        if self.feedback == "identity":
            return hidden
        assert self.feedback == "norm-matched"
        return hidden * (self.norm / (hidden * hidden).sum(axis=-1, keepdims=True) ** 0.5)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatentSpec:
        known = {k: data[k] for k in ("steps", "feedback", "mode", "norm") if k in data}
        return cls(**known)


def response(steps: int, answer: str, end_of_turn: str) -> str:
    """The text that a tuned model gives: markers around `steps` latent places, the answer, the end
    of the turn.
    """
    return (START + LATENT * steps + END if steps else "") + answer + end_of_turn


@dataclass(frozen=True)
class TokenIds:
    """Ids that the loop needs; `end` holds all ids that end a turn."""

    image: int
    end: tuple[int, ...]
    lvr_start: int
    lvr: int
    lvr_end: int
