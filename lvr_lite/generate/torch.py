"""The reference runtime: a transformers model under torch (workshop only).

May import: torch, transformers, numpy, lvr_lite.model.

It computes what the device runtime must equal: right-padded prompts, K/V that grows, padding masked
out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from lvr_lite.generate.kept_tokens import KeptTokens
from lvr_lite.generate.runtime import Chooser
from lvr_lite.generate.sampling import not_finite
from lvr_lite.model import families
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.model.families import Grid


class SharedColumns(DynamicLayer):
    """K/V of one layer, where several rows have read the same columns: these are held once.

    shared: keys and values of what was read, (distinct rows, heads, columns, head size) each.
    source: (B,), which of these rows each row has read. What follows is its own.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, source: torch.Tensor) -> None:
        super().__init__()
        self.shared = (keys, values)
        self.source = source

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own_keys, own_values = super().update(keys, values, *args, **kwargs)
        shared_keys, shared_values = map(self._of_all_rows, self.shared)
        return torch.cat([shared_keys, own_keys], -2), torch.cat([shared_values, own_values], -2)

    def _of_all_rows(self, part: torch.Tensor) -> torch.Tensor:
        if len(part) == 1:
            return part.expand(len(self.source), -1, -1, -1)
        return part[self.source]

    def get_seq_length(self) -> int:
        return int(self.shared[0].shape[-2] + super().get_seq_length())


class TorchRuntime(Chooser):
    """A loaded model and its checkpoint's files, ready to decode (see
    `lvr_lite.generate.runtime.Runtime`).

    model: transformers' model of a family in any dtype, on any device, plain or with 4-bit linears
        and adapters.
    kept: where visual tokens are kept; None where they are computed each time.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, kept: KeptTokens | None = None) -> None:
        self.kept = kept
        self.name = checkpoint.folder.name
        self.processor = checkpoint.processor
        self.latent = checkpoint.latent
        self.model = model
        self.core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.hidden_size = self.core.config.text_config.hidden_size

    @property
    def _weight(self) -> torch.Tensor:
        """The embedding's; inputs take its device and dtype."""
        return table_of(self.core)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        """Whole numbers on the model's device."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self._weight.device)

    def _to_model(self, array: np.ndarray) -> torch.Tensor:
        """Floats on the model's device, in its dtype."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self._weight)

    @torch.inference_mode()
    def encode(self, pixel_values: np.ndarray, grids: list[Grid]) -> np.ndarray:
        grid_thw = self._to_device(np.array([[1, *grid] for grid in grids]))
        pixels = torch.from_numpy(pixel_values)
        return _numpy(visual_tokens(self.core, pixels, grid_thw, self.kept))

    @torch.inference_mode()
    def embed(self, ids: np.ndarray) -> np.ndarray:
        embedding = self.core.get_input_embeddings()
        return _numpy(embedding(self._to_device(ids)))

    @torch.inference_mode()
    def head(self, hidden: np.ndarray) -> np.ndarray:
        logits = self.core.lm_head(self._to_model(hidden))
        return _numpy(logits)

    @torch.inference_mode()
    def choose(
        self,
        hidden: np.ndarray,
        closed: Sequence[Sequence[int]],
        at: Sequence[float],
        temperature: float,
        top_p: float,
    ) -> list[int]:
        """See `lvr_lite.generate.runtime.Chooser`. Raises NotFiniteError as `sampling.sample`."""
        logits = self.core.lm_head(self._to_model(hidden)).float()
        return self.drawn(logits, closed, at, temperature, top_p)

    @staticmethod
    @torch.inference_mode()
    def drawn(
        logits: torch.Tensor,
        closed: Sequence[Sequence[int]],
        at: Sequence[float],
        temperature: float,
        top_p: float,
    ) -> list[int]:
        """`choose` from logits (B, V) float32, which are changed."""
        for own, ids in zip(logits, closed, strict=True):
            own[list(ids)] = -torch.inf
        most = logits.amax(-1, keepdim=True)
        wrong = torch.isnan(most) if temperature == 0 else ~torch.isfinite(most)
        if wrong.any():
            raise not_finite(float(most[wrong][0]))
        if temperature == 0:
            return [int(id) for id in logits.argmax(-1)]
        # From here on in place: each array is as wide as the vocabulary. Lower temperatures are 0
        # in float32.
        p = logits.sub_(most).div_(max(temperature, 1e-30)).exp_()
        if top_p < 1.0:
            likely_first, order = p.sort(dim=-1, descending=True, stable=True)
            before = likely_first.cumsum(-1, dtype=torch.float64) - likely_first
            out_of_reach = before >= top_p * p.sum(-1, keepdim=True, dtype=torch.float64)
            p.scatter_(-1, order, likely_first.masked_fill(out_of_reach, 0.0))
        reached = p.cumsum(-1, dtype=torch.float64)
        drawn = torch.tensor(at, dtype=torch.float64, device=p.device)[:, None] * reached[:, -1:]
        return [int(id) for id in torch.searchsorted(reached, drawn, right=True)[:, 0]]

    def start(self, batch: int, capacity: int) -> None:  # noqa: ARG002 (K/V grows as it is needed)
        self._cache = DynamicCache(config=self.core.config.text_config)
        # Of all columns so far (B, columns): 1 where they are looked at.
        self._mask = torch.zeros(batch, 0, dtype=torch.long, device=self._weight.device)

    @torch.inference_mode()
    def keep(self, length: int) -> list[np.ndarray]:
        parts = [part for layer in self._cache.layers for part in (layer.keys, layer.values)]
        return [_numpy(part[:, :, :length]).copy() for part in parts]

    @torch.inference_mode()
    def put_back(self, kept: list[np.ndarray]) -> None:
        parts = [self._to_model(part) for part in kept]
        keys = parts[::2]
        values = parts[1::2]
        for layer, key in enumerate(keys):
            self._cache.update(key, values[layer], layer)
        length = kept[0].shape[2]
        self._mask = self._to_device(np.ones((1, length), np.int64))

    @torch.inference_mode()
    def prefill(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        rows: list[int] | None = None,
        past: int = 0,
    ) -> np.ndarray:
        batch = len(self._mask)
        width = embeds.shape[1]
        rows = list(range(batch)) if rows is None else rows
        if not past:
            if len(rows) == batch:
                return self._prefill_once(embeds, positions, lengths)
            # What these rows had is not looked at any more.
            self._mask[rows] = 0
        # The other rows are fed zeros meanwhile, which no one looks at.
        present = np.zeros((batch, width), bool)
        present[rows] = np.arange(width)[None] < lengths[:, None]
        all_embeds = np.zeros((batch, *embeds.shape[1:]), np.float32)
        all_embeds[rows] = embeds
        all_positions = np.zeros((3, batch, width), np.int64)
        all_positions[:, rows] = positions
        hidden = self._run(all_embeds, all_positions, present)  # (B, S, H)
        return np.asarray(hidden[rows, lengths - 1])

    def _prefill_once(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
    ) -> np.ndarray:
        """All rows. Those that read the same (several answers to one question) are read once and
        share the K/V of that.
        """
        contents = []
        for row, length in enumerate(lengths):
            own_embeds = embeds[row, :length]
            own_positions = positions[:, row, :length]
            contents.append((own_embeds.tobytes(), own_positions.tobytes()))
        kept, source = distinct(contents)
        width = embeds.shape[1]
        self.start(len(kept), width)
        lengths = lengths[kept]
        present = np.arange(width)[None] < lengths[:, None]
        hidden = self._run(embeds[kept], positions[:, kept], present)  # (rows kept, S, H)
        last = hidden[np.arange(len(kept)), lengths - 1]
        if len(kept) < len(source):
            rows = self._to_device(np.array(source))
            layers = self._cache.layers
            layers[:] = [SharedColumns(layer.keys, layer.values, rows) for layer in layers]
            self._mask = self._mask[source]
        return np.asarray(last[source])

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        batch = len(positions)
        on_all_axes = np.broadcast_to(positions[None, :, None], (3, batch, 1))
        hidden = self._run(embeds[:, None], on_all_axes, np.ones((batch, 1), bool))
        return hidden[:, 0]

    @torch.inference_mode()
    def _run(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        present: np.ndarray,
    ) -> np.ndarray:
        """Hidden states (B, S, H) of the next S columns; present (B, S): which are not padding."""
        more = self._to_device(present.astype(np.int64))
        self._mask = torch.cat([self._mask, more], 1)
        inputs = self._to_model(embeds)
        return _numpy(
            read(
                self.core,
                inputs,
                self._to_device(positions),
                self._mask,
                self._cache,
            )
        )


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(tensor.float().cpu().numpy())


def distinct(rows: Iterable[Hashable]) -> tuple[list[int], list[int]]:
    """The first place of each different row, and for every row which of these it is."""
    numbers: dict[Hashable, int] = {}
    firsts: list[int] = []
    source: list[int] = []
    for place, row in enumerate(rows):
        if row not in numbers:
            numbers[row] = len(firsts)
            firsts.append(place)
        source.append(numbers[row])
    return firsts, source


def table_of(core: Any) -> torch.Tensor:
    """The embedding's table (V, H) as the base has it. PEFT, asked for the weight of an embedding
    with trained rows, would copy the table to write these into it.
    """
    modules = core.get_input_embeddings().modules()
    table: torch.Tensor = next(m for m in modules if isinstance(m, torch.nn.Embedding)).weight
    return table


def visual_tokens(
    core: Any,
    pixel_values: torch.Tensor,
    grid_thw: torch.Tensor,
    kept: KeptTokens | None = None,
) -> torch.Tensor:
    """Visual tokens (T, H) of all pictures of a batch, or (T, (1 + D) * H) where D inner layers of
    the tower add something in later layers (deepstack).

    core: a transformers model.
    pixel_values: (N, C). grid_thw: (pictures, 3).
    kept: where they are looked up first, and kept.
    """
    tower = partial(_through_tower, core)
    if kept is None or not len(grid_thw):
        return tower(pixel_values, grid_thw)
    table = table_of(core)
    return kept.see(pixel_values, grid_thw, table.dtype, table.device, tower)


def _through_tower(core: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """`visual_tokens`, computed."""
    weight = table_of(core)
    family = families.get(core.config.model_type)
    grid_thw = grid_thw.to(weight.device)
    inputs = family.image_inputs(pixel_values.to(weight), grid_thw, core.config)
    output = core.model.get_image_features(**inputs)
    later = getattr(output, "deepstack_features", None) or ()
    parts = [_joined(part) for part in (output.pooler_output, *later)]
    return torch.cat(parts, -1)


def _joined(part: Any) -> torch.Tensor:
    """Some families give one tensor for all pictures, others one for each."""
    return part if isinstance(part, torch.Tensor) else torch.cat(list(part))


def language_model(core: Any) -> Any:
    """The part of a transformers model that reads embeddings, whatever its family calls it."""
    return getattr(core.model, families.get(core.config.model_type).language_model)


def read(
    core: Any,
    embeds: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
    cache: Any,
) -> torch.Tensor:
    """Final hidden states (B, S, H) of the language model.

    embeds: (B, S, H), or as wide as `visual_tokens`, with 0 beyond H for all else.
    positions: (3, B, S).
    mask: (B, all columns so far).
    cache: K/V of the columns before, or None.
    """
    width = core.config.text_config.hidden_size
    deepstack: dict[str, object] = {}
    if embeds.shape[-1] > width:
        embeds, *later = embeds.split(width, -1)
        # As if all were visual tokens; what the others add is 0.
        deepstack["visual_pos_masks"] = torch.ones(
            embeds.shape[:2], dtype=torch.bool, device=embeds.device
        )
        deepstack["deepstack_visual_embeds"] = [layer.flatten(0, 1) for layer in later]
    if families.get(core.config.model_type).position_axes == 1:
        positions = positions[0]
    output = language_model(core)(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        # It would make a cache where none is given; the one that is given is used either way.
        use_cache=False,
        **deepstack,
    )
    return torch.as_tensor(output.last_hidden_state)
