"""Visual tokens of a frozen tower, kept on disk from one epoch, run or evaluation to the next.

May import: torch, safetensors, numpy and what stands above `generate`.

A picture's tokens hang on nothing but its pixels as the tower takes them (which hold its bytes and
its size), the base and the type of the arithmetic; so these are the key:

    CACHE/visual-tokens/BASE/KEY.safetensors     2 MiB for 512 tokens of a 3B in bf16
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lvr_lite.errors import OutputError
from lvr_lite.files import user_cache, write_atomically
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.model.families import Grid

ENDING = ".safetensors"
# The key of the tensor in a file.
TOKENS = "tokens"
# Visual tokens (T, H or wider) of pictures: patches (N, C) and grids (pictures, 3).
Tower = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def root() -> Path:
    return user_cache() / "visual-tokens"


class KeptTokens:
    """The visual tokens of one base's pictures on disk.

    limit: bytes of all files of all bases. Above it, those give way that no process has read since
        this object was made, the oldest first; then no more are kept.
    """

    def __init__(self, checkpoint: Checkpoint, limit: int) -> None:
        self.processor = checkpoint.processor
        self.folder = root() / checkpoint.base_sha256
        self.limit = limit
        found = []
        for path in root().glob(f"*/*{ENDING}"):
            # Another process may drop it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                found.append((state.st_mtime_ns, path, state.st_size))
        # The files that were there, the youngest first, and when each was last read.
        self._old = sorted(found, reverse=True)
        self._bytes = sum(size for *_, size in found)

    def see(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
        tower: Tower,
    ) -> torch.Tensor:
        """What `tower` gives for pictures, run for those alone whose tokens are not kept.

        dtype: that the tower computes in. device: that the tokens are wanted on.
        """
        grids = [Grid(*grid) for grid in grid_thw[:, 1:].tolist()]
        counts = [self.processor.visual_tokens(grid) for grid in grids]
        patches = pixel_values.split([n * self.processor.image.merge**2 for n in counts])
        paths = [
            self.folder / f"{_key(own, grid, dtype)}{ENDING}"
            for own, grid in zip(patches, grids, strict=True)
        ]
        tokens = [self._read(path) for path in paths]
        missing = [number for number, own in enumerate(tokens) if own is None]
        if missing:
            seen = tower(torch.cat([patches[n] for n in missing]), grid_thw[missing])
            parts = seen.split([counts[n] for n in missing])
            for number, part in zip(missing, parts, strict=True):
                tokens[number] = part
                self._keep(paths[number], part)
        return torch.cat([own.to(device) for own in tokens if own is not None])

    def _read(self, path: Path) -> torch.Tensor | None:
        """The tokens in a file, whose time of change becomes now; None where there are none."""
        try:
            tokens = load(path.read_bytes())[TOKENS]
            os.utime(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, OSError) as error:
            # It is written anew.
            warnings.warn(f"{path}: cannot be read ({error})", stacklevel=2)
            return None
        return tokens

    def _keep(self, path: Path, tokens: torch.Tensor) -> None:
        data = save({TOKENS: tokens.detach().cpu().contiguous()})
        while self._old and self._bytes + len(data) > self.limit:
            self._drop_oldest()
        if self._bytes + len(data) > self.limit:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
        except (OutputError, OSError) as error:
            warnings.warn(f"visual tokens are not kept any more: {error}", stacklevel=2)
            self.limit = 0
            return
        self._bytes += len(data)

    def _drop_oldest(self) -> None:
        """Drop the oldest of the files that were there, unless it was read since."""
        changed, path, size = self._old.pop()
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime_ns == changed:
                path.unlink()
                self._bytes -= size


def _key(patches: torch.Tensor, grid: Grid, dtype: torch.dtype) -> str:
    digest = hashlib.sha256(f"{grid.rows} {grid.columns} {dtype}".encode())
    digest.update(patches.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
