"""Bytes of live tensors on a real device, phase by phase: on a card as torch counts them, on a CPU
counted as they are made. Each is a `lvr_lite.train.memory.Meter`, as the simulated card is one.

May import: torch, bitsandbytes, lvr_lite.train.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lvr_lite.train.simulated import GRAIN, UNPACKED_FROM


class LiveBytes(TorchDispatchMode):
    """Bytes of live tensors that were made under it, and their peaks: what
    torch.cuda.max_memory_allocated counts, without a card.

    Memory that a kernel takes and gives back inside itself does not count, but for the weight that
    bitsandbytes unpacks.

    now: bytes that are live.
    peaks: the most in each phase.
    """

    device = torch.device("cpu")

    def __init__(self, before: Sequence[torch.Tensor] = ()) -> None:
        """before: tensors that are there already, which are counted once, from the start."""
        super().__init__()
        storages = [tensor.untyped_storage() for tensor in before]
        self.known = WeakIdKeyDictionary({storage: _rounded(storage) for storage in storages})
        self.now = sum(self.known.values())
        self.peaks: dict[str, int] = {}
        self._phase = "loading"

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made meanwhile counts for the phase of this name."""
        before = self._phase
        self._phase = name
        self._note()
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def autocast(self, dtype: torch.dtype) -> Iterator[None]:
        """As training on a card enters it. PEFT asks for the card's switch, also where
        checkpointing runs a layer again: it stays on.
        """
        low = dtype != torch.float32
        torch.set_autocast_enabled("cuda", low)
        with torch.autocast("cpu", dtype, low):
            yield

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_enabled("cuda", False)
        super().__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            rows = args[0]
            if rows.numel() // rows.shape[-1] >= UNPACKED_FROM:
                with self:
                    return _gemm_4bit_default_impl(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._take(tensor.untyped_storage())
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        size = _rounded(storage)
        self.known[storage] = size
        weakref.finalize(storage, self._give_back, size)
        self.now += size
        self._note()

    def _note(self) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.now)

    def _give_back(self, size: int) -> None:
        self.now -= size


def _rounded(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // GRAIN) * GRAIN


class CardBytes:
    """What torch counts on a CUDA card.

    reserved: the most that its allocator held.
    context: what the card holds beside that, of other processes, too.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.peaks: dict[str, int] = {}
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    @property
    def now(self) -> int:
        return int(torch.cuda.memory_allocated())

    @property
    def reserved(self) -> int:
        return int(torch.cuda.max_memory_reserved())

    @property
    def context(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return int(total - free - torch.cuda.memory_reserved())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            torch.cuda.synchronize()
            most = int(torch.cuda.max_memory_allocated())
            self.peaks[name] = max(self.peaks.get(name, 0), most)

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast("cuda", dtype, dtype != torch.float32)


def model_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers and the state of 4-bit weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            tensors += [state.absmax, state.code, state.offset]
            tensors += [state.state2.absmax, state.state2.code]
    return tensors
