"""From samples to training batches: one collator, for drawn scenes and for files. May import:
torch, numpy, Pillow and the core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lvr_lite.config import LatentSettings
from lvr_lite.data import boxes as box_rule
from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item, Sizes, Source
from lvr_lite.errors import DataError
from lvr_lite.model import spec as latent
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.model.images import prepare
from lvr_lite.model.prompt import prompt_ids
from lvr_lite.train.methods import METHODS

POOL = 64  # batches whose samples are sorted by length together


@dataclass(frozen=True)
class _Row:
    """One sample as ids (S,), labels (S,), positions (3, S), of which the first `prompt` are the
    prompt's; targets: of its latents; looks: whether it has latent places.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    prompt: int
    targets: int
    looks: bool


@dataclass(frozen=True)
class Collator:
    """Items -> one batch of tensors: prompts padded on the left, responses on the right, so that
    these begin in one column.

    Samples that are answered through latents (`looks`) come first, whatever the order of the items,
    then the others, the longest first; pictures likewise. Of the B that look: ids, labels (B, S)
    int64, labels -100 where nothing is predicted; positions (3, B, S); mask (B, S); target_at (B,
    S) bool, the latent places that have a target; pool (L, T) float32, which turns the batch's T
    visual tokens into its L targets in reading order of target_at; response (), the column where
    responses begin; pixel_values (N, C) float32; grid_thw (pictures, 3). In a bottleneck also the
    second reading: reader_ids, reader_labels, reader_mask (B, R), reader_positions (3, B, R),
    padded on the right. direct: the samples that are answered at once, in one or two parts (the
    long ones apart, where that saves padding), each with the ids, labels, positions and mask of its
    own. A kind of which the batch has no sample is not there.
    """

    checkpoint: Checkpoint
    settings: LatentSettings

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        c = self.checkpoint
        items = in_order(items, self.settings)
        pictures = [p for _, own in items for p in own]
        pixels, grids = prepare(pictures, c.family, c.image_spec)
        rows, groups = [], []
        first_picture = first_token = 0
        for sample, own_pictures in items:
            own = grids[first_picture : first_picture + len(own_pictures)]
            targets = self._targets(sample, own)
            groups += [g + first_token for g in targets]
            row = self._row(sample, own, len(targets))
            rows.append(row)
            first_picture += len(own)
            first_token += int((row.ids == c.tokens.image).sum())
        pool = np.zeros((len(groups), first_token), np.float32)
        for i, group in enumerate(groups):
            pool[i, group] = 1 / len(group)
        batch: dict[str, Any] = {
            "pool": pool,
            "pixel_values": pixels,
            "grid_thw": np.array([[1, *g] for g in grids]),
        }
        if looking := [row for row in rows if row.looks]:
            batch |= self._aligned(looking)
            if METHODS[self.settings.method].mode == "bottleneck":
                batch |= self._reader(looking)
        tensors: dict[str, Any] = _tensors(batch)
        if direct := [row for row in rows if not row.looks]:
            tensors["direct"] = [_tensors(self._aligned(part)) for part in _long_and_short(direct)]
        return tensors

    def length(self, sample: Sample, sizes: Sizes) -> int:
        """Positions that a sample takes, visual tokens and latents included. sizes: of its
        pictures.
        """
        grids = [
            self.checkpoint.family.grid_of(*size, self.checkpoint.image_spec) for size in sizes
        ]
        return len(self._row(sample, grids, len(self._targets(sample, grids))).ids)

    def _aligned(self, rows: list[_Row]) -> dict[str, Any]:
        """Rows as arrays, padded so that responses begin in one column."""
        before = max(row.prompt for row in rows)
        longest = before + max(len(row.ids) - row.prompt for row in rows)
        ids, labels = (
            np.full((len(rows), longest), self.checkpoint.tokens.end[0]),
            np.full((len(rows), longest), -100),
        )
        positions, mask = np.zeros((3, *ids.shape), np.int64), np.zeros(ids.shape, np.int64)
        target_at = np.zeros(ids.shape, bool)
        for i, row in enumerate(rows):
            there = slice(before - row.prompt, before - row.prompt + len(row.ids))
            ids[i, there], labels[i, there], mask[i, there], positions[:, i, there] = (
                row.ids,
                row.labels,
                1,
                row.positions,
            )
            target_at[i, before + 1 : before + 1 + row.targets] = True
        return {
            "ids": ids,
            "labels": labels,
            "positions": positions,
            "mask": mask,
            "target_at": target_at,
            "response": np.array(before),
        }

    def _reader(self, rows: list[_Row]) -> dict[str, np.ndarray]:
        """The second reading: the prompt with K times <|lvr|> for its visual tokens, whose
        positions come in the forward pass, and the answer, as in
        `lvr_lite.generate.decode.second_reading`.
        """
        tokens, steps = self.checkpoint.tokens, self.settings.steps
        read = []
        for row in rows:
            seen = row.ids == tokens.image
            at, markers = int(seen.argmax()), np.arange(row.prompt, row.prompt + steps + 2)
            kept = np.setdiff1d(np.flatnonzero(~seen), markers)
            before, after = kept[kept < at], kept[kept > at]
            positions = np.array(row.positions)
            positions[:, row.prompt + steps + 2 :] -= steps + 2  # the answer follows the prompt
            ids = np.concatenate([row.ids[before], np.full(steps, tokens.lvr), row.ids[after]])
            labels = np.concatenate([row.labels[before], np.full(steps, -100), row.labels[after]])
            read.append(
                (
                    ids,
                    labels,
                    np.concatenate(
                        [positions[:, before], np.zeros((3, steps), np.int64), positions[:, after]],
                        1,
                    ),
                )
            )
        shape = (len(rows), max(len(ids) for ids, _, _ in read))
        ids, labels, mask = (
            np.full(shape, tokens.end[0]),
            np.full(shape, -100),
            np.zeros(shape, np.int64),
        )
        positions = np.zeros((3, *shape), np.int64)
        for i, (row_ids, row_labels, row_positions) in enumerate(read):
            there = slice(0, len(row_ids))
            ids[i, there], labels[i, there], mask[i, there], positions[:, i, there] = (
                row_ids,
                row_labels,
                1,
                row_positions,
            )
        return {
            "reader_ids": ids,
            "reader_labels": labels,
            "reader_mask": mask,
            "reader_positions": positions,
        }

    def _targets(self, sample: Sample, grids: list[tuple[int, int]]) -> list[np.ndarray]:
        """Visual tokens behind each latent of one sample; boxes lie in its first picture. Without
        boxes: its whole picture.
        """
        if not (METHODS[self.settings.method].targeted and looks(sample, self.settings)):
            return []
        found = sample.boxes or ((0.0, 0.0, 1.0, 1.0),)
        in_boxes = box_rule.visual_tokens_in_boxes(
            found, grids[0], self.checkpoint.family, self.checkpoint.image_spec
        )
        if self.settings.targets == "pooled":
            return box_rule.pool_groups_of_boxes(in_boxes, self.settings.steps)
        return [np.array([t]) for t in np.concatenate(in_boxes)[: self.settings.max_targets]]

    def _row(self, sample: Sample, grids: list[tuple[int, int]], targets: int) -> _Row:
        c, look = self.checkpoint, looks(sample, self.settings)
        latents = targets or (self.settings.steps if look else 0)
        shown = [c.family.picture_text(g, c.image_spec) for g in grids]
        asked = prompt_ids(c.tokenizer, c.template, sample.question, c.family.IMAGE_TOKEN, shown)
        end = str(c.tokenizer.id_to_token(c.tokens.end[0]))
        said = c.tokenizer.encode(
            latent.response(latents, sample.answer, end), add_special_tokens=False
        ).ids
        ids = np.array(asked + said, np.int64)
        labels = np.array(
            [-100] * len(asked) + [-100 if t == c.tokens.lvr else t for t in said], np.int64
        )
        positions = c.family.positions(np.array(asked), c.tokens.image, grids, c.image_spec)
        following = positions.max() + 1 + np.arange(len(said))
        return _Row(
            ids,
            labels,
            np.concatenate([positions, np.broadcast_to(following, (3, len(said)))], 1),
            len(asked),
            targets,
            look,
        )


class LengthGrouped(torch.utils.data.Sampler[int]):
    """Every index once an epoch, in an order in which `batch` in a row are about equally long, so
    that little of a batch is padding.

    A shuffled run of POOL batches is sorted by length and cut into batches, which are shuffled:
    batches stay random, and no length is asked for long before it is needed. The order hangs on
    seed and epoch alone, so a resumed run goes on in the same one.
    """

    def __init__(self, count: int, length: Callable[[int], int], batch: int, seed: int) -> None:
        self._count, self._length, self._batch, self._seed, self._epoch = (
            count,
            length,
            batch,
            seed,
            0,
        )

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch])
        order = rng.permutation(self._count)
        for first in range(0, self._count, POOL * self._batch):
            pool = sorted(
                (int(i) for i in order[first : first + POOL * self._batch]), key=self._length
            )
            batches = [pool[i : i + self._batch] for i in range(0, len(pool), self._batch)]
            short = (
                batches.pop() if len(batches[-1]) < self._batch else []
            )  # ends the epoch, or batches after it would straddle two
            for place in rng.permutation(len(batches)):
                yield from batches[place]
            yield from short


def in_order(items: Sequence[Item], settings: LatentSettings) -> list[Item]:
    """Those that look first, then the others, the longest first (by letters, which is near
    enough).
    """
    return sorted(
        items,
        key=lambda item: (
            (0, 0)
            if looks(item[0], settings)
            else (1, -len(item[0].question) - len(item[0].answer))
        ),
    )


def _tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.asarray(v)) for k, v in arrays.items()}


def _long_and_short(rows: list[_Row]) -> list[list[_Row]]:
    """Rows cut in two where that saves a quarter of their padded size at least: one caption among
    words should not make all rows long.
    """

    def size(part: list[_Row]) -> int:
        return len(part) * max((len(row.ids) for row in part), default=0)

    cut = min(range(len(rows)), key=lambda i: size(rows[:i]) + size(rows[i:]))
    worth = size(rows[:cut]) + size(rows[cut:]) <= 0.75 * size(rows)
    return [rows[:cut], rows[cut:]] if worth else [rows]


def looks(sample: Sample, settings: LatentSettings) -> bool:
    """Whether a sample is answered through latents; the others are answered at once."""
    return METHODS[settings.method].latents and (settings.samples == "all" or bool(sample.boxes))


def check_samples(examples: Source, checkpoint: Checkpoint) -> None:
    """Raises DataError for a sample whose question or answer holds a token that stands for a
    picture or for a step of the loop.
    """
    for sample in examples.samples:
        for part, text in (("question", sample.question), ("answer", sample.answer)):
            found = [
                t
                for t in (latent.START, latent.LATENT, latent.END, checkpoint.family.IMAGE_TOKEN)
                if t in text
            ]
            if found:
                raise DataError(
                    f"sample {sample.id}: its {part} contains {found[0]}, which stands for something else here: leave it out"
                )
