"""The reference runtime: a transformers model under torch. May import: torch, transformers and the
core (workshop only).

It computes what the device runtime must equal: right-padded prompts, K/V that grows, padding masked
out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import torch

from lvr_lite.model import families
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.model.families import Grid


class TorchRuntime:
    """A loaded model and its checkpoint's files, ready to decode (see
    `lvr_lite.generate.runtime.Runtime`).

    model: transformers' model of a family in any dtype, on any device, plain or with 4-bit linears
    and adapters.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self.name = checkpoint.folder.name
        self.processor = checkpoint.processor
        self.latent = checkpoint.latent
        self.model = model
        self.core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.hidden_size = self.core.config.text_config.hidden_size

    @property
    def _place(self) -> dict[str, Any]:
        weight = self.core.get_input_embeddings().weight
        return {"device": weight.device, "dtype": weight.dtype}

    @torch.inference_mode()
    def encode(self, pixel_values: np.ndarray, grids: list[Grid]) -> np.ndarray:
        grid = torch.tensor([[1, *g] for g in grids], device=self._place["device"])
        return np.asarray(
            visual_tokens(self.core, torch.from_numpy(pixel_values), grid).float().cpu().numpy()
        )

    @torch.inference_mode()
    def embed(self, ids: np.ndarray) -> np.ndarray:
        embeds = self.core.get_input_embeddings()(torch.from_numpy(ids).to(self._place["device"]))
        return np.asarray(embeds.float().cpu().numpy())

    @torch.inference_mode()
    def head(self, hidden: np.ndarray) -> np.ndarray:
        return np.asarray(
            self.core.lm_head(torch.from_numpy(hidden).to(**self._place)).float().cpu().numpy()
        )

    def start(self, batch: int, capacity: int) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.core.config.text_config)
        self._mask = torch.zeros(batch, 0, dtype=torch.long, device=self._place["device"])

    @torch.inference_mode()
    def keep(self, length: int) -> list[np.ndarray]:
        return [
            part[:, :, :length].float().cpu().numpy().copy()
            for layer in self._cache.layers
            for part in (layer.keys, layer.values)
        ]

    @torch.inference_mode()
    def put_back(self, kept: list[np.ndarray]) -> None:
        parts = [torch.from_numpy(part).to(**self._place) for part in kept]
        for layer in range(len(parts) // 2):
            self._cache.update(parts[2 * layer], parts[2 * layer + 1], layer)
        self._mask = torch.ones(1, kept[0].shape[2], dtype=torch.long, device=self._place["device"])

    @torch.inference_mode()
    def prefill(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        rows: list[int] | None = None,
        past: int = 0,
    ) -> np.ndarray:
        batch, longest = len(self._mask), embeds.shape[1]
        again = list(range(batch)) if rows is None else rows
        if not past:
            if len(again) == batch:
                return self._prefill_once(embeds, positions, lengths)
            self._mask[again] = 0  # what these rows had is not looked at any more
        real = np.zeros((batch, longest), bool)
        real[again] = np.arange(longest)[None] < lengths[:, None]
        every, where = (
            np.zeros((batch, *embeds.shape[1:]), np.float32),
            np.zeros((3, batch, longest), np.int64),
        )
        every[again], where[:, again] = embeds, positions
        return np.asarray(self._run(every, where, real)[again, lengths - 1])

    def _prefill_once(
        self, embeds: np.ndarray, positions: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """All rows; those that read the same (several answers to one question) are read once and
        their K/V copied.
        """
        kept, source = distinct(
            (embeds[i, :n].tobytes(), positions[:, i, :n].tobytes()) for i, n in enumerate(lengths)
        )
        self.start(len(kept), embeds.shape[1])
        real = np.arange(embeds.shape[1])[None] < lengths[kept, None]
        states = self._run(embeds[kept], positions[:, kept], real)[
            np.arange(len(kept)), lengths[kept] - 1
        ]
        if len(kept) < len(source):
            self._cache.batch_select_indices(torch.tensor(source, device=self._place["device"]))
            self._mask = self._mask[source]
        return np.asarray(states[source])

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        everywhere = np.broadcast_to(positions[None, :, None], (3, len(positions), 1))
        return self._run(embeds[:, None], everywhere, np.ones((len(positions), 1), bool))[:, 0]

    @torch.inference_mode()
    def _run(self, embeds: np.ndarray, positions: np.ndarray, real: np.ndarray) -> np.ndarray:
        device = self._place["device"]
        self._mask = torch.cat([self._mask, torch.from_numpy(real.astype(np.int64)).to(device)], 1)
        fed = torch.from_numpy(np.ascontiguousarray(embeds)).to(**self._place)
        states = read(
            self.core,
            fed,
            torch.from_numpy(np.ascontiguousarray(positions)).to(device),
            self._mask,
            self._cache,
        )
        return np.asarray(states.float().cpu().numpy())


def distinct(rows: Iterable[Hashable]) -> tuple[list[int], list[int]]:
    """The first place of each different row, and for every row which of these it is."""
    first: dict[Hashable, int] = {}
    source = [first.setdefault(row, len(first)) for row in rows]
    return [source.index(i) for i in range(len(first))], source


def visual_tokens(core: Any, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """Visual tokens (T, H) of all pictures of a batch; (T, (1 + D) * H) where D inner layers of the
    tower have a say (deepstack).
    """
    weight = core.get_input_embeddings().weight
    family = families.get(core.config.model_type)
    out = core.model.get_image_features(
        **family.image_inputs(pixel_values.to(weight), grid_thw.to(weight.device), core.config)
    )
    parts = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
    return torch.cat(
        [part if isinstance(part, torch.Tensor) else torch.cat(list(part)) for part in parts], -1
    )


def language_model(core: Any) -> Any:
    """The part of a transformers model that reads embeddings, whatever its family calls it."""
    return getattr(core.model, families.get(core.config.model_type).language_model)


def read(
    core: Any, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Any
) -> torch.Tensor:
    """Final hidden states (B, S, H) of the language model. embeds (B, S, H), or as wide as
    `visual_tokens`, with 0 beyond H for all else; positions (3, B, S); mask (B, all columns so
    far); cache: K/V of the columns before, or None.
    """
    width = core.config.text_config.hidden_size
    added: dict[str, Any] = {}
    if embeds.shape[-1] > width:
        embeds, *deepstack = embeds.split(width, -1)
        everywhere = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        added = {
            "visual_pos_masks": everywhere,
            "deepstack_visual_embeds": [d.flatten(0, 1) for d in deepstack],
        }
    if families.get(core.config.model_type).position_axes == 1:
        positions = positions[0]
    out = language_model(core)(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
        **added,
    )
    return torch.as_tensor(out.last_hidden_state)
