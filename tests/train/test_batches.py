"""Batches of samples of about one length: little padding, every sample once, and the same losses as
alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import _pytree
from torch.utils.data import DataLoader

from lvr_lite.config import load_settings
from lvr_lite.data.sources import JoinedSource, Source, open_source
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.train.batches import Collator, LengthGrouped
from lvr_lite.train.sft import LatentSFT

COUNT, BATCH = 300, 4
SETTINGS = load_settings(None, ["latent.samples=all", "latent.steps=4"])


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint: Path) -> Checkpoint:
    return read_checkpoint(small_checkpoint)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Samples of a file: pictures of very different sizes, some turned by EXIF, and answers of one
    word to twenty.
    """
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    lines = []
    for i in range(COUNT):
        size = (int(rng.integers(56, 240)), int(rng.integers(56, 240)))
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        Image.new("RGB", size, (i % 256, 90, 30)).save(folder / f"{i}.jpg", exif=exif)
        answer = " ".join(["red"] * int(rng.integers(1, 21)))
        lines.append(
            {
                "id": f"{i}",
                "image": f"{i}.jpg",
                "question": "what colour is it",
                "answer": answer,
                "boxes": [[0, 0, 0.5, 0.5]],
            }
        )
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return open_source(str(folder / "mixed.jsonl"))


@pytest.fixture(scope="module")
def lengths(checkpoint: Checkpoint, examples: Source) -> list[int]:
    collator = Collator(checkpoint, SETTINGS.latent)
    return [collator.length(examples.samples[i], examples.sizes(i)) for i in range(COUNT)]


def padding(order: list[int], lengths: list[int]) -> float:
    batches = [[lengths[i] for i in order[k : k + BATCH]] for k in range(0, len(order), BATCH)]
    return 1 - sum(map(sum, batches)) / sum(len(b) * max(b) for b in batches)


def test_a_length_is_that_of_the_sample_in_a_batch(
    checkpoint: Checkpoint, examples: Source, lengths: list[int]
) -> None:
    collator = Collator(checkpoint, SETTINGS.latent)
    for i in (0, 7, 19, 42):
        assert lengths[i] == collator([examples[i]])["ids"].shape[1]


def test_under_a_tenth_of_batches_is_padding(lengths: list[int]) -> None:
    grouped = list(LengthGrouped(COUNT, lengths.__getitem__, BATCH, 0))
    assert padding(grouped, lengths) < 0.1
    assert padding(list(range(COUNT)), lengths) > 0.2, "the samples are all alike"


def test_every_sample_comes_once_an_epoch_in_an_order_of_its_own(lengths: list[int]) -> None:
    orders = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        sampler = LengthGrouped(
            COUNT - 1, lengths.__getitem__, BATCH, seed
        )  # the last batch is short
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(COUNT - 1))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]
    firsts = [lengths[i] for i in orders[0][::BATCH]]
    assert abs(np.corrcoef(firsts, range(len(firsts)))[0, 1]) < 0.5, (
        "lengths rise or fall over an epoch"
    )


def test_lengths_are_asked_for_shortly_before_they_are_needed() -> None:
    asked: list[int] = []
    sampler = iter(LengthGrouped(10**6, lambda i: asked.append(i) or 1, BATCH, 0))  # type: ignore[func-returns-value]
    next(sampler)
    assert len(asked) < 1000


@pytest.mark.parametrize("method", ["sft", "lvr", "lvr-bottleneck"])
def test_a_batch_has_the_loss_of_its_samples_alone(
    small_model: Any, checkpoint: Checkpoint, examples: Source, method: str
) -> None:
    settings = load_settings(
        None, ["latent.samples=all", "latent.steps=4", f"latent.method={method}"]
    ).latent
    collator = Collator(checkpoint, settings)
    items = [examples[i] for i in (3, 8, 21, 34)]
    model = torch.nn.Module()
    model.get_base_model = lambda: small_model  # type: ignore[assignment]

    def losses(chosen: list[Any]) -> dict[str, float]:
        found = LatentSFT(model, checkpoint.processor.tokens, settings, 0.0).eval()(
            **collator(chosen)
        )
        return {name: float(found[name]) for name in ("ce", "latent")}

    together, alone = losses(items), [losses([item]) for item in items]
    for name, value in together.items():
        assert value == pytest.approx(np.mean([one[name] for one in alone]), rel=1e-5), name


def test_a_worker_that_was_spawned_prepares_the_same_batches(
    checkpoint: Checkpoint, examples: Source
) -> None:
    source = JoinedSource(open_source("scenes", "train", 0, 2), examples, 2)
    collator = Collator(checkpoint, SETTINGS.latent)
    batches = []
    for workers, context in ((0, None), (1, "spawn")):
        loader: Iterable[Any] = DataLoader(
            source,  # type: ignore[arg-type]
            batch_size=2,
            collate_fn=collator,
            num_workers=workers,
            multiprocessing_context=context,
        )
        batches.append(list(loader))
    own, spawned = batches
    assert len(own) == 2
    assert _flat(own) == _flat(spawned)


def _flat(batches: Any) -> list[Any]:
    leaves, structure = _pytree.tree_flatten(batches)
    return [structure, *(leaf.tolist() if hasattr(leaf, "tolist") else leaf for leaf in leaves)]
