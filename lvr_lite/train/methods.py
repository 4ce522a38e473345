"""The methods of training with latents: what the latent places are fed, and what the text sees. May
import: torch, the core.

    sft             no latents: the control with the same data
    dummy           K times the learned row of <|lvr|>: the control with the same compute
    lvr             the targets, visual tokens of the boxes: the paper (arXiv 2509.24251, stage 1)
    lvr-free        the model's own hidden states, as when running, with gradients of the answer through all K steps
    lvr-bottleneck  the same, and the answer is read from the question and the latents alone

A method is one small class; the forward pass, the losses and the trainer are the same for all
(lvr_lite/train/sft.py).
"""

from __future__ import annotations

from typing import Any

import torch

from lvr_lite.config import LatentSettings
from lvr_lite.generate.torch import language_model, read
from lvr_lite.model.spec import LatentSpec, TokenIds

Batch = dict[str, Any]  # of `lvr_lite.train.batches.Collator`


class Reader(torch.nn.Module):
    """A model that is trained, as what reads embeddings. `core` is the transformers model inside
    any PEFT wrapper.
    """

    def __init__(self, model: Any, tokens: TokenIds, spec: LatentSpec) -> None:
        super().__init__()
        self.model = model
        self.tokens, self.spec = tokens, spec

    @property
    def core(self) -> Any:
        return self.model.get_base_model()

    def states(
        self, embeds: torch.Tensor, batch: Batch, first: int = 0, cache: Any = None
    ) -> torch.Tensor:
        """Hidden states (B, C, H) of C columns from `first` on, whose inputs are `embeds`; the
        columns before them are in `cache`.
        """
        stop = first + embeds.shape[1]
        return read(
            self.core, embeds, batch["positions"][:, :, first:stop], batch["mask"][:, :stop], cache
        )

    def new_cache(self) -> Any:
        """A K/V cache, or None where gradient checkpointing leaves none and columns are read again
        instead.
        """
        from transformers import DynamicCache

        if language_model(self.core).is_gradient_checkpointing and self.training:
            return None
        return DynamicCache(config=self.core.config.text_config)


class Method:
    """`sft`. latents: whether responses have latent places; targeted: whether these have targets;
    feedback, mode: as in LatentSpec, None for the settings' feedback.
    """

    latents = False
    targeted = False
    feedback: str | None = None
    mode = "open"

    def spec(self, settings: LatentSettings, norm: float) -> LatentSpec:
        """What runs after training. norm: mean L2 norm of visual tokens, which norm-matched
        feedback takes.
        """
        if not self.latents:
            return LatentSpec()
        feedback = self.feedback or settings.feedback
        return LatentSpec(
            settings.steps, feedback, self.mode, norm if feedback == "norm-matched" else 0.0
        )

    def run(
        self,
        reader: Reader,
        embeds: torch.Tensor,
        batch: Batch,
        targets: torch.Tensor,
        forced: bool,
    ) -> tuple[torch.Tensor, Any]:
        """(hidden states (B, C, H) of the first C columns, what the latent places were fed (B, K,
        H)).

        embeds: inputs (B, S, H), the embedding of <|lvr|> at the latent places; targets (L, H) in
        reading order; forced: feed the targets (warm-up of the methods that run freely).
        """
        return reader.states(embeds, batch), None


class Dummy(Method):
    latents, feedback = True, "token"


class TeacherForced(Method):
    latents = targeted = True

    def run(
        self,
        reader: Reader,
        embeds: torch.Tensor,
        batch: Batch,
        targets: torch.Tensor,
        forced: bool,
    ) -> tuple[torch.Tensor, Any]:
        return reader.states(with_targets(reader, embeds, batch, targets), batch), None


class Free(Method):
    latents = targeted = True

    def run(
        self,
        reader: Reader,
        embeds: torch.Tensor,
        batch: Batch,
        targets: torch.Tensor,
        forced: bool,
    ) -> tuple[torch.Tensor, Any]:
        first, steps = int(batch["response"]) + 1, reader.spec.steps
        # The last latent is for the text; in a bottleneck the text is read elsewhere, and this pass
        # ends before it.
        columns = embeds.shape[1] if self.mode == "open" else first + steps - 1
        if forced:
            filled = with_targets(reader, embeds, batch, targets)
            return reader.states(filled[:, :columns], batch), filled[
                :, first : first + steps, : targets.shape[-1]
            ]
        return run_freely(reader, embeds[:, :columns], batch, first, steps)


class Bottleneck(Free):
    mode = "bottleneck"


METHODS: dict[str, Method] = {
    "sft": Method(),
    "dummy": Dummy(),
    "lvr": TeacherForced(),
    "lvr-free": Free(),
    "lvr-bottleneck": Bottleneck(),
}


def with_targets(
    reader: Reader, embeds: torch.Tensor, batch: Batch, targets: torch.Tensor
) -> torch.Tensor:
    """Inputs (B, S, H) with the targets at the places that have one, as they would be fed back."""
    return embeds.masked_scatter(
        batch["target_at"][..., None], as_wide(reader.spec.fed(targets).to(embeds.dtype), embeds)
    )


def as_wide(vectors: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Vectors (…, H) with zeros beyond, as wide as those of `like`: only visual tokens have
    something for later layers.
    """
    return torch.nn.functional.pad(vectors, (0, like.shape[-1] - vectors.shape[-1]))


def run_freely(
    reader: Reader, embeds: torch.Tensor, batch: Batch, first: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of all columns of `embeds` (B, C, H), where each latent step is fed the state
    before it, and the latents (B, K, H).

    Latent places are the `steps` columns from `first` on, in every row; C may end before the last
    one. Without a cache all columns so far are read again at every step: (K + 1) times the work,
    for the memory of gradient checkpointing.
    """
    cache, end = reader.new_cache(), embeds.shape[1]
    states = [reader.states(embeds[:, :first], batch, 0, cache)]
    latents: list[torch.Tensor] = []
    for column in range(first, first + steps):
        latents.append(as_wide(reader.spec.fed(states[-1][:, -1:]).to(embeds.dtype), embeds))
        if column == end:
            break
        if cache is None:
            states = [reader.states(torch.cat([embeds[:, :first], *latents], 1), batch)]
        else:
            states.append(reader.states(latents[-1], batch, column, cache))
    if end > first + steps:
        rest = embeds[:, first + steps :]
        if cache is None:
            states = [reader.states(torch.cat([embeds[:, :first], *latents, rest], 1), batch)]
        else:
            states.append(reader.states(rest, batch, first + steps, cache))
    return torch.cat(states, 1), torch.cat(latents, 1)[..., : states[0].shape[-1]]
