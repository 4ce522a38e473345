"""The head of a model in training: how likely it finds given tokens, some states at a time.

May import: torch.

Logits are as wide as the vocabulary: of 2,000 states in fp32 they take 1.2 GiB, several times over
with their gradients. So they are made for ROWS states at a time, and where there are more states,
made again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# States whose logits live at once: 37 MiB of 151,936 ids in fp32.
ROWS = 64


def without_autocast(tensor: torch.Tensor) -> Any:
    """A context in which what is computed from float32 stays float32, on a tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


@dataclass(frozen=True)
class Head:
    """How a head chooses.

    layer: states (n, H) -> logits (n, V).
    never: ids that cannot be chosen.
    temperature: that logits are divided by.
    """

    layer: Any
    never: tuple[int, ...] = ()
    temperature: float = 1.0

    def scores(
        self,
        states: torch.Tensor,
        chosen: torch.Tensor,
        closed: tuple[int, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (n,) float32 of ids chosen (n,) after states (n, H), and which of the
        ids (n,) bool were the most likely.

        closed: an id, and after which of the states (n,) bool it cannot be chosen either.
        """
        scores = []
        best = []
        for first in range(0, max(len(states), 1), ROWS):
            some = slice(first, first + ROWS)
            shut = None if closed is None else closed[1][some]
            inputs = (states[some], chosen[some], closed[0] if closed else -1, shut)
            if len(states) > ROWS and torch.is_grad_enabled():
                own, is_best = checkpoint(self._scores, *inputs, use_reentrant=False)
            else:
                own, is_best = self._scores(*inputs)
            scores.append(own)
            best.append(is_best)
        return torch.cat(scores), torch.cat(best)

    def _scores(
        self,
        states: torch.Tensor,
        chosen: torch.Tensor,
        id: int,
        shut: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.layer(states).float()
        with without_autocast(states):
            # In place: no backward pass needs the logits that are replaced.
            if self.never:
                logits[:, list(self.never)] = -torch.inf
            if shut is not None:
                logits[:, id] = logits[:, id].masked_fill(shut, -torch.inf)
            if self.temperature != 1.0:
                logits = logits / self.temperature
            losses = F.cross_entropy(logits, chosen, reduction="none")
            return -losses, logits.detach().argmax(-1) == chosen
