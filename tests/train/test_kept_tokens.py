"""Visual tokens that are kept on disk: the same losses, and no more room than allowed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lvr_lite.config import load_settings
from lvr_lite.data.sources import Item, open_source
from lvr_lite.generate.kept_tokens import KeptTokens, root
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.train.batches import Collator
from lvr_lite.train.load import adapted, load_nf4
from lvr_lite.train.sft import LatentSFT

SETTINGS = load_settings(None, ["lora.rank=4", "latent.samples=all", "latent.steps=2"])


@pytest.fixture(autouse=True)
def an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint: Path) -> Checkpoint:
    return read_checkpoint(small_checkpoint)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return list(open_source("scenes", "train", 0, 3).items())


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Any:
    return adapted(load_nf4(checkpoint, torch.float32), checkpoint, SETTINGS).train()


@pytest.fixture
def seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pictures of each call of the tower."""
    calls: list[int] = []
    inner = model.get_base_model().model
    look = inner.get_image_features

    def counted(**inputs: Any) -> Any:
        calls.append(len(inputs["image_grid_thw"]))
        return look(**inputs)

    monkeypatch.setattr(inner, "get_image_features", counted)
    return calls


def loss(model: Any, checkpoint: Checkpoint, items: list[Item], kept: KeptTokens | None) -> float:
    sft = LatentSFT(model, checkpoint.processor.tokens, SETTINGS.latent, kept=kept)
    return float(sft(**Collator(checkpoint, SETTINGS.latent)(items))["loss"].detach())


def files() -> list[Path]:
    return sorted(root().glob("*/*"))


def test_losses_are_the_same_and_a_picture_is_seen_once(
    model: Any, checkpoint: Checkpoint, items: list[Item], seen: list[int]
) -> None:
    wanted = loss(model, checkpoint, items, None)
    found = [
        loss(model, checkpoint, some, KeptTokens(checkpoint, 10**9))
        for some in (items[:2], items, items)
    ]
    assert seen == [3, 2, 1]
    assert found[1:] == [pytest.approx(wanted, rel=1e-5)] * 2
    assert len(files()) == 3


def test_another_size_or_base_is_another_picture(
    model: Any,
    checkpoint: Checkpoint,
    items: list[Item],
    seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smaller = replace(checkpoint, processor=checkpoint.processor.with_max_pixels(56 * 56))
    for one in (checkpoint, smaller, checkpoint):
        loss(model, one, items[:1], KeptTokens(one, 10**9))
    assert seen == [1, 1]
    monkeypatch.setattr(Checkpoint, "base_sha256", "0" * 64)
    loss(model, checkpoint, items[:1], KeptTokens(checkpoint, 10**9))
    assert seen == [1, 1, 1]


def test_they_take_no_more_room_than_allowed(
    model: Any, checkpoint: Checkpoint, items: list[Item], seen: list[int]
) -> None:
    loss(model, checkpoint, items[:1], KeptTokens(checkpoint, 10**9))
    (first,) = files()
    room = int(first.stat().st_size * 1.5)
    kept = KeptTokens(checkpoint, room)
    loss(model, checkpoint, items[:1], kept)
    loss(model, checkpoint, items[1:2], kept)
    assert files() == [first], "what this run has read gave way"
    loss(model, checkpoint, items[1:2], KeptTokens(checkpoint, room))
    assert sum(file.stat().st_size for file in files()) <= room
    assert first not in files(), "an older run's file did not give way"
    assert seen == [1, 1, 1]


def test_a_damaged_file_is_written_anew(
    model: Any, checkpoint: Checkpoint, items: list[Item], seen: list[int]
) -> None:
    wanted = loss(model, checkpoint, items[:1], KeptTokens(checkpoint, 10**9))
    (file,) = files()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="cannot be read"):
        assert loss(model, checkpoint, items[:1], KeptTokens(checkpoint, 10**9)) == wanted
    assert loss(model, checkpoint, items[:1], KeptTokens(checkpoint, 10**9)) == wanted
    assert seen == [1, 1]
