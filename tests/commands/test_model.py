"""A model that answers questions, as Python programs use it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lvr_lite import AskOptions, EvalOptions, Model, evaluate, open_model
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.processor import Processor

RED = Image.new("RGB", (64, 64), (200, 30, 30))
QUESTION = "what colour is the star"


@pytest.fixture(scope="module")
def model(small_int8: Path) -> Model:
    return open_model(small_int8)


def test_an_answer_says_what_it_took(model: Model) -> None:
    answer = model.ask([RED], QUESTION, AskOptions(max_tokens=3, min_tokens=3, steps=0))
    assert (len(answer.tokens), answer.latent_steps, answer.reason) == (3, 0, "length")
    assert answer.ttft_ms is not None
    assert answer.ttft_ms > 0
    assert answer.text == model.runtime.processor.text(answer.tokens)
    assert answer.to_json()["answer"] == answer.text


def test_a_picture_may_be_an_image_or_a_path(model: Model, tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    options = AskOptions(max_tokens=4)
    pictures = (RED, tmp_path / "red.png", str(tmp_path / "red.png"))
    answers = [model.ask([picture], QUESTION, options).tokens for picture in pictures]
    assert answers[0] == answers[1] == answers[2]


def test_another_question_does_not_read_the_pictures_again(
    small_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(small_int8)
    model.ask([RED], QUESTION)
    monkeypatch.delattr(type(model.runtime), "encode")
    assert model.ask([RED], "where heart").tokens
    with pytest.raises(AttributeError, match="encode"):
        model.ask([RED.rotate(90).resize((64, 48))], "where heart")


@pytest.mark.parametrize(("written", "cut"), [("né ✓ 🟥!", False), ("ab✓", True)])
def test_text_is_sent_in_whole_characters(
    model: Model, monkeypatch: pytest.MonkeyPatch, written: str, cut: bool
) -> None:
    raw = written.encode()
    count = len(raw) - cut
    # As if every token were one byte of the answer.
    monkeypatch.setattr(Processor, "text", lambda _, ids: raw[: len(ids)].decode(errors="replace"))
    options = AskOptions(max_tokens=count, min_tokens=count, steps=0)
    *events, last = model.stream([RED], QUESTION, options)
    assert last.answer is not None
    pieces = [event.text for event in events]
    assert "".join(pieces) == written[: len(written) - cut]
    # What is cut within a character comes last, as in the answer.
    assert "".join([*pieces, last.text]) == last.answer.text
    assert (last.text == "\ufffd") == cut


def test_a_checkpoint_may_stay_in_the_bits_that_it_was_trained_in(small_tuned: Path) -> None:
    four_bit = []
    for trained in (True, False):
        runtime = open_model(small_tuned, trained=trained).runtime
        assert isinstance(runtime, TorchRuntime)
        kinds = {type(module).__name__ for module in runtime.model.modules()}
        four_bit.append("Linear4bit" in kinds)
    assert four_bit == [True, False]


def test_a_model_is_scored(small_int8: Path) -> None:
    result = evaluate(small_int8, EvalOptions(limit=2, skills=0, max_tokens=2))
    low, high = result.interval
    assert result.n == 2
    assert low <= result.accuracy <= high
    assert len(result.to_json()["answers"]) == 2
