"""Supervised fine-tuning with latents (arXiv 2509.24251, stage 1). May import: torch, transformers
and the core.

    inputs    … question <|lvr_start|> x1  x2 … xK <|lvr_end|> answer
    learned                 h0->t1  h1->t2 … hK->                         loss = CE(text) + λ · L(h_{i-1}, t_i) in fp32

t: visual tokens of the boxes; L: regression (the paper) or contrastive. What x is, the method says
(lvr_lite/train/methods.py). In a bottleneck the answer is read in a second pass over the prompt,
whose picture the latents then are. Samples without boxes are answered at once (`latent.samples`),
in a pass of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from lvr_lite.config import LatentSettings
from lvr_lite.generate.torch import visual_tokens
from lvr_lite.model.latents import likeness
from lvr_lite.model.spec import TokenIds
from lvr_lite.train.methods import METHODS, Batch, Reader, as_wide


class LatentSFT(Reader):
    """A model and its training loss; the one forward pass of training.

    norm: mean L2 norm of visual tokens, for norm-matched feedback. progress: share of the training
    done, 1 where it is not trained.
    """

    def __init__(
        self, model: Any, tokens: TokenIds, settings: LatentSettings, norm: float = 0.0
    ) -> None:
        method = METHODS[settings.method]
        super().__init__(model, tokens, method.spec(settings, norm))
        self.settings, self.method = settings, method
        self.progress = 1.0

    def forward(self, **batch: Any) -> dict[str, torch.Tensor]:
        """A batch of `lvr_lite.train.batches.Collator` -> {"loss", "ce", "latent", "right",
        "found"}.

        ce: the mean over samples of each one's mean over the tokens that it says: a batch of n is
        as n batches of one, and a caption weighs what a word does. latent: the loss of the latents.
        right: share of the responses' tokens (markers, answer, end) predicted. found: share of
        latents that are nearest to a visual token of their own box among all of the batch's
        pictures.
        """
        with torch.no_grad():  # tower and projector are frozen
            features = visual_tokens(self.core, batch["pixel_values"], batch["grid_thw"])
        shown = features[
            :, : self.core.config.text_config.hidden_size
        ]  # what of them stands in the prompt
        predicted = shown[:0]  # the states that learn to be latents
        parts: list[
            tuple[int, torch.Tensor, torch.Tensor]
        ] = []  # of each reading: its first sample, states, what is said after them
        if "ids" in batch:
            targets = batch["pool"].to(shown.dtype) @ shown  # (L, H)
            embeds = self._embed(batch["ids"], features)
            forced = self.training and self.progress < self.settings.warmup
            states, latents = self.method.run(self, embeds, batch, targets, forced)
            parts.append((0, states, batch["labels"]))
            predicted = states_before(states, batch["target_at"])
            if self.spec.mode == "bottleneck":
                parts.append(
                    (0, self._read_again(latents, features, batch), batch["reader_labels"])
                )
        samples, rest = (
            len(batch.get("ids", ())),
            features[self._seen(batch) if "ids" in batch else 0 :],
        )
        for part in batch.get("direct", ()):
            parts.append(
                (samples, self.states(self._embed(part["ids"], rest), part), part["labels"])
            )
            samples, rest = samples + len(part["ids"]), rest[self._seen(part) :]
        labels = torch.cat([spoken(states, said) for _, states, said in parts])
        # the head sees the answers' positions alone
        logits = self.core.lm_head(
            torch.cat([states_before(states, said != -100) for _, states, said in parts])
        ).float()
        speakers = torch.cat([first + speakers_of(states, said) for first, states, said in parts])
        ce = mean_over_samples(F.cross_entropy(logits, labels, reduction="none"), speakers)
        loss, found = self._latent_loss(predicted.float(), shown.float(), batch["pool"])
        right = (logits.argmax(-1) == labels).float().mean()
        return {
            "loss": ce + self.latent_weight() * loss,
            "ce": ce.detach(),
            "latent": loss.detach(),
            "right": right,
            "found": found,
        }

    def latent_weight(self) -> float:
        """λ now: that of the settings, and over the last `relax` of the steps less and less of
        it.
        """
        relax = self.settings.relax if self.training else 0.0
        return self.settings.weight * (min(1.0, (1 - self.progress) / relax) if relax else 1.0)

    def _latent_loss(
        self, predicted: torch.Tensor, features: torch.Tensor, pool: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of latents (L, H) against the batch's visual tokens (T, H), of which pool (L, T)
        makes their targets, and `found`.
        """
        if not len(predicted):
            return torch.zeros((), device=predicted.device), torch.zeros(
                (), device=predicted.device
            )
        apart = F.normalize(
            features - features.mean(0), dim=-1
        )  # tokens share a large common part, which tells none of them apart
        likeness = F.normalize(predicted, dim=-1) @ apart.T / self.settings.temperature
        own = pool > 0
        found = own.gather(1, likeness.argmax(-1, keepdim=True)).float().mean()
        if self.settings.loss == "mse":
            return F.mse_loss(predicted, pool @ features), found
        if self.settings.loss == "contrastive":
            return (
                likeness.logsumexp(-1) - likeness.masked_fill(~own, -torch.inf).logsumexp(-1)
            ).mean(), found
        return torch.zeros((), device=predicted.device), found

    def _seen(self, rows: Batch) -> int:
        """How many visual tokens the prompts of `rows` have."""
        return int((rows["ids"] == self.tokens.image).sum())

    def _embed(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Inputs (B, S, H), or as wide as `features` (T, …), the first of which stand in the places
        of pictures, in reading order.
        """
        embeds = as_wide(self.core.get_input_embeddings()(ids), features)
        return torch.as_tensor(
            embeds.masked_scatter((ids == self.tokens.image)[..., None], features.to(embeds.dtype))
        )

    def _read_again(
        self, latents: torch.Tensor, features: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Hidden states (B, R, H) of the pass that reads the prompt with the latents (B, K, H) as
        its picture, and then the answer.

        As in decoding, latents that are nearest to one visual token become one, their mean: the
        first of them holds it, and the others are masked out.
        """
        ids, seen = batch["reader_ids"], batch["ids"] == self.tokens.image
        at = ids == self.tokens.lvr
        positions, mask, pictures = (
            batch["reader_positions"].clone(),
            batch["reader_mask"].clone(),
            [],
        )
        counts = seen.sum(1).tolist()
        tokens = features[: sum(counts)].detach().float().split(counts)
        for row, (own, z) in enumerate(zip(tokens, latents, strict=True)):
            near = likeness(z.detach().float(), own).argmax(-1)
            alike = (near[:, None] == near[None]).to(z.dtype)
            pictures.append(alike / alike.sum(1, keepdim=True) @ z)
            positions[:, row, at[row]] = batch["positions"][:, row, seen[row]][:, near]
            mask[row, at[row]] = (
                alike.argmax(1) == torch.arange(len(near), device=near.device)
            ).to(mask.dtype)
        embeds = self.core.get_input_embeddings()(ids).masked_scatter(
            at[..., None], torch.stack(pictures)
        )
        return self.states(embeds, {"positions": positions, "mask": mask})


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
    """The mean over samples of each one's mean loss; losses (n,), samples (n,): whose each is."""
    counts = torch.bincount(samples)
    return (losses / counts[samples]).sum() / (counts > 0).sum()
