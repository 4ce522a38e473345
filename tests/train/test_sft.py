"""The batch, the loss and what is trained: compared with the same written out by hand on a small
random model.
"""

from __future__ import annotations

import copy
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lvr_lite.config import LatentSettings, load_settings
from lvr_lite.data.boxes import tokens_in_box
from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import FileSource, Item, open_source
from lvr_lite.data.validate import check_samples, special_tokens
from lvr_lite.errors import BundleError, DataError
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, decode
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.latents import near
from lvr_lite.model.spec import LatentSpec
from lvr_lite.train import head as head_module
from lvr_lite.train import load as nf4
from lvr_lite.train import sft as module
from lvr_lite.train.batches import Collator, in_order
from lvr_lite.train.finetune import norm_of_visual_tokens
from lvr_lite.train.head import Head
from lvr_lite.train.load import adapted
from lvr_lite.train.methods import METHODS, Batch, Bottleneck, Columns
from lvr_lite.train.run_folder import write_side_files
from lvr_lite.train.sft import LatentSFT

STEPS, NORM = 4, 9.0
SETTINGS = load_settings(
    None,
    [
        "lora.rank=4",
        "lora.alpha=16",
        "train.gradient_checkpointing=false",
        f"latent.steps={STEPS}",
        "latent.samples=all",
    ],
)


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint: Path) -> Checkpoint:
    return read_checkpoint(small_checkpoint)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Scenes of six question types, with one and with several boxes, in pictures of all sizes;
    every third answer made longer.
    """
    found = list(open_source("scenes", "train", 0, 12).items())
    found = [
        (replace(s, answer=f"{s.answer} and {s.answer}") if i % 3 == 1 else s, pictures)
        for i, (s, pictures) in enumerate(found)
    ]
    found = [
        (replace(s, boxes=s.boxes or ((0.1, 0.2, 0.6, 0.5), (0.4, 0.5, 0.9, 1.0))), pictures)
        for s, pictures in found
    ]  # of counts
    assert {len(sample.boxes) for sample, _ in found} >= {1, 2}
    assert len({picture.size for _, (picture,) in found}) == 3
    return found


def batch_of(checkpoint: Checkpoint, items: Sequence[Item], **settings: Any) -> Any:
    return Collator(checkpoint, replace(SETTINGS.latent, **settings))(items)


def markers_of(checkpoint: Checkpoint) -> list[int]:
    tokens = checkpoint.processor.tokens
    return [tokens.lvr_start, tokens.lvr, tokens.lvr_end]


def rows_of(batch: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a batch whose samples are all of one kind, with latent places or without."""
    (rows,) = [batch] if "ids" in batch else batch["direct"]
    assert "ids" not in batch or "direct" not in batch
    return batch | rows


def two_pictures(items: Sequence[Item]) -> Item:
    (sample, (first,)), (_, (second,)) = items[0], items[1]
    return sample, (first, second.resize((84, 112)))


def extent(batch: dict[str, torch.Tensor], row: int) -> tuple[int, int]:
    """The first column of a row that is not padding, and the one after its last."""
    columns = batch["mask"][row].nonzero().flatten().tolist()
    assert columns == list(range(columns[0], columns[-1] + 1)), "padding within a sample"
    return columns[0], columns[-1] + 1


# --------------------------------------------------------------------------------------------------
# the batch


TARGETED = pytest.mark.parametrize("method", ["lvr", "lvr-free", "lvr-bottleneck"])
WITH_LATENTS = [m for m in METHODS if m != "sft"]
FREE = pytest.mark.parametrize("method", ["lvr-free", "lvr-bottleneck"])


def test_every_method_that_can_be_set_is_there() -> None:
    assert set(typing.get_args(typing.get_type_hints(LatentSettings)["method"])) == set(METHODS)


@pytest.mark.parametrize("method", WITH_LATENTS)
def test_a_response_is_markers_around_latents_then_the_answer_then_the_end(
    checkpoint: Checkpoint, items: list[Item], method: str
) -> None:
    batch, tokens = batch_of(checkpoint, items, method=method), checkpoint.processor.tokens
    for row, (sample, _) in enumerate(items):
        ids = batch["ids"][row, batch["mask"][row] == 1].tolist()
        start = ids.index(tokens.lvr_start)
        assert ids[start + 1 : start + 1 + STEPS] == [tokens.lvr] * STEPS
        assert ids[start + 1 + STEPS] == tokens.lvr_end
        assert (
            checkpoint.processor.tokenizer.decode(ids[start + 2 + STEPS :]).strip() == sample.answer
        )
        assert ids[-1] == tokens.end[0]


def test_all_responses_begin_in_one_column(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch = batch_of(checkpoint, items)
    column = int(batch["response"])
    assert (batch["ids"][:, column] == checkpoint.processor.tokens.lvr_start).all()
    assert (batch["labels"][:, :column] == -100).all()
    extents = [extent(batch, row) for row in range(len(items))]
    assert min(first for first, _ in extents) == 0
    assert max(end for _, end in extents) == batch["ids"].shape[1], (
        "more columns than the batch needs"
    )
    assert len({first for first, _ in extents}) > 1, "no prompt is padded"
    assert len({end for _, end in extents}) > 1, "no response is padded"


@TARGETED
def test_the_latents_alone_have_targets(
    checkpoint: Checkpoint, items: list[Item], method: str
) -> None:
    batch = batch_of(checkpoint, items, method=method)
    assert batch["target_at"].sum(1).tolist() == [STEPS] * len(items)
    assert torch.equal(batch["target_at"], batch["ids"] == checkpoint.processor.tokens.lvr)
    assert len(batch["pool"]) == STEPS * len(items)


def test_dummy_has_latent_places_and_no_targets(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch, lvr = (
        batch_of(checkpoint, items, method="dummy"),
        batch_of(checkpoint, items, method="lvr"),
    )
    for name in ("ids", "labels", "positions", "mask"):
        assert torch.equal(batch[name], lvr[name]), name
    assert not batch["target_at"].any()
    assert batch["pool"].shape == (0, lvr["pool"].shape[1])


def test_sft_has_the_answer_alone(checkpoint: Checkpoint, items: list[Item]) -> None:
    items = in_order(items, replace(SETTINGS.latent, method="sft"))
    batch, tokens = rows_of(batch_of(checkpoint, items, method="sft")), checkpoint.processor.tokens
    assert not torch.isin(
        batch["ids"], torch.tensor([tokens.lvr_start, tokens.lvr, tokens.lvr_end])
    ).any()
    for row, (sample, _) in enumerate(items):
        (_, end), response = extent(batch, row), int(batch["response"])
        said = batch["ids"][row, response:end].tolist()
        assert checkpoint.processor.tokenizer.decode(said).strip() == sample.answer
        assert said[-1] == tokens.end[0]
        assert [
            i for i, label in enumerate(batch["labels"][row].tolist()) if label != -100
        ] == list(range(response, end))
        assert batch["labels"][row, response:end].tolist() == said
        first = int(batch["positions"][:, row, :response].max()) + 1
        assert (
            batch["positions"][:, row, response:end].tolist()
            == [list(range(first, first + end - response))] * 3
        )
    assert not batch["target_at"].any()
    assert len(batch["pool"]) == 0


@pytest.mark.parametrize("method", WITH_LATENTS)
def test_markers_answer_and_end_are_learned_and_nothing_else(
    checkpoint: Checkpoint, items: list[Item], method: str
) -> None:
    batch, tokens = batch_of(checkpoint, items, method=method), checkpoint.processor.tokens
    for row in range(len(items)):
        ids, labels = batch["ids"][row].tolist(), batch["labels"][row].tolist()
        start, (_, end) = ids.index(tokens.lvr_start), extent(batch, row)
        learned = [start, *range(start + 1 + STEPS, end)]
        assert [i for i, label in enumerate(labels) if label != -100] == learned
        assert all(labels[i] == ids[i] for i in learned)


def test_a_training_prompt_is_the_prompt_that_the_model_meets_later(
    checkpoint: Checkpoint, items: list[Item]
) -> None:
    runtime = SimpleNamespace(
        **checkpoint.__dict__,
        hidden_size=8,
        encode=lambda pixels, _: np.zeros((len(pixels) // 4, 8), np.float32),
    )
    mixed = [*items[:3], two_pictures(items)]
    batch = batch_of(checkpoint, mixed)
    for row, (sample, pictures) in enumerate(mixed):
        prompt, _ = prepare_prompt(runtime, pictures, sample.question)  # type: ignore[arg-type]
        (first, _), response = extent(batch, row), int(batch["response"])
        assert batch["ids"][row, first:response].tolist() == prompt.ids.tolist()
        assert batch["ids"][row, response] == checkpoint.processor.tokens.lvr_start
        np.testing.assert_array_equal(batch["positions"][:, row, first:response], prompt.positions)


def test_positions_of_a_response_go_on_one_by_one(
    checkpoint: Checkpoint, items: list[Item]
) -> None:
    batch = batch_of(checkpoint, items)
    for row in range(len(items)):
        start, (_, end) = int(batch["response"]), extent(batch, row)
        first = int(batch["positions"][:, row, :start].max()) + 1
        for axis in range(3):
            assert batch["positions"][axis, row, start:end].tolist() == list(
                range(first, first + end - start)
            )


def picture_rows(batch: dict[str, torch.Tensor]) -> list[tuple[int, int, int]]:
    """For each picture of a batch: its first visual token, and its rows and columns of tokens."""
    found, first = [], 0
    for _, height, width in batch["grid_thw"].tolist():
        found.append((first, height // 2, width // 2))
        first += height * width // 4
    assert batch["pool"].shape[1] == first == len(batch["pixel_values"]) // 4
    return found


def test_each_latent_target_is_a_mean_over_visual_tokens_of_the_boxes(
    checkpoint: Checkpoint, items: list[Item]
) -> None:
    batch = batch_of(checkpoint, items)
    features = torch.randn(batch["pool"].shape[1], 5)
    targets = (batch["pool"] @ features).split(STEPS)
    for (sample, _), (first, rows, columns), found, weights in zip(
        items, picture_rows(batch), targets, batch["pool"].split(STEPS), strict=True
    ):
        inside = {first + int(t) for box in sample.boxes for t in tokens_in_box(box, rows, columns)}
        used = [set(w.nonzero().flatten().tolist()) for w in weights]
        assert set().union(*used) == inside, (
            "not the tokens of this sample's boxes in its own picture"
        )
        for group, target in zip(used, found, strict=True):
            torch.testing.assert_close(target, features[sorted(group)].mean(0))


def test_boxes_lie_in_the_first_of_two_pictures(checkpoint: Checkpoint, items: list[Item]) -> None:
    sample, pictures = two_pictures(items)
    batch = batch_of(checkpoint, [items[2], (sample, pictures), items[3]])
    starts = [first for first, _, _ in picture_rows(batch)]
    used = [w.nonzero().flatten() for w in batch["pool"].split(STEPS)]
    own = batch["pool"][STEPS : 2 * STEPS].nonzero()[:, 1]
    assert len(used) == 3
    assert own.min() >= starts[1]
    assert own.max() < starts[2]
    assert batch["pool"][2 * STEPS :].nonzero()[:, 1].min() >= starts[3]


def test_all_takes_each_token_of_the_boxes_once_and_in_order(
    checkpoint: Checkpoint, items: list[Item]
) -> None:
    batch = batch_of(checkpoint, items, targets="all")
    assert set(batch["pool"].unique().tolist()) == {0.0, 1.0}
    at = 0
    for row, ((sample, _), (first, rows, columns)) in enumerate(
        zip(items, picture_rows(batch), strict=True)
    ):
        wanted = [first + int(t) for box in sample.boxes for t in tokens_in_box(box, rows, columns)]
        assert batch["target_at"][row].sum() == len(wanted)
        assert batch["pool"][at : at + len(wanted)].argmax(1).tolist() == wanted
        at += len(wanted)


def test_a_second_reading_is_the_prompt_with_latents_for_its_picture_then_the_answer(
    checkpoint: Checkpoint, items: list[Item]
) -> None:
    mixed, tokens = [*items[:5], two_pictures(items)], checkpoint.processor.tokens
    batch = batch_of(checkpoint, mixed, method="lvr-bottleneck")
    widths = []
    for row in range(len(mixed)):
        columns = batch["mask"][row] == 1
        first, places = (
            batch["ids"][row, columns].tolist(),
            batch["positions"][:, row, columns].T.tolist(),
        )
        start, following = first.index(tokens.lvr_start), 0
        wanted: list[
            tuple[int, int, list[int] | None]
        ] = []  # id, label, position (of a latent: not known yet)
        for token, place in zip(first[:start], places, strict=False):
            if token != tokens.image:
                wanted.append((token, -100, place))
            elif not any(token == tokens.lvr for token, _, _ in wanted):
                wanted += [(tokens.lvr, -100, None)] * STEPS
            following = max(following, *(p + 1 for p in place))
        answer = first[first.index(tokens.lvr_end) + 1 :]
        wanted += [(token, token, [following + i] * 3) for i, token in enumerate(answer)]
        widths.append(len(wanted))
        there = slice(0, len(wanted))
        assert batch["reader_mask"][row].nonzero().flatten().tolist() == list(range(len(wanted)))
        assert batch["reader_ids"][row, there].tolist() == [token for token, _, _ in wanted]
        assert batch["reader_labels"][row, there].tolist() == [label for _, label, _ in wanted]
        assert (batch["reader_labels"][row, len(wanted) :] == -100).all()
        found = batch["reader_positions"][:, row, there].T.tolist()
        assert [p for p, (_, _, place) in zip(found, wanted, strict=True) if place] == [
            place for _, _, place in wanted if place
        ]
    assert len(set(widths)) > 1, "nothing is padded"
    assert batch["reader_ids"].shape == (len(mixed), max(widths))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lvr-bottleneck"])
def test_without_a_bottleneck_nothing_is_read_twice(
    checkpoint: Checkpoint, items: list[Item], method: str
) -> None:
    assert not [name for name in batch_of(checkpoint, items[:1], method=method) if "reader" in name]


def test_all_is_cut_at_its_limit(checkpoint: Checkpoint, items: list[Item]) -> None:
    batch = batch_of(checkpoint, items, targets="all", max_targets=2)
    assert batch["target_at"].sum(1).max() == 2


def test_a_sample_without_boxes_looks_at_its_whole_picture(
    checkpoint: Checkpoint, items: list[Item]
) -> None:
    sample, pictures = items[0]
    batch = batch_of(checkpoint, [(replace(sample, boxes=()), pictures)])
    assert (batch["pool"].sum(0) > 0).all()


@pytest.mark.parametrize("method", WITH_LATENTS)
def test_a_sample_without_boxes_is_answered_at_once(
    checkpoint: Checkpoint, items: list[Item], method: str
) -> None:
    """In its place among the others: those that look come first, and pictures in the samples'
    order.
    """
    boxless = [(replace(s, boxes=()), pictures) for s, pictures in items[:3]]
    mixed = [boxless[0], items[3], boxless[1], items[4], boxless[2]]
    batch = batch_of(checkpoint, mixed, method=method, samples="boxed")
    looking, direct = (
        batch_of(checkpoint, items[3:5], method=method),
        batch_of(checkpoint, boxless, method="sft"),
    )
    for name in looking.keys() - {"pool", "pixel_values", "grid_thw"}:
        assert torch.equal(batch[name], looking[name]), name
    assert batch["direct"][0].keys() == direct["direct"][0].keys()
    for name, tensor in direct["direct"][0].items():
        assert torch.equal(batch["direct"][0][name], tensor), name
    for name in ("pixel_values", "grid_thw"):
        assert torch.equal(batch[name], torch.cat([looking[name], direct[name]])), name
    assert torch.equal(batch["pool"][:, : looking["pool"].shape[1]], looking["pool"])
    assert not batch["pool"][:, looking["pool"].shape[1] :].any()


def test_a_caption_among_words_does_not_make_all_rows_long(
    checkpoint: Checkpoint, items: list[Item]
) -> None:
    sample, pictures = items[0]
    caption = (replace(sample, answer=" ; ".join([sample.answer] * 40)), pictures)
    long, short = batch_of(checkpoint, [*items[1:5], caption, *items[5:9]], method="sft")["direct"]
    assert (len(long["ids"]), len(short["ids"])) == (1, 8)
    assert long["ids"].shape[1] > 2 * short["ids"].shape[1]
    assert len(batch_of(checkpoint, items, method="sft")["direct"]) == 1, (
        "not worth a pass of its own"
    )


@pytest.mark.parametrize("token", ["<|lvr_start|>", "<|lvr|>", "<|lvr_end|>", "<|image_pad|>"])
@pytest.mark.parametrize("part", ["question", "answer"])
def test_a_sample_with_a_token_of_the_loop_is_refused_by_its_name(
    checkpoint: Checkpoint, token: str, part: str
) -> None:
    words = {"question": "q", "answer": "a"} | {part: f"a {token}"}
    bad = Sample("bad", (), words["question"], words["answer"])
    with pytest.raises(DataError, match=f"sample bad: {part}: contains {re.escape(token)}"):
        check_samples(
            FileSource([Sample("good", (), "q", "a"), bad]), special_tokens(checkpoint.processor)
        )


# --------------------------------------------------------------------------------------------------
# the loss


def case(method: str, loss: str = "mse", feedback: str = "identity", **more: Any) -> Any:
    return pytest.param(
        {"method": method, "loss": loss, "feedback": feedback, **more},
        id=" ".join(map(str, (method, loss, feedback))),
    )


EVERY_METHOD = [case("sft"), case("dummy"), case("lvr"), case("lvr-free"), case("lvr-bottleneck")]
EVERY_LOSS = [
    *EVERY_METHOD,
    case("lvr", "contrastive", "norm-matched"),
    case("lvr-free", "contrastive", "norm-matched"),
    case("lvr-free", "none"),
    case("lvr-bottleneck", "contrastive", "norm-matched"),
    case("lvr-bottleneck", "none"),
]
Latents = dict[str, Any]  # settings of the latents


class Watched(LatentSFT):
    """Keeps what its last pass fed (B, C, H), the hidden states that came out (B, C, H), and the
    second reading.
    """

    detached = False  # feed latents that no gradient goes through

    def forward(self, **batch: Any) -> dict[str, torch.Tensor]:
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        return super().forward(**batch)

    @property
    def fed(self) -> torch.Tensor:
        return torch.cat([fed for fed, _ in self.parts], 1)

    @property
    def hidden(self) -> torch.Tensor:
        return torch.cat([hidden for _, hidden in self.parts], 1)

    def states(
        self, embeds: torch.Tensor, batch: Columns, first: int = 0, cache: Any = None
    ) -> torch.Tensor:
        if "ids" not in batch:
            self.reading = super().states(embeds, batch, first, cache)
            return self.reading
        if self.detached and first and embeds.shape[1] == 1:
            embeds = embeds.detach()
        hidden = super().states(embeds, batch, first, cache)
        self.parts.append((embeds, hidden))
        return hidden

    def _read_again(
        self, latents: torch.Tensor, features: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        self.latents = latents.detach() if self.detached else latents
        return super()._read_again(self.latents, features, batch)


def sft_of(model: Any, checkpoint: Checkpoint, **settings: Any) -> Watched:
    core = (
        model if hasattr(model, "get_base_model") else SimpleNamespace(get_base_model=lambda: model)
    )
    return Watched(core, checkpoint.processor.tokens, replace(SETTINGS.latent, **settings), NORM)


@dataclass
class ByHand:
    """One sample's pass. ce, right: of each token spoken. predicting: the states (H,) before its
    latents. own: the visual tokens behind each of these latents. features: all visual tokens (T,
    H). places: the visual tokens that latents were nearest to.
    """

    features: torch.Tensor
    ce: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    predicting: list[torch.Tensor] = field(default_factory=list)
    own: list[list[int]] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def hear(self, model: Any, state: torch.Tensor, token: int) -> None:
        scores = model.lm_head(state).log_softmax(-1)
        self.ce.append(-float(scores[token]))
        self.right.append(int(scores.argmax()) == token)


def states_of(model: Any, fed: list[torch.Tensor], places: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states (S, H) of one row, read at once and without a cache; places (3,) of each."""
    out = model.model.language_model(
        inputs_embeds=torch.stack(fed)[None],
        position_ids=torch.stack(places[: len(fed)], 1)[:, None],
    )
    return torch.as_tensor(out.last_hidden_state[0])


def nearest(latent: torch.Tensor, features: torch.Tensor) -> int:
    apart = features.double() - features.double().mean(0)
    return max(range(len(apart)), key=lambda i: float(latent.double() @ apart[i] / apart[i].norm()))


def read_by_hand(
    model: Any, checkpoint: Checkpoint, ids: list[int], places: list[torch.Tensor], hand: ByHand
) -> tuple[torch.Tensor, list[int]]:
    """The second reading of one row (prompt, <|lvr_start|>, latents, <|lvr_end|>, answer): its
    states (S, H), and the columns of its answer. Latents that are nearest to one visual token are
    one, their mean.
    """
    tokens, embedding = checkpoint.processor.tokens, model.get_input_embeddings().weight
    start = ids.index(tokens.lvr_start)
    seen = [i for i in range(start) if ids[i] == tokens.image]
    fed, where = [], []
    for i in range(start):
        if ids[i] != tokens.image:
            fed.append(embedding[ids[i]])
            where.append(places[i])
        elif i == seen[0]:
            hand.places = [nearest(z, hand.features) for z in hand.latents]
            for place in dict.fromkeys(hand.places):
                together = [z for z, p in zip(hand.latents, hand.places, strict=True) if p == place]
                fed.append(torch.stack(together).mean(0))
                where.append(places[seen[place]])
    following = 1 + max(int(p.max()) for p in places[:start])
    answer = ids[ids.index(tokens.lvr_end) + 1 :]
    columns = list(range(len(fed), len(fed) + len(answer)))
    for i, token in enumerate(answer):
        fed.append(embedding[token])
        where.append(torch.full((3,), following + i))
    return states_of(model, fed, where), columns


@torch.no_grad()
def by_hand(
    model: Any, checkpoint: Checkpoint, item: Item, taught: bool | None = None, **settings: Any
) -> ByHand:
    """A sample's pass written out, position by position and without a cache. taught: feed the
    targets; None: as the method does.
    """
    chosen, tokens = replace(SETTINGS.latent, **settings), checkpoint.processor.tokens
    taught = chosen.method == "lvr" if taught is None else taught
    batch = rows_of(batch_of(checkpoint, [item], **settings))
    ids, places = batch["ids"][0].tolist(), list(batch["positions"][:, 0].T)
    hand = ByHand(
        torch.cat(
            list(
                model.model.get_image_features(
                    batch["pixel_values"], batch["grid_thw"]
                ).pooler_output
            )
        )
    )
    if chosen.method not in ("sft", "dummy"):
        hand.own = [w.nonzero().flatten().tolist() for w in batch["pool"]]
        ((_, rows, columns),) = picture_rows(batch)
        assert len(hand.own) == STEPS
        assert {t for own in hand.own for t in own} <= {
            int(t) for b in item[0].boxes for t in tokens_in_box(b, rows, columns)
        }
    seen, fed = iter(hand.features), []
    for token in ids:
        if token == tokens.image:
            fed.append(next(seen))
        elif token == tokens.lvr and chosen.method != "dummy":
            target = hand.features[hand.own[len(hand.latents)]].mean(0)
            hand.predicting.append(states_of(model, fed, places)[-1])
            latent = target if taught else hand.predicting[-1]
            hand.latents.append(
                latent * NORM / latent.norm() if chosen.feedback == "norm-matched" else latent
            )
            fed.append(hand.latents[-1])
        else:
            fed.append(model.get_input_embeddings().weight[token])
    hidden, start = states_of(model, fed, places), int(batch["response"])
    if chosen.method == "lvr-bottleneck":
        hand.hear(model, hidden[start - 1], ids[start])
        hidden, answer = read_by_hand(model, checkpoint, ids, places, hand)
        for column, token in zip(answer, ids[-len(answer) :], strict=True):
            hand.hear(model, hidden[column - 1], token)
    else:
        for column in range(start, len(ids)):
            if ids[column] != tokens.lvr:
                hand.hear(model, hidden[column - 1], ids[column])
    return hand


def mean_ce(hands: list[ByHand]) -> float:
    """Each sample weighs the same, however much it says."""
    return sum(sum(hand.ce) / len(hand.ce) for hand in hands) / len(hands)


def regression(hands: list[ByHand]) -> float:
    found = [
        float(((h - hand.features[own].mean(0)) ** 2).mean())
        for hand in hands
        for h, own in zip(hand.predicting, hand.own, strict=True)
    ]
    return sum(found) / len(found)


def contrast(hands: list[ByHand], temperature: float) -> tuple[float, float]:
    """The contrastive loss against all visual tokens of a batch, one by one, and the share of
    latents whose nearest token is their own.
    """
    tokens = torch.cat([hand.features for hand in hands]).double()
    mean, first = sum(tokens) / len(tokens), 0
    losses, found = [], []
    for hand in hands:
        for state, own in zip(hand.predicting, hand.own, strict=True):
            h = state.double()
            cosines = [float(h @ (t - mean) / (h.norm() * (t - mean).norm())) for t in tokens]
            everyone = [math.exp(c / temperature) for c in cosines]
            mine = {first + i for i in own}
            losses.append(-math.log(sum(everyone[i] for i in mine) / sum(everyone)))
            found.append(max(range(len(cosines)), key=cosines.__getitem__) in mine)
        first += len(hand.features)
    return sum(losses) / len(losses), sum(found) / len(found)


@pytest.mark.parametrize("latents", EVERY_LOSS)
@pytest.mark.parametrize("count", [1, 4])
def test_the_loss_is_cross_entropy_and_the_weighted_loss_of_the_latents(
    small_model: Any, checkpoint: Checkpoint, items: list[Item], latents: Latents, count: int
) -> None:
    """Of a sample alone and of several together, whose cross-entropy and regression do not hang on
    each other.
    """
    hands = [by_hand(small_model, checkpoint, item, **latents) for item in items[:count]]
    batch = batch_of(checkpoint, items[:count], **latents)
    assert (rows_of(batch)["mask"] == 0).any() == (count > 1), "nothing is padded"
    right = [x for hand in hands for x in hand.right]
    wanted = {"ce": mean_ce(hands), "right": sum(right) / len(right), "latent": 0.0, "found": 0.0}
    if latents["method"] not in ("sft", "dummy"):
        contrastive, wanted["found"] = contrast(hands, 0.3)
        wanted["latent"] = {"mse": regression(hands), "contrastive": contrastive, "none": 0.0}[
            latents["loss"]
        ]
        assert (wanted["latent"] > 0) == (latents["loss"] != "none")
    out = sft_of(small_model, checkpoint, **latents, weight=1.7, temperature=0.3)(**batch)
    for name, value in wanted.items():
        assert float(out[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert float(out["loss"]) == pytest.approx(wanted["ce"] + 1.7 * wanted["latent"], rel=1e-4)


@pytest.mark.parametrize("latents", [c for c in EVERY_LOSS if c.values[0]["method"] != "sft"])
def test_samples_that_look_and_others_learn_beside_each_other(
    small_model: Any, checkpoint: Checkpoint, items: list[Item], latents: Latents
) -> None:
    """Each as if it were alone, a long one among them, but for the contrast, which is against the
    pictures of all.
    """
    long = replace(items[6][0], boxes=(), answer=" ; ".join([items[6][0].answer] * 40))
    direct = [
        (long, items[6][1]),
        *((replace(s, boxes=()), pictures) for s, pictures in items[4:6]),
    ]
    hands = [by_hand(small_model, checkpoint, item, **latents) for item in items[:2]]
    plain = [by_hand(small_model, checkpoint, item, method="sft") for item in direct]
    batch = batch_of(
        checkpoint,
        [direct[2], items[0], direct[0], items[1], direct[1]],
        **latents,
        samples="boxed",
    )
    assert len(batch["direct"]) == 2
    out = sft_of(small_model, checkpoint, **latents, temperature=0.3)(**batch)
    assert float(out["ce"]) == pytest.approx(mean_ce(hands + plain), rel=1e-4)
    if latents["method"] == "dummy" or latents["loss"] == "none":
        assert float(out["latent"]) == 0
    elif latents["loss"] == "mse":
        assert float(out["latent"]) == pytest.approx(regression(hands), rel=1e-4)
    else:
        others = [replace(hand, predicting=[], own=[]) for hand in plain]
        assert float(out["latent"]) == pytest.approx(contrast(hands + others, 0.3)[0], rel=1e-4)


def test_a_loss_without_weight_is_cross_entropy_alone(
    small_model: Any, checkpoint: Checkpoint, items: list[Item]
) -> None:
    out = sft_of(small_model, checkpoint, weight=0.0)(**batch_of(checkpoint, items[:1]))
    assert float(out["loss"]) == float(out["ce"])
    assert float(out["latent"]) > 0


@pytest.mark.parametrize(
    ("relax", "share"),
    [
        (0.0, [1, 1, 1, 1]),
        (1.0, [1, 0.75, 0.5, 0]),
        (0.5, [1, 1, 1, 0]),
        (0.8, [1, 0.9375, 0.625, 0]),
    ],
)
def test_the_weight_of_the_latents_loss_falls_to_0_over_the_last_steps(
    small_model: Any, checkpoint: Checkpoint, items: list[Item], relax: float, share: list[float]
) -> None:
    sft, batch = (
        sft_of(small_model, checkpoint, weight=0.5, relax=relax),
        batch_of(checkpoint, items[:1]),
    )
    for progress, part in zip((0.0, 0.25, 0.5, 1.0), share, strict=True):
        sft.train().progress = progress
        out = sft(**batch)
        assert float(out["loss"] - out["ce"]) == pytest.approx(
            part * 0.5 * float(out["latent"]), abs=1e-5
        ), progress
    out = sft.eval()(**batch)
    assert float(out["loss"] - out["ce"]) == pytest.approx(0.5 * float(out["latent"]), rel=1e-4), (
        "evaluation compares across steps"
    )


def test_what_the_latents_are_fed_and_what_the_answer_sees_matters(
    small_model: Any, checkpoint: Checkpoint, items: list[Item]
) -> None:
    """The tests by hand tell the methods apart."""
    ways: list[dict[str, Any]] = [
        {"method": m, "feedback": f} for m in METHODS for f in ("identity", "norm-matched")
    ]
    ways = [w for w in ways if w["method"] not in ("sft", "dummy") or w["feedback"] == "identity"]
    ways += [{"method": "lvr-bottleneck", "taught": True}]
    last = [
        by_hand(small_model, checkpoint, items[0], **way).ce[-2] for way in ways
    ]  # the answer's last word
    assert len(last) == 9
    for i, a in enumerate(last):
        assert all(a != pytest.approx(b, rel=1e-3) for b in last[:i]), f"{ways[i]} is like another"


def test_contrast_is_against_the_other_pictures_of_a_batch_too(
    small_model: Any, checkpoint: Checkpoint, items: list[Item]
) -> None:
    latents: Latents = {"method": "lvr", "loss": "contrastive"}
    together = sft_of(small_model, checkpoint, **latents)(
        **batch_of(checkpoint, items[:4], **latents)
    )
    alone = [
        float(
            sft_of(small_model, checkpoint, **latents)(**batch_of(checkpoint, [item], **latents))[
                "latent"
            ]
        )
        for item in items[:4]
    ]
    assert float(together["latent"]) > sum(alone) / 4 + 0.5


@pytest.mark.parametrize("latents", [*EVERY_METHOD, case("lvr-bottleneck", "mse", "norm-matched")])
def test_a_samples_hidden_states_do_not_hang_on_the_others_of_its_batch(
    small_model: Any, checkpoint: Checkpoint, items: list[Item], latents: Latents
) -> None:
    sft = sft_of(small_model, checkpoint, **latents)
    items = in_order(items, sft.settings)
    batch = batch_of(checkpoint, items, **latents)
    there = rows_of(batch)
    extents = [extent(there, row) for row in range(len(items))]
    assert len({int(there["response"]) - first for first, _ in extents}) > 1, (
        "all prompts are equally long"
    )
    sft(**batch)
    together, reading = sft.hidden, getattr(sft, "reading", None)
    assert (reading is not None) == (latents["method"] == "lvr-bottleneck")
    assert together.isfinite().all(), (
        "what is not finite in padding reaches the rest through gradients"
    )
    assert reading is None or reading.isfinite().all()
    for row, (item, (first, end)) in enumerate(zip(items, extents, strict=True)):
        alone = batch_of(checkpoint, [item], **latents)
        sft(**alone)
        end = min(end, together.shape[1])
        assert end - first == sft.hidden.shape[1]
        torch.testing.assert_close(together[row, first:end], sft.hidden[0], rtol=1e-4, atol=1e-4)
        if reading is not None:
            torch.testing.assert_close(
                reading[row, : sft.reading.shape[1]], sft.reading[0], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("latents", EVERY_METHOD)
def test_what_stands_in_padding_changes_nothing(
    small_model: Any, checkpoint: Checkpoint, items: list[Item], latents: Latents
) -> None:
    batch = batch_of(checkpoint, items[:2], **latents)
    padded = copy.deepcopy(batch)
    (rows,) = [padded] if "ids" in padded else padded["direct"]
    for name, value in (
        ("ids", 7),
        ("labels", -100),
        ("mask", 0),
        ("target_at", False),
        ("positions", 3),
    ):
        rows[name] = torch.nn.functional.pad(rows[name], (3, 5), value=value)
        if f"reader_{name}" in batch:
            rows[f"reader_{name}"] = torch.nn.functional.pad(
                rows[f"reader_{name}"], (2, 4), value=value
            )
    rows["response"] += 3
    losses = [
        float(sft_of(small_model, checkpoint, **latents)(**b)["loss"]) for b in (batch, padded)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("method", ["lvr-free", "lvr-bottleneck"])
@pytest.mark.parametrize("feedback", ["identity", "norm-matched"])
def test_a_warm_up_feeds_the_targets_in_training_alone(
    small_model: Any, checkpoint: Checkpoint, items: list[Item], method: str, feedback: str
) -> None:
    latents: Latents = {"method": method, "feedback": feedback}
    taught, free = (
        [by_hand(small_model, checkpoint, i, t, **latents) for i in items[:2]]
        for t in (True, False)
    )
    batch = batch_of(checkpoint, items[:2], **latents)
    sft = sft_of(small_model, checkpoint, **latents, warmup=0.5)
    for training, progress, hands in (
        (True, 0.0, taught),
        (True, 0.49, taught),
        (True, 0.5, free),
        (True, 1.0, free),
        (False, 0.0, free),
    ):
        sft.train(training).progress = progress
        out = sft(**batch)
        assert float(out["ce"]) == pytest.approx(mean_ce(hands), rel=1e-4), (training, progress)
        assert float(out["latent"]) == pytest.approx(regression(hands), rel=1e-4), (
            training,
            progress,
        )
    assert sum(taught[0].ce) != pytest.approx(sum(free[0].ce), rel=1e-3)


# --------------------------------------------------------------------------------------------------
# the second reading


def latents_near(features: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Latents (K, H) that are nearest to these visual tokens (T, H), and none of them a visual
    token itself.
    """
    noise = 0.1 * torch.randn(
        len(tokens), features.shape[1], generator=torch.Generator().manual_seed(2)
    )
    found = (features - features.mean(0))[tokens] * torch.linspace(0.5, 2, len(tokens))[
        :, None
    ] + noise
    assert [nearest(z, features) for z in found] == tokens
    return found


class Given(Bottleneck):
    """The bottleneck with latents (B, K, H) that the first pass has no part in."""

    def __init__(self, latents: torch.Tensor) -> None:
        self.given = latents

    def run(self, *inputs: Any) -> tuple[torch.Tensor, Any]:
        return super().run(*inputs)[0], self.given


def given_latents(
    small_model: Any, checkpoint: Checkpoint, items: Sequence[Item]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Visual tokens of each sample, and latents (B, K, H) in four, three, two and one place of its
    picture, in an order of their own.
    """
    runtime = TorchRuntime(small_model, checkpoint)
    features = [
        torch.from_numpy(prepare_prompt(runtime, pictures, s.question)[0].features)
        for s, pictures in items
    ]
    near = [[5, 2, 11, 0], [9, 3, 9, 1], [7, 4, 7, 7], [6, 6, 6, 6]]
    return features, torch.stack([latents_near(f, near[i % 4]) for i, f in enumerate(features)])


@torch.no_grad()
def test_the_second_reading_by_hand(
    small_model: Any, checkpoint: Checkpoint, items: list[Item]
) -> None:
    mixed = [*items[:4], two_pictures(items)]
    features, latents = given_latents(small_model, checkpoint, mixed)
    latents[4] = latents_near(
        features[4], [len(features[4]) - 1, 3, len(features[4]) - 2, 3]
    )  # in both pictures
    sft = sft_of(small_model, checkpoint, method="lvr-bottleneck")
    sft.method = Given(latents)
    batch = batch_of(checkpoint, mixed, method="lvr-bottleneck")
    sft(**batch)
    for row, own in enumerate(features):
        columns = batch["mask"][row] == 1
        hand = ByHand(own, latents=list(latents[row]))
        wanted, answer = read_by_hand(
            small_model,
            checkpoint,
            batch["ids"][row, columns].tolist(),
            list(batch["positions"][:, row, columns].T),
            hand,
        )
        assert len(set(hand.places)) == [4, 3, 2, 1, 3][row]
        kept, lvr = [], 0
        for column in (
            batch["reader_mask"][row].nonzero().flatten().tolist()
        ):  # a latent that another of its place stands for is not read
            is_latent = int(batch["reader_ids"][row, column]) == checkpoint.processor.tokens.lvr
            if not is_latent or hand.places[lvr] not in hand.places[:lvr]:
                kept.append(column)
            lvr += is_latent
        assert len(kept) == len(wanted)
        assert (
            batch["reader_labels"][row, [kept[i] for i in answer]].tolist()
            == batch["reader_labels"][row, kept][-len(answer) :].tolist()
        )
        torch.testing.assert_close(sft.reading[row, kept], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nothing_but_the_latents_reaches_the_answer(
    small_model: Any, checkpoint: Checkpoint, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other visual tokens, to which the same latents are as near: the first pass is another, and
    the second is not.
    """
    batch = batch_of(checkpoint, items[:3], method="lvr-bottleneck")
    own, latents = given_latents(small_model, checkpoint, items[:3])
    others = [8 * f + torch.linspace(-3, 3, f.shape[1]) for f in own]
    for f, other, z in zip(own, others, latents, strict=True):
        assert [nearest(x, f) for x in z] == [nearest(x, other) for x in z]
    sft = sft_of(small_model, checkpoint, method="lvr-bottleneck")

    def passes(
        features: list[torch.Tensor], given: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(module, "visual_tokens", lambda *_: torch.cat(features))
        sft.method = Given(given)
        sft(**batch)
        return sft.hidden[:, -1], sft.reading

    (first, reading), (other_first, same) = passes(own, latents), passes(others, latents)
    assert (first - other_first).norm() > 0.1 * first.norm(), (
        "these visual tokens are as good as the same"
    )
    assert torch.equal(reading, same)
    _, moved_reading = passes(own, 1.5 * latents)
    asked = batch["reader_labels"] != -100
    assert ((moved_reading - reading).norm(dim=-1) > 1e-3)[:, :-1][asked[:, 1:]].all(), (
        "the answer does not hang on the latents"
    )


class Forced(TorchRuntime):
    """A runtime that chooses what it is told to, row by row; all rows are in text at the same time,
    until they are done.
    """

    def __init__(
        self, model: Any, checkpoint: Checkpoint, spec: LatentSpec, scripts: list[list[int]]
    ) -> None:
        super().__init__(model, replace(checkpoint, latent=spec))
        self.scripts, self.said = scripts, 0

    def choose(self, hidden: np.ndarray, *_: Any) -> list[int]:
        said = [script[self.said] for script in self.scripts if len(script) > self.said]
        self.said += 1
        assert len(said) == len(hidden)
        return said


@pytest.mark.parametrize(
    "latents",
    [
        *EVERY_METHOD,
        *(case(m, "mse", "norm-matched") for m in ("lvr", "lvr-free", "lvr-bottleneck")),
    ],
)
def test_what_is_trained_is_what_the_decode_loop_does(
    small_model: Any, checkpoint: Checkpoint, items: list[Item], latents: Latents
) -> None:
    """Latents and hidden states at every step. Of "lvr", which is fed what is not there when
    running, the loop is given the targets.
    """
    sft, method = sft_of(small_model, checkpoint, **latents), latents["method"]
    mixed = in_order([*items[:7], two_pictures(items)], sft.settings)
    batch = batch_of(checkpoint, mixed, **latents)
    with torch.no_grad():
        sft(**batch)
    batch = rows_of(batch)
    tokens, response = checkpoint.processor.tokens, int(batch["response"])
    at = batch["ids"] == tokens.lvr
    fed = [
        sft.latents[row] if method == "lvr-bottleneck" else sft.fed[row, at[row]]
        for row in range(len(mixed))
    ]
    scripts = [
        [t for t in row[row != -100].tolist() if t != tokens.lvr_end] for row in batch["labels"]
    ]  # the loop closes by itself
    runtime = Forced(small_model, checkpoint, sft.spec, scripts)
    prompts = [prepare_prompt(runtime, pictures, sample.question)[0] for sample, pictures in mixed]
    given = [z.numpy() for z in fed] if method == "lvr" else None
    results = decode(
        runtime, prompts, Options(max_tokens=max(map(len, scripts)), keep_hidden=True), given
    )
    for row, (result, script) in enumerate(zip(results, scripts, strict=True)):
        assert result.reason == "stop"
        assert result.tokens == [t for t in script[:-1] if t != tokens.lvr_start], (
            "another answer was fed"
        )
        assert len(result.latents) == len(fed[row]) == (0 if method == "sft" else STEPS)
        if fed[row].numel():
            np.testing.assert_allclose(fed[row], np.stack(result.latents), atol=1e-4, rtol=1e-4)
        first, end = response - 1, extent(batch, row)[1] - 1
        # Up to the state that became the last latent; then the second reading's, up to the
        # answer's last.
        if method == "lvr-bottleneck":
            asked = (batch["reader_labels"][row] != -100).nonzero().flatten()
            trained = torch.cat(
                [sft.hidden[row, first : response + STEPS], sft.reading[row, asked - 1]]
            )
        # every state from the prompt's last: <|lvr_start|>, the latents, <|lvr_end|> and the answer
        else:
            trained = sft.hidden[row, first:end]
        np.testing.assert_allclose(trained, np.stack(result.hidden), atol=1e-4, rtol=1e-4)


def test_the_norm_of_visual_tokens_is_their_mean_length_in_the_first_samples(
    small_model: Any, checkpoint: Checkpoint, items: list[Item]
) -> None:
    features, _ = given_latents(small_model, checkpoint, items)
    lengths = [float(token.norm()) for f in features[:3] for token in f]
    collator = Collator(checkpoint, SETTINGS.latent)
    found = norm_of_visual_tokens(small_model, collator, items, 3)
    assert found == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)
    assert found != pytest.approx(
        norm_of_visual_tokens(small_model, collator, items), rel=1e-5
    )  # of all twelve


# --------------------------------------------------------------------------------------------------
# types


HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])


@HALF
@pytest.mark.parametrize("loss", ["mse", "contrastive"])
def test_the_latents_loss_is_computed_in_fp32(
    small_model: Any, checkpoint: Checkpoint, half: torch.dtype, loss: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, features = (torch.randn(n, 256, generator=generator) for n in (4, 30))
    pool = torch.rand(4, 30, generator=generator).softmax(1)
    sft = sft_of(small_model, checkpoint, loss=loss)
    wanted, _ = sft._latent_loss(predicted, features, pool)
    with torch.autocast("cpu", half):
        got, _ = sft._latent_loss(predicted, features, pool)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)


@HALF
def test_the_cross_entropy_is_computed_in_fp32(half: torch.dtype) -> None:
    layer = torch.nn.Linear(64, 500, bias=False)
    states, chosen = torch.randn(9, 64), torch.arange(9)
    with torch.autocast("cpu", half):
        logits = layer(states)
        scores, best = Head(layer).scores(states, chosen)
    assert logits.dtype == half
    wanted = logits.float().log_softmax(-1)
    torch.testing.assert_close(scores, wanted[chosen, chosen], rtol=1e-6, atol=1e-6)
    assert torch.equal(best, logits.argmax(-1) == chosen)


@HALF
def test_the_nearest_visual_token_is_found_in_fp32(half: torch.dtype) -> None:
    """Tokens that half precision cannot tell apart."""
    features = torch.randn(20, 64) * 0.01 + torch.randn(64)
    latents = features[[3, 17, 8]] - features.mean(0) + 1e-4
    with torch.autocast("cpu", half):
        found = near(latents, features)
    assert found.tolist() == [3, 17, 8]
    np.testing.assert_array_equal(found, near(latents.numpy(), features.numpy()))


@HALF
def test_what_is_fed_has_its_length_where_squares_overflow(half: torch.dtype) -> None:
    states = torch.full((2, 256), 300.0, dtype=half)
    with torch.autocast("cpu", half):
        fed = LatentSpec(2, "norm-matched", norm=NORM).fed(states)
    torch.testing.assert_close(fed.norm(dim=-1), torch.full((2,), NORM))


@HALF
def test_all_that_is_trained_is_fp32(checkpoint: Checkpoint, half: torch.dtype) -> None:
    model = adapted(nf4.load_nf4(checkpoint, half), checkpoint, SETTINGS)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_many_states_are_scored_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scores and gradients, and never logits of all of them."""
    layer = torch.nn.Linear(16, 40, bias=False)
    made: list[int] = []
    layer.register_forward_hook(lambda _, __, logits: made.append(len(logits)))
    closed = (5, torch.arange(11) % 2 == 0)
    head = Head(layer, never=(3, 4), temperature=0.7)
    found = []
    for rows in (100, 3):
        monkeypatch.setattr(head_module, "ROWS", rows)
        states = torch.linspace(-1, 1, 11 * 16).reshape(11, 16).requires_grad_()
        scores, best = head.scores(states, torch.arange(6, 17), closed)
        (slope,) = torch.autograd.grad((scores * torch.arange(11)).sum(), states)
        found.append((scores, best, slope))
    assert made == [11, 3, 3, 3, 2, 2, 3, 3, 3]
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# what is trained


@pytest.fixture
def tuned(checkpoint: Checkpoint) -> Any:
    """The 4-bit model with fresh adapters that were moved a little, so that they do something."""
    return moved(adapted(nf4.load_nf4(checkpoint, torch.float32), checkpoint, SETTINGS))


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("latents", EVERY_METHOD)
def test_only_adapters_and_three_token_rows_get_gradients(
    tuned: Any, checkpoint: Checkpoint, items: list[Item], latents: Latents
) -> None:
    tuned.train()
    sft_of(tuned, checkpoint, **latents)(**batch_of(checkpoint, items[:2], **latents))[
        "loss"
    ].backward()
    with_gradient = {n: p for n, p in tuned.named_parameters() if p.grad is not None}
    rows = {n: p for n, p in with_gradient.items() if "trainable_tokens" in n}
    adapters = {n for n in with_gradient if "lora_" in n}
    assert set(with_gradient) == set(rows) | adapters
    assert not [n for n in with_gradient if "visual" in n]
    layers = tuned.get_base_model().config.text_config.num_hidden_layers
    assert len(adapters) == layers * 7 * 2  # q, k, v, o, gate, up, down; A and B
    assert all(float(p.grad.abs().sum()) > 0 for p in with_gradient.values())
    assert {p.shape for p in rows.values()} == {
        (3, tuned.get_base_model().config.text_config.hidden_size)
    }
    # The head shares the rows, so each of them learns when not to be said, also where it is never
    # fed.
    assert all((p.grad.abs().sum(1) > 0).all() for p in rows.values()), (
        "one of the three rows is not trained"
    )


@pytest.mark.parametrize(
    ("method", "learned"),
    [
        ("sft", set()),
        ("dummy", {"lvr_start", "lvr", "lvr_end"}),
        ("lvr", {"lvr_start", "lvr_end"}),
        ("lvr-free", {"lvr_start", "lvr_end"}),
        ("lvr-bottleneck", {"lvr_start"}),
    ],
)
def test_the_markers_that_are_fed_get_gradients_as_inputs_and_no_others(
    tuned: Any, checkpoint: Checkpoint, items: list[Item], method: str, learned: set[str]
) -> None:
    tuned.train()
    looked_up: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: Any, inputs: tuple[torch.Tensor, ...], embeds: torch.Tensor) -> None:
        embeds.retain_grad()
        looked_up.append((inputs[0], embeds))

    hook = tuned.get_base_model().get_input_embeddings().register_forward_hook(keep)
    sft_of(tuned, checkpoint, method=method)(**batch_of(checkpoint, items[:2], method=method))[
        "loss"
    ].backward()
    hook.remove()
    assert len(looked_up) == (2 if method == "lvr-bottleneck" else 1)
    slopes = [
        (ids, embeds.grad.abs().sum(-1)) for ids, embeds in looked_up if embeds.grad is not None
    ]
    assert len(slopes) == len(looked_up)
    found = {
        name
        for name in ("lvr_start", "lvr", "lvr_end")
        if sum(
            float(slope[ids == getattr(checkpoint.processor.tokens, name)].sum())
            for ids, slope in slopes
        )
        > 0
    }
    assert found == learned


@FREE
def test_the_answers_loss_trains_the_adapters_through_the_latents(
    tuned: Any, checkpoint: Checkpoint, items: list[Item], method: str
) -> None:
    """λ = 0. What goes through the latents is told from what goes around them by detaching them;
    both together are the loss's slope.
    """
    tuned.train()
    latents: Latents = {"method": method, "weight": 0.0}
    batch, sft = batch_of(checkpoint, items[:2], **latents), sft_of(tuned, checkpoint, **latents)
    names, trained = zip(
        *((n, p) for n, p in tuned.named_parameters() if p.requires_grad), strict=True
    )
    loss = sft(**batch)["loss"]
    read = (
        [sft.latents]
        if method == "lvr-bottleneck"
        else [fed for fed, _ in sft.parts[1 : 1 + STEPS]]
    )
    slopes = torch.cat(torch.autograd.grad(loss, read, retain_graph=True), 1)
    assert slopes.shape[1] == STEPS
    assert (slopes.abs().sum(2) > 0).all(), "a latent that the answer does not hang on"
    total = torch.autograd.grad(loss, trained)
    sft.detached = True
    around = torch.autograd.grad(sft(**batch)["loss"], trained, materialize_grads=True)
    through = [a - b for a, b in zip(total, around, strict=True)]
    assert all(
        float(g.norm()) > 1e-3 * float(t.norm())
        for n, g, t in zip(names, through, total, strict=True)
        if "lora_" in n
    )

    length = float(torch.cat([g.flatten() for g in through]).norm())
    direction = [g / length for g in through]
    losses = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            for parameter, along in zip(trained, direction, strict=True):
                parameter.add_(along, alpha=step)
            losses.append(float(sft(**batch)["loss"]))
    slope = (losses[0] - losses[1]) / 2e-3
    by_total, by_around = (
        float(sum((g * d).sum() for g, d in zip(gs, direction, strict=True)))
        for gs in (total, around)
    )
    assert slope == pytest.approx(by_total, rel=0.02)
    assert slope != pytest.approx(by_around, rel=0.1)


def test_an_optimizer_step_leaves_every_other_embedding_row_as_it_was(
    tuned: Any, checkpoint: Checkpoint, items: list[Item]
) -> None:
    tuned.train()
    core = tuned.get_base_model()
    every = torch.arange(core.config.text_config.vocab_size)
    before = core.get_input_embeddings()(every).detach().clone()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    sft_of(tuned, checkpoint)(**batch_of(checkpoint, items[:2]))["loss"].backward()
    optimizer.step()
    changed = (core.get_input_embeddings()(every) != before).any(1).nonzero().flatten().tolist()
    assert changed == sorted(markers_of(checkpoint))


def test_markers_begin_where_the_base_model_understands_them(checkpoint: Checkpoint) -> None:
    model = adapted(nf4.load_nf4(checkpoint, torch.float32), checkpoint, SETTINGS).get_base_model()
    picture, closing = (
        checkpoint.processor.tokenizer.encode(text).ids[-1]
        for text in ("<|image_pad|>", "<|im_start|>assistant")
    )
    markers = markers_of(checkpoint)
    embed = model.get_input_embeddings()
    torch.testing.assert_close(
        embed(torch.tensor(markers)), embed(torch.tensor([closing, picture, closing]))
    )


def test_a_marker_row_is_trained_as_an_output_too(tuned: Any, checkpoint: Checkpoint) -> None:
    """The head shares the embedding's weights: what is learned about a marker must show in its
    logit.
    """
    core = tuned.get_base_model()
    hidden = torch.randn(1, core.config.text_config.hidden_size)
    before = core.lm_head(hidden).detach().clone()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(1.0)
    changed = (core.lm_head(hidden) != before)[0].nonzero().flatten().tolist()
    assert changed == sorted(markers_of(checkpoint))


def test_linears_of_the_language_model_are_in_4_bits_and_nothing_else(
    checkpoint: Checkpoint,
) -> None:
    import bitsandbytes as bnb

    model = nf4.load_nf4(checkpoint, torch.float32)
    four_bit = [n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(four_bit) == 2 * 7
    assert all("language_model" in name for name in four_bit)
    plain = nf4.load_plain(checkpoint)
    for part in ("model.visual", "model.language_model.embed_tokens", "lm_head"):
        for (name, mine), (_, theirs) in zip(
            model.get_submodule(part).named_parameters(),
            plain.get_submodule(part).named_parameters(),
            strict=True,
        ):
            assert torch.equal(mine, theirs), f"{part}.{name} is not as in the checkpoint"


def test_a_skip_list_that_matches_nothing_is_noticed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint.processor.family, "keep_unquantized", ["visual"]
    )  # transformers ignores it in silence (docs/decisions.md)
    with pytest.raises(BundleError, match="4-bit loading went wrong"):
        nf4.load_nf4(checkpoint, torch.float32)


def test_a_linear_that_stayed_in_full_precision_is_noticed(checkpoint: Checkpoint) -> None:
    with pytest.raises(BundleError, match="4-bit loading went wrong"):
        nf4.check_quantized(nf4.load_plain(checkpoint), checkpoint)


@pytest.mark.parametrize("latents", EVERY_METHOD)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(
    checkpoint: Checkpoint, items: list[Item], latents: Latents
) -> None:
    """Every column is read once, with it as without."""
    method = latents["method"]
    latents = latents | {"feedback": "norm-matched"}
    batch = batch_of(checkpoint, items[:2], **latents)
    found = []
    for on in (False, True):
        settings = replace(SETTINGS, train=replace(SETTINGS.train, gradient_checkpointing=on))
        model = moved(
            adapted(nf4.load_nf4(checkpoint, torch.float32), checkpoint, settings)
        ).train()
        assert model.get_base_model().is_gradient_checkpointing is on
        sft = sft_of(model, checkpoint, **latents)
        loss = sft(**batch)["loss"]
        loss.backward()
        found.append(
            (loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
        if method not in ("lvr-free", "lvr-bottleneck"):
            continue
        response, width = int(batch["response"]), batch["ids"].shape[1]
        steps = STEPS if method == "lvr-free" else STEPS - 1
        rest = [width - response - 1 - STEPS] if method == "lvr-free" else []
        assert [fed.shape[1] for fed, _ in sft.parts] == [response + 1, *[1] * steps, *rest]
    (plain, gradients), (saving, others) = found
    assert saving == pytest.approx(plain, rel=1e-5)
    assert set(gradients) == set(others)
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_keeps_nothing_within_a_layer(
    checkpoint: Checkpoint, items: list[Item], on: bool
) -> None:
    settings = replace(SETTINGS, train=replace(SETTINGS.train, gradient_checkpointing=on))
    model = adapted(nf4.load_nf4(checkpoint, torch.float32), checkpoint, settings).train()
    sft = sft_of(model, checkpoint, method="lvr-free")
    widths = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        widths.add(tensor.shape[-1] if tensor.dim() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sft(**batch_of(checkpoint, items[:1], method="lvr-free"))
    assert (checkpoint.config["text_config"]["intermediate_size"] in widths) is not on


def multiply_adds(
    checkpoint: Checkpoint, item: Item, method: str, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Of one step of the language model with gradient checkpointing."""
    settings = replace(SETTINGS, train=replace(SETTINGS.train, gradient_checkpointing=True))
    model = adapted(nf4.load_nf4(checkpoint, torch.float32).dequantize(), checkpoint, settings)
    # The counter knows no fused attention of CPUs.
    model.get_base_model().set_attn_implementation("eager")
    sft = sft_of(model.train(), checkpoint, method=method)
    batch = batch_of(checkpoint, [item], method=method)
    width = model.get_base_model().config.text_config.hidden_size
    features = torch.randn(batch["pool"].shape[1], width)
    with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(module, "visual_tokens", lambda *_: features)
        sft(**batch)["loss"].backward()
    return int(counter.get_total_flops()) // 2


def test_a_step_with_gradient_checkpointing_costs_what_plain_tuning_costs(
    checkpoint: Checkpoint, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = checkpoint.processor.with_max_pixels(10**6)
    checkpoint = replace(checkpoint, processor=processor)
    sample, (picture,) = items[0]
    item = (sample, (picture.resize((448, 392)),))
    plain = multiply_adds(checkpoint, item, "sft", monkeypatch)
    ratios = {
        method: multiply_adds(checkpoint, item, method, monkeypatch) / plain
        for method in ("lvr", "lvr-bottleneck")
    }
    assert 1 < ratios["lvr"] <= 1.1
    assert 1 < ratios["lvr-bottleneck"] <= 1.35


# --------------------------------------------------------------------------------------------------
# saved and read


@pytest.fixture(scope="module")
def saved(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tuned model in memory, and the folder that it was saved to."""
    model = moved(adapted(nf4.load_nf4(checkpoint, torch.float32), checkpoint, SETTINGS)).eval()
    folder = tmp_path_factory.mktemp("tuned") / "out"
    write_side_files(folder, replace(checkpoint, latent=LatentSpec(steps=STEPS)), SETTINGS)
    model.save_pretrained(str(folder), safe_serialization=True)
    return model, folder


def hidden_states(
    model: Any, checkpoint: Checkpoint, items: Sequence[Item]
) -> tuple[list[list[int]], np.ndarray]:
    runtime = TorchRuntime(model, replace(checkpoint, latent=LatentSpec(steps=STEPS)))
    prompts = [prepare_prompt(runtime, pictures, sample.question)[0] for sample, pictures in items]
    results = decode(runtime, prompts, Options(max_tokens=4, min_tokens=4, keep_hidden=True))
    return [r.tokens for r in results], np.concatenate([np.stack(r.hidden) for r in results])


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_a_tuned_checkpoint_reads_back_as_it_was_trained(
    saved: tuple[Any, Path], checkpoint: Checkpoint, items: list[Item]
) -> None:
    model, folder = saved
    again = nf4.load_trained(read_checkpoint(folder), torch.float32)
    (tokens, want), (same, got) = (hidden_states(m, checkpoint, items[:3]) for m in (model, again))
    assert same == tokens
    assert relative(got, want) < 1e-5
    _, untuned = hidden_states(nf4.load_nf4(checkpoint, torch.float32), checkpoint, items[:3])
    assert untuned.shape != want.shape or relative(untuned, want) > 1e-2, (
        "the adapter does nothing, so nothing was tested"
    )


def test_merging_keeps_what_was_trained(
    saved: tuple[Any, Path], checkpoint: Checkpoint, items: list[Item]
) -> None:
    model, folder = saved
    merged = nf4.load_merged(read_checkpoint(folder))
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert not [n for n, _ in merged.named_modules() if "lora" in n]
    (tokens, want), (same, got) = (hidden_states(m, checkpoint, items[:3]) for m in (model, merged))
    assert same == tokens
    assert relative(got, want) < 1e-3


def test_merging_keeps_the_marker_rows_in_embedding_and_head(
    saved: tuple[Any, Path], checkpoint: Checkpoint
) -> None:
    model, folder = saved
    merged, core = nf4.load_merged(read_checkpoint(folder)), model.get_base_model()
    markers = torch.tensor(markers_of(checkpoint))
    torch.testing.assert_close(
        merged.get_input_embeddings()(markers), core.get_input_embeddings()(markers)
    )
    hidden = torch.randn(2, core.config.text_config.hidden_size)
    torch.testing.assert_close(merged.lm_head(hidden), core.lm_head(hidden), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_model_is_refused_by_name(
    saved: tuple[Any, Path], tmp_path: Path
) -> None:
    import shutil

    _, folder = saved
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    from safetensors.torch import load_file, save_file

    weights = {
        n: t[..., : t.shape[-1] // 2].contiguous()
        for n, t in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(weights, other / "adapter_model.safetensors")
    with pytest.raises(BundleError, match=f"{other}: the adapter does not fit its base"):
        nf4.load_trained(read_checkpoint(other), torch.float32)


def test_a_loss_of_random_weights_is_about_that_of_guessing(
    checkpoint: Checkpoint, items: list[Item]
) -> None:
    """The scale of the loss: a uniform guess over the vocabulary costs its logarithm."""
    from lvr_lite.toy import build

    model = build.make_model(build.make_tokenizer(), seed=1).eval()
    ce = float(sft_of(model, checkpoint)(**batch_of(checkpoint, items[:4]))["ce"])
    assert ce == pytest.approx(math.log(checkpoint.config["text_config"]["vocab_size"]), rel=0.1)
