"""A tuned model as a policy: how likely the choices of answers are that were drawn before.

May import: torch, transformers, lvr_lite.model, lvr_lite.generate, lvr_lite.train.methods.

An answer is read once more in one teacher-forced pass, with what its latent steps were fed; in a
bottleneck in two passes, as it was drawn:

    rollout   a question and its answer, with the head's choices and the latents
    reading   one row of a pass; `readings` gives the one or two of a rollout
    replay    a batch of them; `batches_of` gives one for first readings and one for second ones
    policy    the log-probabilities of the choices in such batches
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lvr_lite.data.samples import Sample
from lvr_lite.generate.decode import Prompt, Result
from lvr_lite.generate.torch import distinct
from lvr_lite.model.latents import second_reading
from lvr_lite.model.padding import PaddedBatch, pad_between
from lvr_lite.model.spec import LatentSpec, TokenIds
from lvr_lite.train.head import Head, without_autocast
from lvr_lite.train.methods import Columns, Reader, as_wide, run_freely

# The id of padding: the first of a vocabulary, which stands neither for a picture nor for a latent.
PADDING = 0


@dataclass
class Rollout:
    """One answer that was drawn.

    prompt, result: what was asked, and what came.
    rewards: what each reward gave.
    advantage: over the other answers to its question.
    """

    sample: Sample
    prompt: Prompt
    result: Result
    rewards: dict[str, float] = field(default_factory=dict)
    advantage: float = 0.0


@dataclass(frozen=True)
class Reading:
    """One row of a teacher-forced pass.

    ids: (S,), <|lvr|> in the places of latents.
    positions: (3, S).
    latents: (n, H).
    features: (T, H or wider), in the places of pictures.
    lead: how many ids come before <|lvr_start|>.
    at: from which of the ids something was chosen.
    chosen: these choices, ids.
    may_start: whether <|lvr_start|> could have been each of them.
    shares: (n, K), of a second reading: its latents are shares @ those of the first.
    """

    ids: np.ndarray
    positions: np.ndarray
    latents: np.ndarray
    features: np.ndarray
    lead: int
    at: np.ndarray
    chosen: list[int]
    may_start: list[bool]
    shares: np.ndarray | None = None

    @property
    def read(self) -> tuple[bytes, ...]:
        """All that the pass reads."""
        arrays = (self.ids, self.positions, self.latents, self.features)
        return tuple(array.tobytes() for array in arrays)


class Replay(Columns, total=False):
    """A batch of readings. Those that read the same are there once: of short answers to one
    question many are alike. It is a dict for the reason that `lvr_lite.train.methods.Batch` is one.

    ids: (B, S).
    first: the column of the first latent, the same in every row that has some.
    latents: (L, H) and features: (T, H or wider), in reading order.
    row, column: (n,), from where each choice was made, in the order of the readings.
    chosen, may_start: (n,), as in `Reading`.
    place: the row of each reading.
    mix: (L, B * K), of second readings: their latents are mix @ those of the rows of the first.
    """

    ids: torch.Tensor
    first: int
    latents: torch.Tensor
    features: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    chosen: torch.Tensor
    may_start: torch.Tensor
    place: torch.Tensor
    mix: torch.Tensor


def readings(
    prompt: Prompt,
    result: Result,
    tokens: TokenIds,
    mode: str,
) -> list[Reading]:
    """What the decode loop read for an answer: one row, or two where a bottleneck was handed
    over.

    mode: as in LatentSpec.
    """
    width = prompt.features.shape[1]
    latents = np.zeros((0, width), np.float32)
    if result.latents:
        latents = np.stack(result.latents).astype(np.float32)
    choices = result.choices
    if tokens.lvr_start not in choices or mode == "open":
        return [_reading(prompt, latents, choices, tokens)]
    start = choices.index(tokens.lvr_start) + 1
    # The words before the latents are read again with the prompt.
    asked = prompt.followed_by(choices[: start - 1])
    again = second_reading(
        asked.ids,
        asked.positions,
        asked.features,
        latents,
        tokens,
    )
    answered = Prompt(again.ids, prompt.features[:0], again.positions)
    first = _reading(prompt, latents[:-1], choices[:start], tokens)
    second = _reading(
        answered,
        again.shares @ latents,
        choices[start:],
        tokens,
        may_start=False,
    )
    return [first, replace(second, shares=again.shares)]


def _reading(
    prompt: Prompt,
    latents: np.ndarray,
    choices: Sequence[int],
    tokens: TokenIds,
    may_start: bool = True,
) -> Reading:
    """The row of a prompt and the choices after it; latents (n, H) follow <|lvr_start|>."""
    fed: list[int] = []
    at: list[int] = []
    could_start: list[bool] = []
    for choice in choices:
        at.append(len(prompt.ids) + len(fed) - 1)
        could_start.append(may_start)
        fed.append(choice)
        if choice == tokens.lvr_start:
            may_start = False
            fed += [tokens.lvr] * len(latents)
            fed.append(tokens.lvr_end)
    # The last choice was not fed; nor is the end of latents that are handed over.
    fed.pop()
    before_start = fed.index(tokens.lvr_start) if tokens.lvr_start in fed else len(fed)
    following = prompt.positions.max() + 1 + np.arange(len(fed))
    on_all_axes = np.broadcast_to(following, (3, len(fed)))
    ids = np.concatenate([prompt.ids, fed])
    positions = np.concatenate([prompt.positions, on_all_axes], 1)
    return Reading(
        ids=ids.astype(np.int64),
        positions=positions.astype(np.int64),
        latents=latents,
        features=prompt.features,
        lead=len(prompt.ids) + before_start,
        at=np.array(at),
        chosen=list(choices),
        may_start=could_start,
    )


def batches_of(answers: Sequence[Sequence[Reading]]) -> list[Replay]:
    """The `readings` of several answers as batches: the first readings, and the second ones, which
    are much shorter.
    """
    first = batch_of([rows[0] for rows in answers])
    first_rows = first["place"].tolist()
    again = [number for number, rows in enumerate(answers) if len(rows) > 1]
    if not again:
        return [first]
    second = batch_of([answers[number][1] for number in again])
    mixes: dict[int, np.ndarray] = {}
    for row, number in zip(second["place"].tolist(), again, strict=True):
        shares = answers[number][1].shares
        assert shares is not None
        count, steps = shares.shape
        mix = np.zeros((count, len(first["ids"]), steps), np.float32)
        mix[:, first_rows[number]] = shares
        mixes.setdefault(row, mix.reshape(count, -1))
    second["mix"] = _joined([mixes[row] for row in sorted(mixes)])
    return [first, second]


def batch_of(rows: Sequence[Reading]) -> Replay:
    """Readings as one batch; what comes before <|lvr_start|> and what comes from there on are
    padded on the right.
    """
    kept, place = distinct(row.read for row in rows)
    different = [rows[number] for number in kept]
    ids = [row.ids for row in different]
    leads = [row.lead for row in different]
    columns = pad_between([len(own) for own in ids], leads)
    batch = PaddedBatch.of(
        ids,
        [row.positions for row in different],
        filler=PADDING,
        columns=columns,
    )
    return Replay(
        ids=torch.from_numpy(batch.ids),
        positions=torch.from_numpy(batch.positions),
        mask=torch.from_numpy(batch.mask),
        first=max(leads) + 1,
        latents=_joined([row.latents for row in different]),
        features=_joined([row.features for row in different]),
        row=_joined([np.full(len(row.at), own) for own, row in zip(place, rows, strict=True)]),
        column=_joined([columns[own][row.at] for own, row in zip(place, rows, strict=True)]),
        chosen=_joined([row.chosen for row in rows]),
        may_start=_joined([row.may_start for row in rows]),
        place=torch.tensor(place),
    )


def _joined(parts: Sequence[np.ndarray | list[int] | list[bool]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))


class Policy(Reader):
    """A tuned model as a distribution over the choices of its head, at a temperature.

    model: with its adapter.
    latents: as `grpo.latents`, "recorded" or "recomputed".
    keep_start: keep a copy of what is trained, for `at_start`.
    """

    def __init__(
        self,
        model: Any,
        tokens: TokenIds,
        spec: LatentSpec,
        temperature: float,
        latents: str = "recorded",
        keep_start: bool = False,
    ) -> None:
        super().__init__(model, tokens, spec)
        self.temperature = temperature
        self.recomputed = latents == "recomputed"
        self._start: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        if keep_start:
            trained = (p for p in model.parameters() if p.requires_grad)
            self._start = [(p, p.detach().clone()) for p in trained]

    def forward(self, batches: Sequence[Replay]) -> torch.Tensor:
        """Log-probabilities (n,) of the choices in batches of `batches_of`, one after another, as
        the decode loop drew them.
        """
        speaking = []
        latents = None
        for batch in batches:
            states, latents = self._read(batch, latents)
            speaking.append(states[batch["row"], batch["column"]])
        may_start = torch.cat([batch["may_start"] for batch in batches])
        chosen = torch.cat([batch["chosen"] for batch in batches])
        tokens = self.tokens
        never = (tokens.lvr, tokens.lvr_end, tokens.image)
        head = Head(self.core.lm_head, never, self.temperature)
        scores, _ = head.scores(torch.cat(speaking), chosen, (tokens.lvr_start, ~may_start))
        return scores

    def _read(
        self, batch: Replay, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One pass.

        before: latents (B, K, H) of the batch before, which those of a second reading are the means
            of.

        Returns the hidden states (B, S, H), and the latents (B, K, H) that the rows came to, where
        they are recomputed.
        """
        ids = batch["ids"]
        is_latent = ids == self.tokens.lvr
        embeds = self.embed(ids, batch["features"])
        latents = batch["latents"]
        if self.recomputed and self.spec.feedback == "token":
            width = latents.shape[1]
            latents = embeds[is_latent][:, :width]
        elif self.recomputed and batch["first"] <= ids.shape[1]:
            return run_freely(
                self,
                embeds,
                batch,
                batch["first"],
                self.spec.steps,
            )
        elif before is not None:
            with without_autocast(before):
                latents = batch["mix"] @ before.flatten(0, 1).float()
        latents = as_wide(latents, embeds).to(embeds.dtype)
        embeds = embeds.masked_scatter(is_latent[..., None], latents)
        return self.states(embeds, batch), None

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """The policy that the run began with: what is trained has its first values meanwhile, so
        that no second model is needed.
        """
        now = [p.data for p, _ in self._start]
        for p, first in self._start:
            p.data = first
        try:
            yield
        finally:
            for (p, _), data in zip(self._start, now, strict=True):
                p.data = data
