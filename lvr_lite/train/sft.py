"""Supervised fine-tuning with latents (arXiv 2509.24251, stage 1).

May import: torch, transformers, lvr_lite.model, lvr_lite.generate, lvr_lite.train.methods,
lvr_lite.train.head.

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
from lvr_lite.generate.kept_tokens import KeptTokens
from lvr_lite.generate.torch import visual_tokens
from lvr_lite.model.latents import means, near
from lvr_lite.model.spec import TokenIds
from lvr_lite.train.head import Head, without_autocast
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
    def speaking(self) -> torch.Tensor:
        """The states (n, H) from which something is predicted; the head sees no others."""
        return states_before(self.states, self.labels != -100)

    @property
    def _within(self) -> torch.Tensor:
        """The labels that the states predict, each the one of the column after it."""
        columns = self.states.shape[1]
        return self.labels[:, 1 : columns + 1]

    @property
    def spoken(self) -> torch.Tensor:
        """The labels (n,) that the speaking states predict."""
        within = self._within
        return within[within != -100]

    @property
    def speakers(self) -> torch.Tensor:
        """The samples (n,) of these labels."""
        learned = self._within != -100
        return self.first + learned.nonzero()[:, 0]


class LatentSFT(Reader):
    """A model and its training loss; the one forward pass of training.

    norm: mean L2 norm of visual tokens, for norm-matched feedback.
    progress: the share of training that is done; 1 where nothing is trained.
    kept: where visual tokens are kept; None where they are computed each time.
    """

    def __init__(
        self,
        model: Any,
        tokens: TokenIds,
        settings: LatentSettings,
        norm: float = 0.0,
        kept: KeptTokens | None = None,
    ) -> None:
        method = METHODS[settings.method]
        super().__init__(model, tokens, method.spec(settings, norm))
        self.settings = settings
        self.method = method
        self.progress = 1.0
        self.kept = kept

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
            features = visual_tokens(self.core, batch["pixel_values"], batch["grid_thw"], self.kept)
        answers: list[Answers] = []
        # The states (L, H) that learn to be latents.
        predicted = features[:0]
        if "ids" in batch:
            answers += self._look(batch, features)
            predicted = states_before(answers[0].states, batch["target_at"])
        answers += self._answer_at_once(batch, features)
        labels = torch.cat([part.spoken for part in answers])
        speakers = torch.cat([part.speakers for part in answers])
        speaking = torch.cat([part.speaking for part in answers])
        scores, right = Head(self.core.lm_head).scores(speaking, labels)
        ce = mean_over_samples(-scores, speakers)
        loss, found = self._latent_loss(predicted, self._shown(features), batch["pool"])
        return {
            "loss": ce + self.latent_weight() * loss,
            "ce": ce.detach(),
            "latent": loss.detach(),
            "right": right.float().mean(),
            "found": found,
        }

    def _shown(self, features: torch.Tensor) -> torch.Tensor:
        """What of visual tokens stands in the prompt (T, H); the rest is added in later layers."""
        width = self.core.config.text_config.hidden_size
        return features[:, :width]

    def _look(self, batch: Batch, features: torch.Tensor) -> list[Answers]:
        """The samples that look: one pass, and in a bottleneck a second one."""
        shown = self._shown(features)
        with without_autocast(shown):
            targets = batch["pool"] @ shown.float()  # (L, H)
        embeds = self.embed(batch["ids"], features)
        forced = self.training and self.progress < self.settings.warmup
        states, latents = self.method.run(self, embeds, batch, targets, forced)
        answers = [Answers(states, batch["labels"], first=0)]
        if self.spec.mode == "bottleneck":
            assert latents is not None
            states = self._read_again(latents, features, batch)
            answers.append(Answers(states, batch["reader_labels"], first=0))
        return answers

    def _answer_at_once(self, batch: Batch, features: torch.Tensor) -> list[Answers]:
        """The other samples, whose pictures come after those of the samples that look."""
        samples = 0
        tokens = 0
        if "ids" in batch:
            samples = len(batch["ids"])
            tokens = self._visual_tokens_of(batch["ids"])
        answers = []
        for part in batch.get("direct", ()):
            embeds = self.embed(part["ids"], features[tokens:])
            answers.append(Answers(self.states(embeds, part), part["labels"], samples))
            samples += len(part["ids"])
            tokens += self._visual_tokens_of(part["ids"])
        return answers

    def latent_weight(self) -> float:
        """λ now: that of the settings, and less and less of it over the last `relax` of the
        steps.
        """
        weight = self.settings.weight
        relax = self.settings.relax
        if not (relax and self.training):
            return weight
        left = (1 - self.progress) / relax
        return weight * min(1.0, left)

    def _latent_loss(
        self,
        predicted: torch.Tensor,
        features: torch.Tensor,
        pool: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of latents, and `found`, in fp32 whatever the rest is computed in.

        predicted: (L, H), states that should be the latents' targets.
        features: (T, H), the visual tokens of the whole batch.
        pool: (L, T), which makes the targets of them.
        """
        nothing = torch.zeros((), device=predicted.device)
        if not len(predicted):
            return nothing, nothing
        with without_autocast(predicted):
            return self._compared(predicted.float(), features.float(), pool)

    def _compared(
        self, predicted: torch.Tensor, features: torch.Tensor, pool: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_latent_loss` of tensors in fp32."""
        # The cosine of `lvr_lite.model.latents.likeness`, in another order of operations: vectors
        # are brought to length 1 before the product, so that published runs repeat to the last bit.
        apart = F.normalize(features - features.mean(0), dim=-1)
        directions = F.normalize(predicted, dim=-1)
        cosines = directions @ apart.T / self.settings.temperature
        own = pool > 0
        nearest = cosines.argmax(-1, keepdim=True)
        found = own.gather(1, nearest).float().mean()
        loss = torch.zeros((), device=predicted.device)
        if self.settings.loss == "mse":
            loss = F.mse_loss(predicted, pool @ features)
        if self.settings.loss == "contrastive":
            own_cosines = cosines.masked_fill(~own, -torch.inf)
            losses = cosines.logsumexp(-1) - own_cosines.logsumexp(-1)
            loss = losses.mean()
        return loss, found

    def _visual_tokens_of(self, ids: torch.Tensor) -> int:
        is_image = ids == self.tokens.image
        return int(is_image.sum())

    def _read_again(
        self,
        latents: torch.Tensor,
        features: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        """The pass that reads the prompt with the latents (B, K, H) for its picture, and then the
        answer. Returns its hidden states (B, R, H).

        As in decoding, latents in one place become one, their mean. Here all K columns stay: the
        first latent in a place holds the mean, and the columns of the others are masked out.
        Which place is the nearest, and the mean, is computed in fp32, as in decoding.
        """
        is_image = batch["ids"] == self.tokens.image
        is_latent = batch["reader_ids"] == self.tokens.lvr
        positions = batch["reader_positions"].clone()
        mask = batch["reader_mask"].clone()
        counts = is_image.sum(1).tolist()
        shown = features[: sum(counts)].detach().float()
        pictures = shown.split(counts)
        placed = []
        for row, own in enumerate(latents.float()):
            with without_autocast(own):
                nearest = near(own.detach(), pictures[row])
                weights, first = means(nearest)
                placed.append(weights @ own)
            of_image = batch["positions"][:, row, is_image[row]]
            columns = is_latent[row]
            positions[:, row, columns] = of_image[:, nearest]
            mask[row, columns] = first.to(mask.dtype)
        embedding = self.core.get_input_embeddings()
        embeds = embedding(batch["reader_ids"])
        latents = torch.stack(placed).to(embeds.dtype)
        embeds = embeds.masked_scatter(is_latent[..., None], latents)
        return self.states(embeds, Columns(positions=positions, mask=mask))


def states_before(states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The states (n, H) from which the columns marked in `at` (B, S) are predicted, among the C
    columns of states (B, C, H).
    """
    columns = min(states.shape[1], at.shape[1] - 1)
    predicting = at[:, 1 : columns + 1]
    return states[:, :columns][predicting]


def mean_over_samples(losses: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """The mean over samples of each one's mean loss.

    losses: (n,). samples: (n,), the sample of each.
    """
    counts = torch.bincount(samples)
    shares = losses / counts[samples]
    present = counts > 0
    return shares.sum() / present.sum()
