"""From samples to training batches: one collator, for drawn scenes and for files. May import:
torch, numpy, Pillow and what stands above `train`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from lvr_lite.config import LatentSettings
from lvr_lite.data import boxes as box_rule
from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item, Sizes
from lvr_lite.model import spec as latent
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.model.families import Grid
from lvr_lite.model.latents import columns_read_again
from lvr_lite.model.padding import PaddedBatch, pad_left, pad_right, spread
from lvr_lite.train.methods import METHODS, Batch

# Batches whose samples are sorted by length together.
POOL = 64
# The box (x0, y0, x1, y1) of a sample that looks and has none.
WHOLE_PICTURE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class _Row:
    """One sample with its response.

    ids: (S,) int64.
    labels: (S,) int64, -100 where nothing is learned.
    positions: (3, S) int64.
    prompt: how many of the ids are the prompt's.
    targets: how many latents have a target.
    looks: whether it has latent places.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    prompt: int
    targets: int
    looks: bool


@dataclass(frozen=True)
class Collator:
    """Items -> one batch of tensors (`lvr_lite.train.methods.Batch`).

    Prompts are padded on the left and responses on the right, so that responses begin in one
    column. Samples that are answered through latents (`looks`) come first, whatever the order of
    the items, then the others, the longest first; pictures likewise. Those that look are the rows
    of the batch. The others are in `direct`, in one or two parts: the long ones are apart where
    that saves padding. A kind of which there is no sample is not there.
    """

    checkpoint: Checkpoint
    settings: LatentSettings

    def __call__(self, items: Sequence[Item]) -> Batch:
        processor = self.checkpoint.processor
        items = in_order(items, self.settings)
        pixels = processor.see([picture for _, pictures in items for picture in pictures])
        rows: list[_Row] = []
        # Of each target the visual tokens that it is the mean of, among all of the batch.
        groups: list[np.ndarray] = []
        pictures_before = 0
        tokens_before = 0
        for sample, pictures in items:
            grids = pixels.grids[pictures_before : pictures_before + len(pictures)]
            targets = self._targets(sample, grids)
            row = self._row(sample, grids, len(targets))
            groups += [group + tokens_before for group in targets]
            rows.append(row)
            pictures_before += len(pictures)
            tokens_before += int((row.ids == processor.tokens.image).sum())
        batch = _tensors(
            {
                "pool": _means(groups, tokens_before),
                "pixel_values": pixels.patches,
                "grid_thw": np.array([[1, *grid] for grid in pixels.grids]),
            }
        )
        looking = [row for row in rows if row.looks]
        direct = [row for row in rows if not row.looks]
        if looking:
            batch.update(self._aligned(looking))
            if METHODS[self.settings.method].mode == "bottleneck":
                batch.update(self._read_again(looking))
        if direct:
            batch["direct"] = [self._aligned(part) for part in _long_and_short(direct)]
        return batch

    def length(self, sample: Sample, sizes: Sizes) -> int:
        """Columns that a sample takes, visual tokens and latents included.

        sizes: of its pictures.
        """
        processor = self.checkpoint.processor
        grids = [processor.grid_of(*size) for size in sizes]
        targets = self._targets(sample, grids)
        row = self._row(sample, grids, len(targets))
        return len(row.ids)

    def _aligned(self, rows: list[_Row]) -> Batch:
        """Rows side by side, with their responses beginning in one column."""
        leads = [row.prompt for row in rows]
        batch = self._padded(rows, pad_left([len(row.ids) for row in rows], leads))
        response = max(leads)
        target_at = np.zeros(batch.ids.shape, bool)
        for number, row in enumerate(rows):
            target_at[number, response + 1 : response + 1 + row.targets] = True
        return _tensors(
            {
                "ids": batch.ids,
                "labels": spread([row.labels for row in rows], batch.columns, -100),
                "positions": batch.positions,
                "mask": batch.mask,
                "target_at": target_at,
                "response": np.array(response),
            }
        )

    def _read_again(self, rows: list[_Row]) -> Batch:
        """The second reading of rows that look, padded on the right, with the answer after it.

        Which places the latents take is known in the forward pass; here all take the first one.
        """
        again = [self._second_row(row) for row in rows]
        batch = self._padded(again, pad_right([len(row.ids) for row in again]))
        return _tensors(
            {
                "reader_ids": batch.ids,
                "reader_labels": spread([row.labels for row in again], batch.columns, -100),
                "reader_positions": batch.positions,
                "reader_mask": batch.mask,
            }
        )

    def _second_row(self, row: _Row) -> _Row:
        tokens = self.checkpoint.processor.tokens
        steps = self.settings.steps
        markers_and_latents = steps + 2
        is_image = row.ids == tokens.image
        prompt = columns_read_again(is_image[: row.prompt], np.zeros(steps, np.int64))
        answer = np.arange(row.prompt + markers_and_latents, len(row.ids))
        columns = np.concatenate([prompt, answer])
        # The answer follows the prompt.
        back = np.where(columns < row.prompt, 0, markers_and_latents)
        return replace(
            row,
            ids=np.where(is_image, tokens.lvr, row.ids)[columns],
            labels=row.labels[columns],
            positions=row.positions[:, columns] - back,
            prompt=len(prompt),
        )

    def _padded(self, rows: list[_Row], columns: list[np.ndarray]) -> PaddedBatch:
        return PaddedBatch.of(
            [row.ids for row in rows],
            [row.positions for row in rows],
            filler=self.checkpoint.processor.tokens.end[0],
            columns=columns,
        )

    def _targets(self, sample: Sample, grids: list[Grid]) -> list[np.ndarray]:
        """Visual tokens behind each latent of one sample; boxes lie in its first picture.

        A sample without boxes has its whole picture for one.
        """
        settings = self.settings
        if not (METHODS[settings.method].targeted and looks(sample, settings)):
            return []
        boxes = sample.boxes or (WHOLE_PICTURE,)
        in_boxes = box_rule.visual_tokens_in_boxes(boxes, grids[0], self.checkpoint.processor)
        if settings.targets == "pooled":
            return box_rule.pool_groups_of_boxes(in_boxes, settings.steps)
        tokens = np.concatenate(in_boxes)
        return [np.array([token]) for token in tokens[: settings.max_targets]]

    def _row(
        self,
        sample: Sample,
        grids: list[Grid],
        targets: int,
    ) -> _Row:
        processor = self.checkpoint.processor
        tokenizer = processor.tokenizer
        look = looks(sample, self.settings)
        latents = targets or (self.settings.steps if look else 0)
        end = str(tokenizer.id_to_token(processor.tokens.end[0]))
        answer = processor.answer_prefix + sample.answer
        text = latent.response(latents, answer, end)
        response = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        prompt = processor.prompt(sample.question, grids)
        count = len(prompt.ids)
        ids = np.concatenate([prompt.ids, response])
        unlearned = (np.arange(len(ids)) < count) | (ids == processor.tokens.lvr)
        following = prompt.positions.max() + 1 + np.arange(len(response))
        on_all_axes = np.broadcast_to(following, (3, len(response)))
        return _Row(
            ids=ids,
            labels=np.where(unlearned, -100, ids),
            positions=np.concatenate([prompt.positions, on_all_axes], 1),
            prompt=count,
            targets=targets,
            looks=look,
        )


class LengthGrouped(torch.utils.data.Sampler[int]):
    """Every index once an epoch, in an order in which `batch` in a row are about equally long, so
    that little of a batch is padding.

    A shuffled run of POOL batches is sorted by length and cut into batches, which are shuffled:
    batches stay random, and a length is computed shortly before it is needed. The order depends on
    seed and epoch alone, so a resumed run goes on in the same one.
    """

    def __init__(
        self,
        count: int,
        length: Callable[[int], int],
        batch: int,
        seed: int,
    ) -> None:
        self._count = count
        self._length = length
        self._batch = batch
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch])
        order = rng.permutation(self._count).tolist()
        for pool in _slices(order, POOL * self._batch):
            by_length = sorted(pool, key=self._length)
            batches = _slices(by_length, self._batch)
            # A short batch ends the epoch: after it, indices would fall into two batches.
            short = []
            if len(batches[-1]) < self._batch:
                short = batches.pop()
            for place in rng.permutation(len(batches)):
                yield from batches[place]
            yield from short


def _slices(indices: list[int], length: int) -> list[list[int]]:
    starts = range(0, len(indices), length)
    return [indices[start : start + length] for start in starts]


def in_order(items: Sequence[Item], settings: LatentSettings) -> list[Item]:
    """Those that look first, in their own order, then the others, the longest first (by letters,
    which is near enough).
    """
    looking: list[Item] = []
    others: list[Item] = []
    for item in items:
        kind = looking if looks(item[0], settings) else others
        kind.append(item)
    return looking + sorted(others, key=_letters, reverse=True)


def _letters(item: Item) -> int:
    sample, _ = item
    return len(sample.question) + len(sample.answer)


def _tensors(arrays: dict[str, np.ndarray]) -> Batch:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return cast(Batch, tensors)


def _means(groups: list[np.ndarray], tokens: int) -> np.ndarray:
    """The matrix (L, tokens) float32 that turns visual tokens into the means of L groups of
    them.
    """
    pool = np.zeros((len(groups), tokens), np.float32)
    for target, group in enumerate(groups):
        pool[target, group] = 1 / len(group)
    return pool


def _long_and_short(rows: list[_Row]) -> list[list[_Row]]:
    """Rows, the longest first, cut in two where that saves a quarter of their padded size at least:
    one caption among words should not make all rows long.
    """
    parts = [[rows[:cut], rows[cut:]] for cut in range(len(rows))]
    best = min(parts, key=_padded_size)
    return best if _padded_size(best) <= 0.75 * _padded_size([rows]) else [rows]


def _padded_size(parts: list[list[_Row]]) -> int:
    size = 0
    for rows in parts:
        longest = max((len(row.ids) for row in rows), default=0)
        size += len(rows) * longest
    return size


def looks(sample: Sample, settings: LatentSettings) -> bool:
    """Whether a sample is answered through latents; the others are answered at once."""
    if not METHODS[settings.method].latents:
        return False
    return settings.samples == "all" or bool(sample.boxes)
