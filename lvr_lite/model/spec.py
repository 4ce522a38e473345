"""The specification of the latent loop: its tokens, when it starts and stops, what is fed back, and
what the text sees afterwards. May import: the standard library.

    open         prompt with pictures -> <|lvr_start|> -> K latent steps -> <|lvr_end|> -> text
    bottleneck   prompt with pictures -> <|lvr_start|> -> K latent steps; then all K/V is dropped,
                 and the prompt, with the words said so far, is read again with the latents for
                 its pictures -> text

In a latent step the final hidden state (after the last norm), through `feedback`, is the next input
embedding: no head, no embedding look-up, no sampling. Position ids go on one by one (arXiv
2509.24251, section 3). The second reading is in lvr_lite/model/latents.py. Everything that trains,
exports or runs a loop reads the loop from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lvr_lite.errors import BundleError, UsageError

START = "<|lvr_start|>"
LATENT = "<|lvr|>"
END = "<|lvr_end|>"
FEEDBACKS = ("identity", "norm-matched", "token")
MODES = ("open", "bottleneck")


@dataclass(frozen=True)
class LatentSpec:
    """How a model reasons in latents.

    steps: number of latent steps K; 0: the model was never tuned for them and answers in text.
    feedback: what is fed for a hidden state. "identity": the state itself (the paper).
        "norm-matched": the state at length `norm`. "token": the embedding of <|lvr|>, whatever the
        state is; such latents carry nothing, which makes them a control.
    mode: what text after the latents sees. "open": the picture too (the paper). "bottleneck":
        the question and the latents alone, and nothing that has seen the picture
        (docs/decisions.md).
    norm: L2 norm of what "norm-matched" feeds.

    Raises UsageError for negative steps, BundleError for a feedback or mode that is unknown here.
    """

    steps: int = 0
    feedback: str = "identity"
    mode: str = "open"
    norm: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError(f"latent steps must be 0 or more, not {self.steps}")
        _check_known("feedback", self.feedback, FEEDBACKS)
        _check_known("mode", self.mode, MODES)
        if self.feedback == "norm-matched" and not self.norm > 0:
            raise BundleError(
                f"norm-matched feedback needs a norm above 0, not {self.norm}: "
                "write the checkpoint or bundle again"
            )

    def fed(self, hidden: Any) -> Any:
        """What is fed for hidden states (..., H), an array of numpy or torch. Not for "token".

        Returns the same object for "identity", else float32: in half precision the sum of the
        squares would be infinite.
        """
        if self.feedback == "identity":
            return hidden
        assert self.feedback == "norm-matched"
        # torch's tensors have it; arrays of numpy are float32 here.
        if hasattr(hidden, "float"):
            hidden = hidden.float()
        return hidden * (self.norm / (hidden * hidden).sum(axis=-1, keepdims=True) ** 0.5)

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatentSpec:
        """Fields that are not known here are ignored; missing ones take their defaults.

        Raises TypeError for what is no object.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"must be an object, not {data!r:.40}")
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise BundleError(
            f"latent {name} {value!r} is not known here (known: {', '.join(known)}): "
            "update lvr-lite"
        )


def response(steps: int, answer: str, end_of_turn: str) -> str:
    """The text that a tuned model gives: markers around `steps` latent places, the answer, the end
    of the turn.
    """
    latents = START + LATENT * steps + END if steps else ""
    return latents + answer + end_of_turn


@dataclass(frozen=True)
class TokenIds:
    """Ids that the loop needs.

    image: in the place of each visual token.
    end: all ids that end a turn; the first one also pads.
    lvr_start, lvr, lvr_end: the markers START, LATENT and END.
    """

    image: int
    end: tuple[int, ...]
    lvr_start: int
    lvr: int
    lvr_end: int
