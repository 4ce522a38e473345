"""Supervised fine-tuning with latents (arXiv 2509.24251, stage 1). May import: torch, transformers, peft and the core.

inputs    … question <|lvr_start|> t1  t2 … tK <|lvr_end|> answer     t: visual tokens of the boxes (teacher forcing)
learned                 h0->t1  h1->t2 … hK->                         loss = CE(text) + λ · MSE(h_{i-1}, t_i) in fp32
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


class LatentSFT(torch.nn.Module):
    """A model and its training loss; the one forward pass of training. `core` is the transformers model inside any PEFT wrapper."""

    def __init__(self, model: Any, image_token: int, weight: float) -> None:
        super().__init__()
        self.model = model
        self.image_token, self.weight = image_token, weight

    @property
    def core(self) -> Any:
        return self.model.get_base_model()

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """A batch of `lvr_lite.train.batches.Collator` -> {"loss", "ce", "mse", "right"}; right: share of answer tokens predicted."""
        features = self._visual_tokens(batch["pixel_values"], batch["grid_thw"])
        targets = batch["pool"].to(features.dtype) @ features  # (L, H)
        embeds = self.core.get_input_embeddings()(batch["ids"])
        embeds = embeds.masked_scatter((batch["ids"] == self.image_token)[..., None], features.to(embeds.dtype))
        embeds = embeds.masked_scatter(batch["latent_at"][..., None], targets.to(embeds.dtype))
        hidden = self.core.model.language_model(
            inputs_embeds=embeds, position_ids=batch["positions"], attention_mask=batch["mask"], use_cache=False
        ).last_hidden_state
        labels = batch["labels"][:, 1:]
        spoken = labels != -100
        logits = self.core.lm_head(hidden[:, :-1][spoken]).float()  # the head sees the answer's positions alone
        ce = F.cross_entropy(logits, labels[spoken])
        mse = F.mse_loss(hidden[:, :-1][batch["latent_at"][:, 1:]].float(), targets.float())
        right = (logits.argmax(-1) == labels[spoken]).float().mean()
        return {"loss": ce + self.weight * mse, "ce": ce.detach(), "mse": mse.detach(), "right": right}

    @torch.no_grad()
    def _visual_tokens(self, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Visual tokens (T, H) of all pictures of the batch; tower and projector are frozen."""
        weight = self.core.get_input_embeddings().weight
        out = self.core.model.get_image_features(pixels.to(weight.dtype), grid)
        return torch.cat(list(out.pooler_output))
