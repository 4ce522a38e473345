"""Gradient checkpointing whose layers hand out their K/V, so that later columns can attend to them.

May import: torch, transformers.

transformers' own checkpointing drops the cache: a pass in several parts would have to read all
columns so far again in each part. Here each layer is computed again in the backward pass as there,
but its K/V are outputs that stay, with their gradient:

    forward     layer(inputs of some columns, K/V of the columns before) -> states, K/V of these
    kept        the inputs of each layer, and the K/V: 36 KiB a column in a 3B
    backward    the layer once more, from its inputs

So every column is read once and computed again once, in however many parts they come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer

# K/V of some columns, each (B, heads, columns, head size).
KeysValues = tuple[torch.Tensor, torch.Tensor]


class KeptLayer(DynamicLayer):
    """K/V of one layer, in the parts in which they were computed.

    They are joined while the layer reads, and again in the backward pass: joined K/V of every part
    would be kept as often as there are parts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[KeysValues] = []

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.parts)


class ReadingLayer:
    """Stands for the cache while one layer reads: what it is asked to keep is noted.

    past: K/V of the columns before, part by part.
    own: those of the columns that are read, once they are known.
    """

    def __init__(self, past: list[KeysValues]) -> None:
        self.past = past
        self.own: KeysValues | None = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> KeysValues:
        """K/V of all columns so far. It has the name that transformers' attention calls."""
        self.own = (keys, values)
        if not self.past:
            return keys, values
        all_keys = [part for part, _ in self.past]
        all_values = [part for _, part in self.past]
        return torch.cat([*all_keys, keys], -2), torch.cat([*all_values, values], -2)


class Recomputed:
    """A decoder layer's forward, computed again in the backward pass.

    layer: one of transformers' decoder layers, with a cache of `new_cache` or without one.
    """

    def __init__(self, layer: Any, number: int) -> None:
        self.layer = layer
        self.number = number
        self.forward = layer.forward

    def __call__(
        self,
        hidden: torch.Tensor,
        past_key_values: Cache | None = None,
        **arguments: Any,
    ) -> torch.Tensor:
        """States (B, C, H) after the layer, of states hidden (B, C, H) before it."""
        if not self.layer.training:
            states: torch.Tensor = self.forward(
                hidden, past_key_values=past_key_values, **arguments
            )
            return states
        parts = [] if past_key_values is None else past_key_values.layers[self.number].parts

        def read(hidden: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
            reading = ReadingLayer(list(zip(past[::2], past[1::2], strict=True)))
            states = self.forward(hidden, past_key_values=reading, **arguments)
            assert reading.own is not None
            return states, *reading.own

        past = [tensor for part in parts for tensor in part]
        states, keys, values = checkpoint(read, hidden, *past, use_reentrant=False)
        if past_key_values is not None:
            parts.append((keys, values))
        return states


def hand_out_columns(language_model: Any, on: bool) -> None:
    """Let the layers of a language model be computed again, and keep their K/V for later columns;
    or let them be as they were.

    The model's own switch stays as it is. Those of its layers are off, for `Recomputed` stands in
    their place.
    """
    for number, layer in enumerate(language_model.layers):
        layer.gradient_checkpointing = False
        if isinstance(layer.forward, Recomputed):
            layer.forward = layer.forward.forward
        if on:
            layer.forward = Recomputed(layer, number)


def new_cache(language_model: Any) -> Cache:
    """An empty cache for the layers of `hand_out_columns`."""
    return Cache(layers=[KeptLayer() for _ in language_model.layers])
