"""The specification of the latent loop: its tokens, when it starts and stops, and what is fed back.

    prompt with pictures -> prefill -> text steps
    <|lvr_start|> is fed -> K latent steps -> <|lvr_end|> is fed -> text steps

In a latent step the final hidden state (after the last norm), through `feedback`, is the next input embedding: no head, no
embedding look-up, no sampling. Position ids go on one by one (arXiv 2509.24251, section 3). Everything that trains, exports or
runs a loop reads it from here. May import: the standard library.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lvr_lite.errors import BundleError, UsageError

START, LATENT, END = "<|lvr_start|>", "<|lvr|>", "<|lvr_end|>"
FEEDBACKS = ("identity",)
MODES = ("open",)


@dataclass(frozen=True)
class LatentSpec:
    """How a model reasons in latents.

    steps: number of latent steps K; 0 means that the model was never tuned for them, and it answers in text at once.
    feedback: what turns a hidden state into the next input embedding; "identity" is the paper's.
    mode: "open" (the paper): text after the latents still sees the picture.
    """

    steps: int = 0
    feedback: str = "identity"
    mode: str = "open"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError(f"latent steps must be 0 or more, not {self.steps}")
        if self.feedback not in FEEDBACKS:
            raise BundleError(f"latent feedback {self.feedback!r} is not known here (known: {', '.join(FEEDBACKS)}): update lvr-lite")
        if self.mode not in MODES:
            raise BundleError(f"latent mode {self.mode!r} is not known here (known: {', '.join(MODES)}): update lvr-lite")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatentSpec:
        known = {k: data[k] for k in ("steps", "feedback", "mode") if k in data}
        return cls(**known)


def response(steps: int, answer: str, end_of_turn: str) -> str:
    """The text that a tuned model gives: markers around `steps` latent places, the answer, the end of the turn."""
    return (START + LATENT * steps + END if steps else "") + answer + end_of_turn
