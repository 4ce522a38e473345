"""The methods of training with latents: what the latent places are fed, and what the text sees.

May import: torch, lvr_lite.model, lvr_lite.generate, lvr_lite.train.recompute.

    sft             no latents: the control with the same data
    dummy           K times the learned row of <|lvr|>: the control with the same compute
    lvr             the targets, visual tokens of the boxes: the paper (arXiv 2509.24251, stage 1)
    lvr-free        the model's own hidden states, as when running; the answer's gradient goes
                    through all K steps
    lvr-bottleneck  the same, and the answer is read from the question and the latents alone

A method is one small class; the forward pass, the losses and the trainer are the same for all
(lvr_lite/train/sft.py).
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch

from lvr_lite.config import LatentSettings
from lvr_lite.generate.torch import language_model, read
from lvr_lite.model.spec import LatentSpec, TokenIds
from lvr_lite.train import recompute


class Columns(TypedDict):
    """What every pass needs beside its inputs.

    positions: (3, B, S).
    mask: (B, S), 1 where a column is looked at.
    """

    positions: torch.Tensor
    mask: torch.Tensor


class Batch(Columns, total=False):
    """What `lvr_lite.train.batches.Collator` makes of samples. It is a dict, for transformers'
    Trainer moves dicts of tensors to the device and gives them to the model as keywords.

    ids: (B, S) int64, of the B samples that look.
    labels: (B, S) int64, -100 where nothing is learned.
    target_at: (B, S) bool, the latent places that have a target.
    response: (), the column in which all responses begin.
    reader_ids, reader_labels, reader_mask: (B, R), reader_positions: (3, B, R): the second reading
        of a bottleneck.
    direct: samples that are answered at once, each part with the fields above.

    Of the whole batch:
    pool: (L, T) float32, which turns the T visual tokens into the L targets, in reading order of
        target_at.
    pixel_values: (N, C) float32.
    grid_thw: (pictures, 3) int64.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    target_at: torch.Tensor
    response: torch.Tensor
    reader_ids: torch.Tensor
    reader_labels: torch.Tensor
    reader_mask: torch.Tensor
    reader_positions: torch.Tensor
    direct: list[Batch]
    pool: torch.Tensor
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor


class Reader(torch.nn.Module):
    """A model that is trained, as what reads embeddings.

    core: the transformers model inside any PEFT wrapper.
    checkpoints: whether its layers are computed again in the backward pass (gradient
        checkpointing), as set when the reader is made.
    """

    def __init__(self, model: Any, tokens: TokenIds, spec: LatentSpec) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens
        self.spec = spec
        # Asking walks through all modules: 3 % of a step of a small model.
        self.checkpoints = bool(language_model(self.core).is_gradient_checkpointing)
        recompute.hand_out_columns(language_model(self.core), self.checkpoints)

    @property
    def core(self) -> Any:
        return self.model.get_base_model()

    def embed(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Inputs (B, S, H) of ids (B, S), or as wide as `features`.

        features: (T, H or wider), one for each image token, in reading order.
        """
        embeds = as_wide(self.core.get_input_embeddings()(ids), features)
        is_image = (ids == self.tokens.image)[..., None]
        return embeds.masked_scatter(is_image, features.to(embeds.dtype))

    def states(
        self,
        embeds: torch.Tensor,
        batch: Columns,
        first: int = 0,
        cache: Any = None,
    ) -> torch.Tensor:
        """Hidden states (B, C, H) of C columns from `first` on.

        embeds: (B, C, H), their inputs.
        cache: K/V of the columns before them.
        """
        stop = first + embeds.shape[1]
        positions = batch["positions"][:, :, first:stop]
        return read(
            self.core,
            embeds,
            positions,
            batch["mask"][:, :stop],
            cache,
        )

    def new_cache(self) -> Any:
        """A K/V cache for a pass in several parts."""
        from transformers import DynamicCache

        if self.checkpoints and self.training:
            return recompute.new_cache(language_model(self.core))
        return DynamicCache(config=self.core.config.text_config)


class Method:
    """`sft`, and what the others share.

    latents: whether responses have latent places.
    targeted: whether these have targets.
    feedback, mode: as in LatentSpec; without a feedback that of the settings.
    """

    latents = False
    targeted = False
    feedback: str | None = None
    mode = "open"

    def spec(self, settings: LatentSettings, norm: float) -> LatentSpec:
        """The latent loop that the model runs after training.

        norm: mean L2 norm of visual tokens, which norm-matched feedback takes.
        """
        if not self.latents:
            return LatentSpec()
        feedback = self.feedback or settings.feedback
        if feedback != "norm-matched":
            norm = 0.0
        return LatentSpec(settings.steps, feedback, self.mode, norm)

    def run(
        self,
        reader: Reader,
        embeds: torch.Tensor,
        batch: Batch,
        targets: torch.Tensor,  # noqa: ARG002
        forced: bool,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One pass over a batch.

        embeds: (B, S, H), inputs with the embedding of <|lvr|> at the latent places.
        targets: (L, H), in reading order.
        forced: feed the targets (the warm-up of the methods that run freely).

        Returns the hidden states (B, C, H) of the first C columns, and what the latent places were
        fed (B, K, H), or None where no one needs it.
        """
        return reader.states(embeds, batch), None


class Dummy(Method):
    latents = True
    feedback = "token"


class TeacherForced(Method):
    latents = True
    targeted = True

    def run(
        self,
        reader: Reader,
        embeds: torch.Tensor,
        batch: Batch,
        targets: torch.Tensor,
        forced: bool,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return reader.states(with_targets(reader, embeds, batch, targets), batch), None


class Free(Method):
    latents = True
    targeted = True

    def run(
        self,
        reader: Reader,
        embeds: torch.Tensor,
        batch: Batch,
        targets: torch.Tensor,
        forced: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        first = int(batch["response"]) + 1
        end = first + reader.spec.steps
        # The last latent is for the text; in a bottleneck the text is read elsewhere, and this pass
        # ends before it.
        columns = embeds.shape[1] if self.mode == "open" else end - 1
        if not forced:
            return run_freely(
                reader,
                embeds[:, :columns],
                batch,
                first,
                reader.spec.steps,
            )
        filled = with_targets(reader, embeds, batch, targets)
        states = reader.states(filled[:, :columns], batch)
        return states, filled[:, first:end, : targets.shape[-1]]


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
    fed = reader.spec.fed(targets).to(embeds.dtype)
    return embeds.masked_scatter(batch["target_at"][..., None], as_wide(fed, embeds))


def as_wide(vectors: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Vectors (…, H) with zeros beyond, as wide as those of `like`: only visual tokens have
    something for later layers.
    """
    return torch.nn.functional.pad(vectors, (0, like.shape[-1] - vectors.shape[-1]))


def run_freely(
    reader: Reader,
    embeds: torch.Tensor,
    batch: Columns,
    first: int,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pass in which each latent step is fed the state before it. Every column is read once.

    embeds: (B, C, H).
    first, steps: the latent places are the `steps` columns from `first` on, in every row; C may end
        before the last one.

    Returns the hidden states (B, C, H), and the latents (B, K, H).
    """
    cache = reader.new_cache()
    end = embeds.shape[1]
    states = [reader.states(embeds[:, :first], batch, 0, cache)]
    latents: list[torch.Tensor] = []
    for column in range(first, first + steps):
        latents.append(reader.spec.fed(states[-1][:, -1:]).to(embeds.dtype))
        if column < end:
            fed = as_wide(latents[-1], embeds)
            states.append(reader.states(fed, batch, column, cache))
    if end > first + steps:
        rest = embeds[:, first + steps :]
        states.append(reader.states(rest, batch, first + steps, cache))
    return torch.cat(states, 1), torch.cat(latents, 1)
