"""What the decode loop asks of a model, whatever runs it. May import: numpy, lvr_lite.model.

A runtime holds one model and one batch at a time. Shapes: B rows, S columns, H hidden size, V
vocabulary, N patches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lvr_lite.model.families import Grid
from lvr_lite.model.processor import Processor
from lvr_lite.model.spec import LatentSpec


class Runtime(Protocol):
    """One model, ready to decode. Arrays are numpy, float32 and int64, whatever the model computes
    in.
    """

    name: str
    processor: Processor
    latent: LatentSpec
    hidden_size: int

    def encode(self, pixel_values: np.ndarray, grids: list[Grid]) -> np.ndarray:
        """Patches (N, C) of pictures with these grids (a family says what they count) -> visual
        tokens (N / merge**2, H), or wider (see `decode.Prompt`).
        """
        ...

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Token ids (B, S) -> embeddings (B, S, H), which are the caller's to change."""
        ...

    def start(self, batch: int, capacity: int) -> None:
        """Begin a batch of `batch` rows with room for `capacity` columns each. The batch before is
        forgotten.
        """
        ...

    def prefill(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        rows: list[int] | None = None,
        past: int = 0,
    ) -> np.ndarray:
        """Read whole inputs.

        embeds: (R, S, H), or as wide as the visual tokens, padded on the right.
        positions: (3, R, S).
        lengths: (R,), without padding.
        rows: the R rows that read. None in the first call of a batch, which is for all its rows. A
            later call drops the K/V of its rows and leaves the others as they are.
        past: columns that the batch's one row has from `put_back`; the input goes on after them.

        Returns the hidden state of each input's last column (R, H).
        """
        ...

    def keep(self, length: int) -> list[np.ndarray]:
        """A copy of the K/V of the first `length` columns of a batch's one row, in an order of the
        runtime's own.
        """
        ...

    def put_back(self, kept: list[np.ndarray]) -> None:
        """Begin the batch of one row that was just started with what `keep` gave; `prefill` then
        goes on after it.
        """
        ...

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """One further input for every row: embeds (B, H), positions (B,) -> hidden states (B, H).

        What it returns may be the runtime's own buffer, which the next step writes over.
        """
        ...

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Hidden states (B, H) -> logits (B, V), which are the caller's to change."""
        ...


class Chooser(ABC):
    """The base of a runtime that chooses tokens where its logits are: moving those of a whole
    vocabulary, and drawing among them in numpy, takes longer than a step of the model on a card.

    A class and no protocol, so that what wraps such a runtime to change its logits is none.
    """

    @abstractmethod
    def choose(
        self,
        hidden: np.ndarray,
        closed: Sequence[Sequence[int]],
        at: Sequence[float],
        temperature: float,
        top_p: float,
    ) -> list[int]:
        """The id that each row chooses after hidden states (B, H), as `sampling.sample` would.

        closed: of each row, ids that it cannot choose.
        at: of each row, a number in [0, 1): the share of all probability, in the order of the ids,
            at which it draws.
        """
