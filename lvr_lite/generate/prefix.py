"""What several prompts about the same pictures share. May import: numpy, this folder."""

from __future__ import annotations

import numpy as np

from lvr_lite.generate.runtime import Runtime


class PrefixCache:
    """K/V of the ids that several prompts about the same pictures begin with.

    `Decoding` fills it when it reads the first of these prompts alone; of the others, decoded
    alone, it then reads only what follows.

    length: how many ids these are; all visual tokens are among them.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._kv: list[np.ndarray] = []

    @property
    def filled(self) -> bool:
        return bool(self._kv)

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self._kv)

    def fill(self, runtime: Runtime) -> None:
        """Take the K/V of the prompt that `runtime` has just read."""
        self._kv = runtime.keep(self.length)

    def restore(self, runtime: Runtime) -> None:
        """Give the K/V to the batch of one row that `runtime` has just started."""
        runtime.put_back(self._kv)
