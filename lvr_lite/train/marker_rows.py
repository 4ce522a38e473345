"""The three marker rows beside a frozen table, in embedding and head.

May import: torch, peft.

PEFT writes the rows that it trains into a copy of the whole table, 594 MiB in a 3B, at every use,
and its gradient is as large. Here the table is left alone:

    embedding   rows of the table; where an id is a marker's, its own row instead
    head        logits of the table; in the columns of the markers, those of their own rows instead

So a gradient has three rows. Modules, parameters and files are PEFT's (`trainable_token_indices`).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch.nn import functional as F


class MarkerRows(TrainableTokensLayer):  # type: ignore[misc]
    """PEFT's layer of trained tokens, without its copy of the table."""

    def forward_adapters(
        self, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Embeddings (..., H) of ids x (...), or logits (..., V) of states x (..., H)."""
        if self.disable_adapters or self.merged or not active_adapters:
            result: torch.Tensor = super().forward_adapters(x, active_adapters, *args, **kwargs)
            return result
        (name,) = active_adapters
        rows = self.trainable_tokens_delta[name].to(self.base_layer.weight)
        ids = torch.tensor(self.token_indices[name], device=x.device)
        of_table: torch.Tensor = self.base_layer(x)
        if isinstance(self.base_layer, torch.nn.Embedding):
            is_marker = x[..., None] == ids
            of_markers = F.embedding(is_marker.int().argmax(-1), rows)
            return torch.where(is_marker.any(-1, keepdim=True), of_markers, of_table)
        # In place: no backward pass needs the logits that are replaced.
        of_table.index_copy_(-1, ids, F.linear(x, rows))
        return of_table


def keep_tables(model: Any) -> None:
    """Let a model with PEFT's trained tokens leave its tables alone."""
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            # PEFT makes these modules itself, of the class that it knows.
            module.__class__ = MarkerRows
