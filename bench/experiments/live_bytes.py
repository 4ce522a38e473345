"""Bytes of tensors: on a card as torch counts them, on a CPU counted as they are made."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# The allocator of a card rounds up to so many bytes.
GRAIN = 512


class LiveBytes(TorchDispatchMode):
    """Bytes of live tensors that were made under it, and their peak: what
    torch.cuda.max_memory_allocated counts, without a card.

    Memory that a kernel takes and gives back inside itself does not count.
    """

    def __init__(self, before: list[torch.Tensor]) -> None:
        """before: tensors that are there already, which are counted once, from the start."""
        super().__init__()
        storages = [tensor.untyped_storage() for tensor in before]
        self.known = WeakIdKeyDictionary({storage: storage.nbytes() for storage in storages})
        self.now = sum(self.known.values())
        self.peak = self.now

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._take(tensor.untyped_storage())
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        self.known[storage] = size
        weakref.finalize(storage, self._give_back, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _give_back(self, size: int) -> None:
        self.now -= size


class _Held:
    """A tensor that autograd holds, without its graph, which would keep it alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()


class Saved:
    """Bytes that autograd holds between forward and backward, each storage once, parameters
    apart.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        own = itertools.chain(module.parameters(), module.buffers())
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context under which what is saved is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def _pack(self, tensor: torch.Tensor) -> _Held:
        held = _Held(tensor)
        self._held.add(held)
        return held

    def bytes(self) -> int:
        storages = [held.tensor.untyped_storage() for held in self._held]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for place, size in sizes.items() if place not in self._own)


@dataclass
class Peak:
    """In bytes. live: of tensors, the model's own included. On a card also `reserved` by torch's
    allocator, and `context`, what the card holds besides (of other processes too).
    """

    live: int = 0
    reserved: int = 0
    context: int = 0


@contextlib.contextmanager
def metered(model: torch.nn.Module, device: str) -> Iterator[Peak]:
    """A context whose peak is known when it is left."""
    gc.collect()
    peak = Peak()
    if device == "cpu":
        with LiveBytes(model_tensors(model)) as counter:
            yield peak
        peak.live = counter.peak
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield peak
    free, total = torch.cuda.mem_get_info()
    peak.live = torch.cuda.max_memory_allocated()
    peak.reserved = torch.cuda.max_memory_reserved()
    peak.context = total - free - torch.cuda.memory_reserved()


def model_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers and the state of 4-bit weights."""
    import bitsandbytes as bnb

    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors += [state.absmax, state.code, state.offset]
            tensors += [state.state2.absmax, state.state2.code]
    return tensors
