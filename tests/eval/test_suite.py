"""Evaluation on a fake runtime that reads the question off the prompt and says what a table has for it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lvr_lite.checkpoint import read_checkpoint
from lvr_lite.data.make import write_scenes
from lvr_lite.data.samples import Sample
from lvr_lite.decode import Options
from lvr_lite.errors import DataError, UsageError
from lvr_lite.eval.report import show
from lvr_lite.eval.suite import Item, accuracy_on, evaluate, load_suite
from lvr_lite.latent import LatentSpec

H = 4


class Table:
    """Answers by question. A hidden state holds which answer it is in and how far: (answer, place, 0, 0)."""

    name, hidden_size, latent = "table", H, LatentSpec()

    def __init__(self, answers: dict[str, str]) -> None:
        checkpoint = read_checkpoint("tiny")
        self.family, self.image_spec, self.template = checkpoint.family, checkpoint.image_spec, checkpoint.template
        self.tokenizer, self.tokens = checkpoint.tokenizer, checkpoint.tokens
        self.questions = list(answers)
        self.scripts = [[*self.tokenizer.encode(a, add_special_tokens=False).ids, self.tokens.end[0]] for a in answers.values()]
        self.batches: list[int] = []

    def encode(self, pixel_values: np.ndarray, grids: list[tuple[int, int]]) -> np.ndarray:  # noqa: ARG002
        return np.full((len(pixel_values) // 4, H), float(self.tokens.image), np.float32)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return np.repeat(ids[..., None].astype(np.float32), H, -1)

    def start(self, batch: int, capacity: int) -> None:  # noqa: ARG002
        self.batches.append(batch)

    def prefill(self, embeds: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:  # noqa: ARG002
        texts = [self.tokenizer.decode(row[:n, 0].astype(int).tolist()) for row, n in zip(embeds, lengths, strict=True)]
        which = [max((i for i, q in enumerate(self.questions) if q in t), key=lambda i: len(self.questions[i])) for t in texts]
        self.state = np.array([[w, 0, 0, 0] for w in which], np.float32)
        return self.state.copy()

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:  # noqa: ARG002
        self.state[:, 1] += 1
        return self.state.copy()

    def head(self, hidden: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(hidden), self.tokenizer.get_vocab_size()), np.float32)
        for row, (which, place) in enumerate(hidden[:, :2].astype(int)):
            logits[row, self.scripts[which][min(place, len(self.scripts[which]) - 1)]] = 1
        return logits


QUESTIONS = ["what colour is the star", "what colour is the heart", "how many red shapes are there", "where is the cross", "which letter"]
EXPECTED = ["red", "blue", "two", "top left", "K"]
SAID = ["red", "green", "two", "Top left.", "X"]
TYPES = ["attribute", "attribute", "count", "position", None]
PAIRS = ["p", "p", "q", "q", "half"]


def items() -> Iterator[Item]:
    rows = zip(QUESTIONS, EXPECTED, TYPES, PAIRS, strict=True)
    for i, (question, answer, kind, pair) in enumerate(rows):
        picture = Image.new("RGB", (56 + 28 * i, 56), (40 * i, 0, 0))  # prompts of different lengths
        yield Sample(f"s{i}", (), question, answer, None, (), kind, pair), (picture,)


@pytest.fixture
def runtime() -> Any:
    return Table(dict(zip(QUESTIONS, SAID, strict=True)))


def test_answers_are_scored_each_against_its_own_sample(runtime: Any) -> None:
    result = evaluate(runtime, items())
    assert [a["correct"] for a in result["answers"]] == [True, False, True, True, False]
    assert [a["answer"] for a in result["answers"]] == SAID
    assert [a["id"] for a in result["answers"]] == [f"s{i}" for i in range(5)]
    assert result["accuracy"] == 0.6


@pytest.mark.parametrize(("batch", "groups"), [(1, [1] * 5), (2, [2, 2, 1]), (16, [5])])
def test_the_size_of_batches_changes_no_answer(runtime: Any, batch: int, groups: list[int]) -> None:
    seen: list[int] = []
    result = evaluate(runtime, items(), batch=batch, progress=seen.append)
    assert runtime.batches == seen == groups
    assert result == evaluate(runtime, items())


def test_types_and_pairs_are_counted_apart(runtime: Any) -> None:
    result = evaluate(runtime, items())
    assert result["by_type"] == {
        "attribute": {"n": 2, "accuracy": 0.5},
        "count": {"n": 1, "accuracy": 1.0},
        "position": {"n": 1, "accuracy": 1.0},
    }
    assert result["pair_accuracy"] == 0.5  # p is half right, q whole, the last is no pair


def test_the_result_has_the_fields_that_the_design_promises(runtime: Any) -> None:
    result = json.loads(json.dumps(evaluate(runtime, items())))
    assert (result["schema"], result["version"], result["model"], result["n"]) == ("lvr-lite/eval", 1, "table", 5)
    assert result["interval"] == pytest.approx([0.2307, 0.8824], abs=1e-3)
    assert set(result["answers"][0]) == {"id", "answer", "expected", "correct", "tokens"}
    assert runtime.tokenizer.decode(result["answers"][3]["tokens"]).strip() == "Top left."


def test_options_reach_the_decoding(runtime: Any) -> None:
    result = evaluate(runtime, items(), Options(max_tokens=1))
    assert all(len(a["tokens"]) == 1 for a in result["answers"])


def test_no_items_give_no_accuracy_and_no_pairs(runtime: Any) -> None:
    result = evaluate(runtime, iter(()))
    assert (result["n"], result["accuracy"], result["interval"], result["pair_accuracy"]) == (0, 0.0, [0.0, 1.0], None)


def test_accuracy_during_training_is_that_of_the_evaluation(runtime: Any) -> None:
    assert accuracy_on(runtime, items()) == 0.6


def test_the_table_tells_types_interval_and_pairs(runtime: Any) -> None:
    out = io.StringIO()
    show(evaluate(runtime, items()) | {"suite": "mine"}, Console(file=out, width=120))
    text = out.getvalue()
    for part in ("table on mine", "attribute", "50.0%", "60.0%", "23.1% – 88.2%", "pairs, both right"):
        assert part in text


# ----------------------------------------------------------------------------------------------------------- suites


def test_scenes_are_300_unless_limited_and_a_limit_only_cuts() -> None:
    few = [s.id for s, _ in load_suite("scenes", 7)]
    all_of_them = [s.id for s, _ in load_suite("scenes", None)]
    assert len(all_of_them) == 300
    assert all_of_them[:7] == few


def test_another_seed_gives_other_scenes() -> None:
    assert [s.question for s, _ in load_suite("scenes", 9, 0)] != [s.question for s, _ in load_suite("scenes", 9, 1)]


def test_a_file_of_samples_is_a_suite(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "made", 5, 3, "test")
    found = list(load_suite(str(path), 3))
    drawn = list(load_suite("scenes", 3, 3))
    assert [(s.question, s.answer, s.boxes) for s, _ in found] == [(s.question, s.answer, s.boxes) for s, _ in drawn]
    assert [p.tobytes() for _, (p,) in found] == [p.tobytes() for _, (p,) in drawn]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(UsageError, match=f"--limit must be 1 or more, not {limit}"):
        load_suite("scenes", limit)


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(UsageError, match=r"--suite mmmu: neither a suite \(scenes\) nor a file of samples"):
        load_suite("mmmu", None)


def test_a_broken_line_is_named_before_anything_is_answered(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"id": \n')
    with pytest.raises(DataError, match=r"s\.jsonl:1: not valid JSON"):
        load_suite(str(tmp_path / "s.jsonl"), None)
