"""Supervised fine-tuning with latents (arXiv 2509.24251, stage 1).

May import: torch, transformers, lvr_lite.model, lvr_lite.generate, lvr_lite.train.methods.

    inputs    … question <|lvr_start|> x1  x2 … xK <|lvr_end|> answer
    learned                 h0->t1  h1->t2 … hK->
    loss      CE(text) + λ · L(h_{i-1}, t_i), in fp32

t: visual tokens of the boxes; L: regression (the paper) or contrastive. What x is, the method says
(lvr_lite/train/methods.py). In a bottleneck the answer is read in a second pass over the prompt,
with the latents for its picture. Samples without boxes are answered at once (`latent.samples`), in
a pass of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional as F

from lvr_lite.config import LatentSettings
from lvr_lite.generate.torch import visual_tokens
from lvr_lite.model.latents import means, near
from lvr_lite.model.spec import TokenIds
from lvr_lite.train.methods import METHODS, Batch, Columns, Reader


@dataclass(frozen=True)
class Answers:
    """What one pass learns to say.

    states: (B, C, H) of its first C columns.
    labels: (B, S), -100 where nothing is learned.
    first: the number of its first sample in the whole batch.
    """

    states: torch.Tensor
    labels: torch.Tensor
    first: int

    @property
    def learned(self) -> torch.Tensor:
        """Which columns (B, S) are learned."""
        return self.labels != -100


class LatentSFT(Reader):
    """A model and its training loss; the one forward pass of training.

    norm: mean L2 norm of visual tokens, for norm-matched feedback.
    progress: the share of training that is done; 1 where nothing is trained.
    """

    def __init__(
        self, model: Any, tokens: TokenIds, settings: LatentSettings, norm: float = 0.0
    ) -> None:
        method = METHODS[settings.method]
        super().__init__(model, tokens, method.spec(settings, norm))
        self.settings = settings
        self.method = method
        self.progress = 1.0

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """A `Batch` -> {"loss", "ce", "latent", "right", "found"}.

        ce: cross-entropy of the learned tokens, averaged over each sample first and then over the
            samples, so that long answers do not outweigh short ones.
        latent: the loss of the latents.
        right: share of the learned tokens (markers, answer, end) that are predicted.
        found: share of latents that are nearest to a visual token of their own boxes among those of
            all of the batch's pictures.
        """
        batch = cast(Batch, inputs)
        # Vision tower and projector are frozen.
        with torch.no_grad():
            features = visual_tokens(self.core, batch["pixel_values"], batch["grid_thw"])
        # What of a visual token stands in the prompt; the rest is added in later layers.
        shown = features[:, : self.core.config.text_config.hidden_size]
        # The states that learn to be latents.
        predicted = shown[:0]
        answers: list[Answers] = []
        samples = 0
        tokens = 0
        if "ids" in batch:
            samples = len(batch["ids"])
            tokens = self._visual_tokens_of(batch["ids"])
            states, latents = self._look(batch, features, shown)
            answers.append(Answers(states, batch["labels"], 0))
            predicted = states_before(states, batch["target_at"])
            if self.spec.mode == "bottleneck":
                assert latents is not None
                states = self._read_again(latents, features, batch)
                answers.append(Answers(states, batch["reader_labels"], 0))
        for part in batch.get("direct", ()):
            states = self.states(self.embed(part["ids"], features[tokens:]), part)
            answers.append(Answers(states, part["labels"], samples))
            samples += len(part["ids"])
            tokens += self._visual_tokens_of(part["ids"])
        labels = torch.cat([spoken(part.states, part.labels) for part in answers])
        # The head sees only the states from which something is predicted.
        speaking = torch.cat([states_before(part.states, part.learned) for part in answers])
        logits = self.core.lm_head(speaking).float()
        speakers = torch.cat(
            [part.first + speakers_of(part.states, part.labels) for part in answers]
        )
        ce = mean_over_samples(F.cross_entropy(logits, labels, reduction="none"), speakers)
        loss, found = self._latent_loss(predicted.float(), shown.float(), batch["pool"])
        return {
            "loss": ce + self.latent_weight() * loss,
            "ce": ce.detach(),
            "latent": loss.detach(),
            "right": (logits.argmax(-1) == labels).float().mean(),
            "found": found,
        }

    def _look(
        self, batch: Batch, features: torch.Tensor, shown: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The pass over samples that look, as `Method.run` returns it."""
        targets = batch["pool"].to(shown.dtype) @ shown  # (L, H)
        forced = self.training and self.progress < self.settings.warmup
        return self.method.run(self, self.embed(batch["ids"], features), batch, targets, forced)

    def latent_weight(self) -> float:
        """λ now: that of the settings, and less and less of it over the last `relax` of the
        steps.
        """
        relax = self.settings.relax if self.training else 0.0
        return self.settings.weight * (min(1.0, (1 - self.progress) / relax) if relax else 1.0)

    def _latent_loss(
        self, predicted: torch.Tensor, features: torch.Tensor, pool: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of latents, and `found`.

        predicted: (L, H), states that should be the latents' targets.
        features: (T, H), the visual tokens of the whole batch.
        pool: (L, T), which makes the targets of them.
        """
        nothing = torch.zeros((), device=predicted.device)
        if not len(predicted):
            return nothing, nothing
        # The cosine of `lvr_lite.model.latents.likeness`, in another order of operations: vectors
        # are brought to length 1 before the product, so that published runs repeat to the last bit.
        apart = F.normalize(features - features.mean(0), dim=-1)
        cosines = F.normalize(predicted, dim=-1) @ apart.T / self.settings.temperature
        own = pool > 0
        found = own.gather(1, cosines.argmax(-1, keepdim=True)).float().mean()
        if self.settings.loss == "mse":
            return F.mse_loss(predicted, pool @ features), found
        if self.settings.loss == "contrastive":
            own_cosines = cosines.masked_fill(~own, -torch.inf)
            return (cosines.logsumexp(-1) - own_cosines.logsumexp(-1)).mean(), found
        return nothing, found

    def _visual_tokens_of(self, ids: torch.Tensor) -> int:
        return int((ids == self.tokens.image).sum())

    def _read_again(
        self, latents: torch.Tensor, features: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """The pass that reads the prompt with the latents (B, K, H) for its picture, and then the
        answer. Returns its hidden states (B, R, H).

        As in decoding, latents in one place become one, their mean. Here all K columns stay: the
        first latent in a place holds the mean, and the columns of the others are masked out.
        """
        is_image = batch["ids"] == self.tokens.image
        is_latent = batch["reader_ids"] == self.tokens.lvr
        positions = batch["reader_positions"].clone()
        mask = batch["reader_mask"].clone()
        counts = is_image.sum(1).tolist()
        pictures = features[: sum(counts)].detach().float().split(counts)
        means_of_rows = []
        for row, (picture, own) in enumerate(zip(pictures, latents, strict=True)):
            nearest = near(own.detach().float(), picture)
            weights, first = means(nearest)
            means_of_rows.append(weights.to(own.dtype) @ own)
            places = batch["positions"][:, row, is_image[row]][:, nearest]
            positions[:, row, is_latent[row]] = places
            mask[row, is_latent[row]] = first.to(mask.dtype)
        embeds = self.core.get_input_embeddings()(batch["reader_ids"])
        embeds = embeds.masked_scatter(is_latent[..., None], torch.stack(means_of_rows))
        return self.states(embeds, Columns(positions=positions, mask=mask))


def states_before(states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The states (n, H) from which the columns marked in `at` (B, S) are predicted, among the C
    columns of states (B, C, H).
    """
    columns = min(states.shape[1], at.shape[1] - 1)
    return states[:, :columns][at[:, 1 : columns + 1]]


def spoken(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The labels (n,) that `states_before` predicts."""
    within = labels[:, 1 : states.shape[1] + 1]
    return within[within != -100]


def speakers_of(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The rows (n,) of the labels that `spoken` gives."""
    return (labels[:, 1 : states.shape[1] + 1] != -100).nonzero()[:, 0]


def mean_over_samples(losses: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """The mean over samples of each one's mean loss.

    losses: (n,). samples: (n,), the sample of each.
    """
    counts = torch.bincount(samples)
    return (losses / counts[samples]).sum() / (counts > 0).sum()
