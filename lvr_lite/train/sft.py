"""Supervised fine-tuning with latents (arXiv 2509.24251, stage 1). May import: torch, transformers and the core.

    inputs    … question <|lvr_start|> x1  x2 … xK <|lvr_end|> answer
    learned                 h0->t1  h1->t2 … hK->                         loss = CE(text) + λ · MSE(h_{i-1}, t_i) in fp32

t: visual tokens of the boxes. x: t itself ("teacher": the paper), or h_{i-1} ("free": what is fed when running, so that training and
running do not differ; that they do costs accuracy, docs/results/tuning.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from lvr_lite.config import LatentSettings


class LatentSFT(torch.nn.Module):
    """A model and its training loss; the one forward pass of training. `core` is the transformers model inside any PEFT wrapper."""

    def __init__(self, model: Any, image_token: int, settings: LatentSettings) -> None:
        super().__init__()
        self.model = model
        self.image_token, self.settings = image_token, settings

    @property
    def core(self) -> Any:
        return self.model.get_base_model()

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """A batch of `lvr_lite.train.batches.Collator` -> {"loss", "ce", "mse", "right"}.

        right: share of the response's tokens (markers, answer, end) predicted, fed what `settings.inputs` says.
        """
        features = self._visual_tokens(batch["pixel_values"], batch["grid_thw"])
        targets = batch["pool"].to(features.dtype) @ features  # (L, H)
        embeds = self.core.get_input_embeddings()(batch["ids"])
        embeds = embeds.masked_scatter((batch["ids"] == self.image_token)[..., None], features.to(embeds.dtype))
        if self.settings.inputs == "free":
            hidden = self._run_freely(embeds, batch)
        else:
            embeds = embeds.masked_scatter(batch["latent_at"][..., None], targets.to(embeds.dtype))
            hidden = self._states(embeds, batch, slice(0, embeds.shape[1]))
        labels = batch["labels"][:, 1:]
        spoken = labels != -100
        logits = self.core.lm_head(hidden[:, :-1][spoken]).float()  # the head sees the answer's positions alone
        ce = F.cross_entropy(logits, labels[spoken])
        mse = F.mse_loss(hidden[:, :-1][batch["latent_at"][:, 1:]].float(), targets.float())
        right = (logits.argmax(-1) == labels[spoken]).float().mean()
        return {"loss": ce + self.settings.weight * mse, "ce": ce.detach(), "mse": mse.detach(), "right": right}

    def _states(self, embeds: torch.Tensor, batch: dict[str, torch.Tensor], span: slice, cache: Any = None) -> torch.Tensor:
        """Final hidden states of the columns `span`, whose inputs are `embeds`, given the columns before it in `cache`."""
        out = self.core.model.language_model(
            inputs_embeds=embeds,
            position_ids=batch["positions"][:, :, span],
            attention_mask=batch["mask"][:, : span.stop],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return torch.as_tensor(out.last_hidden_state)

    def _run_freely(self, embeds: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Hidden states (B, S, H) where each latent step is fed the state before it; responses begin with <|lvr_start|> in one column."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.core.config.text_config)
        first = int(batch["response"]) + 1
        last = first + self.settings.steps
        states = [self._states(embeds[:, :first], batch, slice(0, first), cache)]
        for column in range(first, last):
            states.append(self._states(states[-1][:, -1:].to(embeds.dtype), batch, slice(column, column + 1), cache))
        states.append(self._states(embeds[:, last:], batch, slice(last, embeds.shape[1]), cache))
        return torch.cat(states, 1)

    @torch.no_grad()
    def _visual_tokens(self, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Visual tokens (T, H) of all pictures of the batch; tower and projector are frozen."""
        weight = self.core.get_input_embeddings().weight
        out = self.core.model.get_image_features(pixels.to(weight.dtype), grid)
        return torch.cat(list(out.pooler_output))
