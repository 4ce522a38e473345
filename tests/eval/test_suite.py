"""Evaluation of a fake that reads the question off the prompt and says what a table has for it."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from lvr_lite.data.samples import Sample, sample_json
from lvr_lite.data.sources import Item
from lvr_lite.errors import BundleError, DataError, UsageError
from lvr_lite.eval import comparing
from lvr_lite.eval.comparing import compare, reference_hint
from lvr_lite.eval.plan import SKILLS_TOKENS, Plan, expected_answers, load_suite
from lvr_lite.eval.probe import load_items
from lvr_lite.eval.report import show
from lvr_lite.eval.suite import accuracy_on, evaluate, skill
from lvr_lite.generate.decode import Options
from lvr_lite.model.checkpoint import read_checkpoint, resolve
from lvr_lite.model.spec import LatentSpec
from lvr_lite.toy import questions, scenes
from lvr_lite.toy.make import skill_samples, write_scenes
from tests.fakes import NeverLooks, OneWord, Table, never

TINY_PROCESSOR = read_checkpoint("tiny").processor
QUESTIONS = [
    "what colour is the star",
    "what colour is the heart",
    "how many red shapes are there",
    "where is the cross",
    "which letter",
]
EXPECTED = ["red", "blue", "two", "top left", "K"]
SAID = ["red", "green", "two", "Top left.", "X"]
TYPES = ["attribute", "attribute", "count", "position", None]
PAIRS = ["p", "p", "q", "q", "half"]


def items() -> Iterator[Item]:
    rows = zip(QUESTIONS, EXPECTED, TYPES, PAIRS, strict=True)
    for i, (question, answer, kind, pair) in enumerate(rows):
        picture = Image.new(
            "RGB", (56 + 28 * i, 56), (40 * i, 0, 0)
        )  # prompts of different lengths
        yield Sample(f"s{i}", (), question, answer, None, (), kind, pair), (picture,)


@pytest.fixture
def runtime() -> Table:
    return Table(dict(zip(QUESTIONS, SAID, strict=True)))


def test_answers_are_scored_each_against_its_own_sample(runtime: Table) -> None:
    result = evaluate(runtime, items())
    assert [a["correct"] for a in result["answers"]] == [True, False, True, True, False]
    assert [a["answer"] for a in result["answers"]] == SAID
    assert [a["id"] for a in result["answers"]] == [f"s{i}" for i in range(5)]
    assert result["accuracy"] == 0.6


@pytest.mark.parametrize(("batch", "groups"), [(1, [1] * 5), (2, [2, 2, 1]), (16, [5])])
def test_the_size_of_batches_changes_no_answer(
    runtime: Table, batch: int, groups: list[int]
) -> None:
    seen: list[int] = []
    result = evaluate(runtime, items(), batch=batch, progress=seen.append)
    assert runtime.batches == seen == groups
    assert result == evaluate(runtime, items())


def test_types_and_pairs_are_counted_apart(runtime: Table) -> None:
    result = evaluate(runtime, items())
    assert result["by_type"] == {
        "attribute": {"n": 2, "accuracy": 0.5},
        "count": {"n": 1, "accuracy": 1.0},
        "position": {"n": 1, "accuracy": 1.0},
    }
    assert result["pair_accuracy"] == 0.5  # p is half right, q whole, the last is no pair


def test_the_result_has_the_fields_that_the_design_promises(runtime: Table) -> None:
    result = json.loads(json.dumps(evaluate(runtime, items())))
    assert result["schema"] == "lvr-lite/eval"
    assert result["version"] == 1
    assert result["model"] == "table"
    assert result["n"] == 5
    assert result["interval"] == pytest.approx([0.2307, 0.8824], abs=1e-3)
    assert set(result["answers"][0]) == {
        "id",
        "type",
        "answer",
        "expected",
        "correct",
        "score",
        "tokens",
        "looks",
        "visual_tokens",
    }
    assert runtime.processor.tokenizer.decode(result["answers"][3]["tokens"]).strip() == "Top left."


def test_options_reach_the_decoding(runtime: Table) -> None:
    result = evaluate(runtime, items(), Options(max_tokens=1))
    assert all(len(a["tokens"]) == 1 for a in result["answers"])


def test_no_items_give_no_accuracy_and_no_pairs(runtime: Table) -> None:
    result = evaluate(runtime, iter(()))
    assert result["n"] == 0
    assert result["accuracy"] == 0.0
    assert result["interval"] == [0.0, 1.0]
    assert result["pair_accuracy"] is None


def test_accuracy_during_training_is_that_of_the_evaluation(runtime: Table) -> None:
    assert accuracy_on(runtime, items(), EXPECTED) == (0.6, 0.0)


def test_the_table_tells_types_interval_and_pairs(runtime: Table) -> None:
    out = io.StringIO()
    show(evaluate(runtime, items()) | {"suite": "mine"}, Console(file=out, width=120))
    text = out.getvalue()
    for part in (
        "table on mine",
        "attribute",
        "50.0%",
        "60.0%",
        "23.1% – 88.2%",
        "pairs, both right",
    ):
        assert part in text


# --------------------------------------------------------------------------------------------------
# suites


def test_scenes_are_300_unless_limited_and_a_limit_only_cuts() -> None:
    few = [s.id for s, _ in load_suite("scenes", 7)]
    all_of_them = [s.id for s, _ in load_suite("scenes", None)]
    assert len(all_of_them) == 300
    assert all_of_them[:7] == few


def test_another_seed_gives_other_scenes() -> None:
    assert [s.question for s, _ in load_suite("scenes", 9, 0)] != [
        s.question for s, _ in load_suite("scenes", 9, 1)
    ]


def test_a_file_of_samples_is_a_suite(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "made", 5, 3, "test")
    found = list(load_suite(str(path), 3))
    drawn = list(load_suite("scenes", 3, 3))
    assert [(s.question, s.answer, s.boxes) for s, _ in found] == [
        (s.question, s.answer, s.boxes) for s, _ in drawn
    ]
    assert [p.tobytes() for _, (p,) in found] == [p.tobytes() for _, (p,) in drawn]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(UsageError, match=f"--limit must be 1 or more, not {limit}"):
        load_suite("scenes", limit)


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(
        UsageError,
        match=r"--suite mmmu: neither a suite \(scenes, skills, mmvp, .*\) nor a file of samples",
    ):
        load_suite("mmmu", None)


def test_a_broken_line_is_named_before_anything_is_answered(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"id": \n')
    with pytest.raises(DataError, match=r"s\.jsonl:1: not valid JSON"):
        load_suite(str(tmp_path / "s.jsonl"), None)


def test_a_control_token_of_the_model_is_named_with_file_line_and_field(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    path = tmp_path / "s.jsonl"
    questions = ("what is red", "what is <row_1_col_1>")
    lines = [
        {"id": question, "image": "a.png", "question": question, "answer": "a"}
        for question in questions
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert load_suite(str(path), None)
    with pytest.raises(DataError, match=rf"{path}:2: question: contains <row_1_col_1>"):
        load_suite(str(path), None, special_tokens=["<row_1_col_1>"])
    with pytest.raises(DataError, match=rf"{path}:2: question: contains <row_1_col_1>"):
        load_items(str(path), 5, 0, ["<row_1_col_1>"])


@pytest.mark.parametrize("suite", ["scenes", "skills", "FILE"])
@pytest.mark.parametrize("limit", [1, 14])
def test_the_right_answers_are_known_without_a_picture(
    suite: str, limit: int, tmp_path: Path
) -> None:
    suite = str(write_scenes(tmp_path / "made", 20, 3, "test")) if suite == "FILE" else suite
    assert expected_answers(suite, limit, 5) == {
        s.id: s.answer for s, _ in load_suite(suite, limit, 5)
    }


# --------------------------------------------------------------------------------------------------
# skills


def answer_from_the_scene(scene: scenes.Scene, asked: str) -> str:
    """The answer to a short question, worked out again from its words, apart from the code that
    asks.
    """
    by_shape = {t.shape: t for t in scene.figures}
    what, *names = asked.split()
    if what == "where":
        x, y = by_shape[names[0]].centre()
        row = ("top", "middle", "bottom")[int(y / (scene.height / 3))]
        column = ("left", "centre", "right")[int(x / (scene.width / 3))]
        return f"{row} {column}"
    if what in ("colour", "pattern", "letter"):
        return str(getattr(by_shape[names[0]], "glyph" if what == "letter" else what))
    if what == "shape":
        (thing,) = (t for t in scene.figures if t.colour == names[0])
        return thing.shape
    if what in ("across", "down"):
        axis = ("across", "down").index(what)
        after, before = (by_shape[n].centre()[axis] for n in names)
        return (("left", "right"), ("above", "below"))[axis][before > after]
    if what == "count":
        return scenes.NUMBERS[sum(names[0] in (t.colour, t.pattern) for t in scene.figures)]
    assert asked == "odd"
    colours = Counter(t.colour for t in scene.figures)
    (thing,) = (t for t in scene.figures if colours[t.colour] == 1)
    return thing.shape


def test_every_answer_to_a_skill_follows_from_the_scene() -> None:
    for name, scene, question in questions.skills(4, 300):
        if question.type == "caption":
            told = {tuple(phrase.split()) for phrase in question.answer.split(" ; ")}
            where = {
                t.shape: tuple(answer_from_the_scene(scene, f"where {t.shape}").split())
                for t in scene.figures
            }
            assert told == {
                (t.shape, t.colour, t.pattern, t.glyph, *where[t.shape]) for t in scene.figures
            }, name
        else:
            assert answer_from_the_scene(scene, question.text) == question.answer, name


def test_skills_take_turns_and_among_them_all_types_that_the_base_knows() -> None:
    asked = [question for _, _, question in questions.skills(0, 90)]
    assert [q.type for q in asked[:4]] == ["caption", "place", "short", "caption"]
    short = Counter(q.text.split()[0] for q in asked if q.type == "short")
    assert short["odd"] == short["count"] == short["across"] + short["down"] == 5
    assert short["letter"] >= 5
    assert short.total() == 30


def test_tuning_on_scenes_never_asks_what_the_skills_ask() -> None:
    tuned = {q.text for _, _, q, _ in questions.items(0, "train", 2000)}
    assert not tuned & {s.question for s, _ in skill_samples(120, 0)}


def test_skills_come_without_boxes_on_pictures_of_their_own() -> None:
    skills = list(load_suite("skills", 12))
    assert all(s.boxes == () and s.pair is None for s, _ in skills)
    main = {p.tobytes() for _, (p,) in load_suite("scenes", 60)}
    assert not main & {p.tobytes() for _, (p,) in skills}


def test_skills_are_300_unless_limited_and_follow_from_the_seed_alone() -> None:
    few = [(s, p.tobytes()) for s, (p,) in load_suite("skills", 9, 1)]
    assert few == [(s, p.tobytes()) for s, (p,) in load_suite("skills", 12, 1)][:9]
    assert [s.answer for s, _ in few] != [s.answer for s, _ in load_suite("skills", 9, 2)]
    assert len({s.id for s, _ in few} | {s.id for s, _ in load_suite("skills", 9, 2)}) == 18
    assert len(expected_answers("skills", None)) == 300


def test_skills_show_combinations_that_training_never_does() -> None:
    shown = {(t.shape, t.colour) for _, scene, _ in questions.skills(0, 300) for t in scene.figures}
    assert shown >= scenes.HELD_OUT


def test_the_longest_caption_fits_into_the_tokens_of_an_answer() -> None:
    tokenizer = read_checkpoint("tiny").processor.tokenizer
    found = [
        (len(s.figures), q.answer) for _, s, q in questions.skills(0, 300) if q.type == "caption"
    ]
    assert max(things for things, _ in found) == 8
    assert (
        max(len(tokenizer.encode(text, add_special_tokens=False).ids) for _, text in found)
        < SKILLS_TOKENS
    )


def test_a_caption_that_is_half_right_counts_half_and_is_not_correct() -> None:
    caption = Sample("c", (), "describe", "star red ; heart blue", type="caption")
    place = Sample("p", (), "where star", "top left", type="place")
    asked = [(sample, (Image.new("RGB", (56, 56)),)) for sample in (caption, place)]
    table = Table({"describe": "star red ; cross white", "where star": "top left"})
    result = evaluate(table, asked, grade=skill)
    assert [(a["score"], a["correct"]) for a in result["answers"]] == [(0.5, False), (1.0, True)]
    assert (result["accuracy"], result["by_type"]["caption"]) == (0.75, {"n": 1, "accuracy": 0.5})
    assert [a["score"] for a in evaluate(table, asked)["answers"]] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("plan", "count"),
    [
        (Plan(), 150),
        (Plan(limit=20), 20),
        (Plan(limit=2000), 150),
        (Plan(limit=20, skills=90), 90),
        (Plan(skills=0), 0),
        (Plan(suite="mine.jsonl"), 0),
        (Plan(suite="mine.jsonl", skills=5), 5),
        (Plan(suite="skills", limit=9), 0),
    ],
)
def test_skills_are_asked_beside_the_scenes_in_numbers_that_follow_the_limit(
    plan: Plan, count: int
) -> None:
    assert plan.beside == count


# --------------------------------------------------------------------------------------------------
# several models, same items

TINY, OTHER = (
    "tiny",
    str(resolve("tiny")),
)  # names of models that are there; what opens them is a table
WORSE = ["red", "green", "three", "Top left.", "X"]  # 2 of 5, where SAID has 3
WRONG = "a wrong answer"


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """The five items as a file."""
    lines = []
    for sample, (picture,) in items():
        picture.save(tmp_path / f"{sample.id}.png")
        lines.append(
            json.dumps(
                sample_json(replace(sample, images=(tmp_path / f"{sample.id}.png",)), tmp_path)
            )
        )
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "mine.jsonl")


def opener(**said: list[str]) -> Callable[[str], Table]:
    """Opens tables: TINY says `tiny`, OTHER says `other`."""
    return lambda name: Table(
        dict(zip(QUESTIONS, said["tiny" if name == TINY else "other"], strict=True))
    )


def test_a_difference_is_over_the_same_items_and_by_type(mine: str) -> None:
    result = compare(TINY, [OTHER], Plan(mine), opener(tiny=SAID, other=WORSE))
    (other,) = result["against"]
    assert other["source"] == OTHER
    assert other["model"] == "table"
    assert other["n"] == 5
    assert other["accuracy"] == 0.4
    assert other["difference"] == 0.2
    assert other["p"] == 1.0  # one discordant pair
    assert other["interval"] == [0.0, 0.6]
    assert {
        kind: (t["n"], t["accuracy"], t["difference"]) for kind, t in other["by_type"].items()
    } == {"attribute": (2, 0.5, 0.0), "count": (1, 0.0, 1.0), "position": (1, 1.0, 0.0)}


def test_a_difference_turns_its_sign_with_the_models(mine: str) -> None:
    (other,) = compare(TINY, [OTHER], Plan(mine), opener(tiny=WORSE, other=SAID))["against"]
    assert other["difference"] == -0.2
    assert other["interval"] == [-0.6, 0.0]
    assert other["by_type"]["count"]["difference"] == -1.0


def test_p_is_mcnemars_over_the_items_that_one_model_alone_has_right(mine: str) -> None:
    (other,) = compare(TINY, [OTHER], Plan(mine), opener(tiny=EXPECTED, other=[WRONG] * 5))[
        "against"
    ]
    assert (other["difference"], other["p"]) == (1.0, 2 / 2**5)


def test_a_model_does_not_differ_from_itself(mine: str) -> None:
    (other,) = compare(TINY, [TINY], Plan(mine), opener(tiny=SAID))["against"]
    assert (other["difference"], other["interval"], other["p"]) == (0.0, [0.0, 0.0], 1.0)


def test_an_earlier_file_stands_for_its_model_whatever_the_order_of_its_answers(
    mine: str, tmp_path: Path
) -> None:
    open_model = opener(tiny=SAID, other=WORSE)
    earlier = compare(OTHER, [], Plan(mine), open_model)
    earlier["answers"].reverse()
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    both = compare(TINY, [str(tmp_path / "earlier.json"), OTHER], Plan(mine), open_model)["against"]
    assert both[0]["source"] == str(tmp_path / "earlier.json")
    assert both[0] == both[1] | {"source": both[0]["source"]}


def test_a_file_of_before_scores_compares_by_what_is_correct(mine: str, tmp_path: Path) -> None:
    earlier = compare(OTHER, [], Plan(mine), opener(other=WORSE))
    for field in ("score", "type"):
        for answer in earlier["answers"]:
            del answer[field]
    del earlier["seed"]
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    (other,) = compare(TINY, [str(tmp_path / "earlier.json")], Plan(mine), opener(tiny=SAID))[
        "against"
    ]
    assert other["difference"] == 0.2


def test_the_result_is_the_models_own_whatever_it_is_compared_with(mine: str) -> None:
    open_model = opener(tiny=SAID, other=WORSE)
    alone, beside = (
        compare(TINY, [], Plan(mine), open_model),
        compare(TINY, [OTHER], Plan(mine), open_model),
    )
    beside.pop("against")
    assert alone == beside
    assert (alone["accuracy"], alone["suite"], alone["seed"]) == (0.6, mine, None)


def test_latent_steps_are_for_the_model_alone(mine: str) -> None:
    def open_model(name: str) -> Table:
        return Table(dict(zip(QUESTIONS, SAID, strict=True)), latent_steps=2 if name == TINY else 0)

    compare(
        TINY, [OTHER], Plan(mine, steps=(3,)), open_model
    )  # OTHER, which has none, would refuse 3
    with pytest.raises(UsageError, match="not tuned for latent steps"):
        compare(OTHER, [TINY], Plan(mine, steps=(3,)), open_model)


def damaged(result: dict[str, Any], how: str) -> Any:
    """An earlier result with something wrong."""
    first = result["answers"][0]
    changes: dict[str, Callable[[], Any]] = {
        "list": lambda: [result],
        "bench": lambda: result | {"schema": "lvr-lite/bench"},
        "version": lambda: result | {"version": 2},
        "no answers": lambda: {k: v for k, v in result.items() if k != "answers"},
        "no score": lambda: result | {"answers": [{"id": "s0", "expected": "red"}]},
        "score": lambda: result | {"answers": [first | {"score": 7}]},
        "nan": lambda: result | {"answers": [first | {"score": float("nan")}]},
        "word": lambda: result | {"answers": [first | {"score": "high"}]},
        "fewer": lambda: result | {"answers": result["answers"][1:]},
        "others": lambda: result | {"answers": [first | {"id": "new"}, *result["answers"][1:]]},
        "changed": lambda: (
            result | {"answers": [first | {"expected": "white"}, *result["answers"][1:]]}
        ),
        "suite": lambda: result | {"suite": "scenes"},
    }
    return changes[how]()


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        *(
            (how, DataError, "not what `lvr-lite eval --json` writes")
            for how in [
                "list",
                "bench",
                "version",
                "no answers",
                "no score",
                "score",
                "nan",
                "word",
            ]
        ),
        (
            "fewer",
            UsageError,
            r"not about the same items \(4 there, 5 here; s0 is in one of them alone\): "
            "use the same --limit",
        ),
        (
            "others",
            UsageError,
            r"not about the same items \(5 there, 5 here; new is in one of them alone\)",
        ),
        ("changed", UsageError, "the right answer to s0 is 'white' there and 'red' here"),
        ("suite", UsageError, "is about the suite scenes, not "),
    ],
)
def test_a_file_that_cannot_be_compared_is_refused_before_a_model_is_opened(
    mine: str, tmp_path: Path, how: str, error: type[Exception], said: str
) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(damaged(compare(OTHER, [], Plan(mine), opener(other=WORSE)), how)))
    with pytest.raises(error, match=said) as raised:
        compare(TINY, [str(path)], Plan(mine), never)
    assert str(raised.value).startswith(f"--against {path}: ")
    assert "\n" not in str(raised.value)


def test_scenes_of_another_seed_or_number_are_refused_by_name(tmp_path: Path) -> None:
    asked = {s.question: WRONG for s, _ in load_suite("scenes", 6, 1)}
    path = tmp_path / "earlier.json"
    path.write_text(
        json.dumps(compare(TINY, [], Plan(limit=6, seed=1, skills=0), lambda _: Table(asked)))
    )
    compare(TINY, [str(path)], Plan(limit=6, seed=1, skills=0), lambda _: Table(asked))
    with pytest.raises(UsageError, match="is about seed 1, not 2: use --seed 1"):
        compare(TINY, [str(path)], Plan(limit=6, seed=2, skills=0), never)
    with pytest.raises(UsageError, match="6 there, 5 here"):
        compare(TINY, [str(path)], Plan(limit=5, seed=1, skills=0), never)
    with pytest.raises(UsageError, match="is about the suite scenes, not skills"):
        compare(TINY, [str(path)], Plan("skills", limit=6, seed=1), never)


def test_a_model_that_is_not_there_is_named_before_another_is_opened(
    mine: str, tmp_path: Path
) -> None:
    for model, against in ((TINY, str(tmp_path / "none")), (str(tmp_path / "none"), TINY)):
        with pytest.raises(BundleError, match="none: no such folder"):
            compare(model, [against], Plan(mine), never)
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        compare(TINY, [str(tmp_path / "none.json")], Plan(mine), never)


def skill_table(answer: Callable[[str], str], seed: int, count: int, questions: list[str]) -> Table:
    asked = [*questions, *(s.question for s, _ in skill_samples(count, seed))]
    return Table({q: answer(q) for q in asked})


def test_skills_are_scored_and_compared_beside_the_scenes(tmp_path: Path) -> None:
    questions = [s.question for s, _ in load_suite("scenes", 4, 3)]

    def open_model(name: str) -> Table:
        return skill_table(
            lambda q: "top left" if name == TINY and q.startswith("where") else WRONG,
            3,
            30,
            questions,
        )

    plan = Plan(limit=4, seed=3, skills=30)
    result = compare(TINY, [OTHER], plan, open_model)
    right = sum(s.answer == "top left" for s, _ in skill_samples(30, 3))
    assert right > 0
    skills = result["skills"]
    assert skills["n"] == 30
    assert skills["by_type"]["place"] == {"n": 10, "accuracy": right / 10}
    assert skills["by_type"]["short"]["accuracy"] == 0
    assert skills["accuracy"] == pytest.approx(right / 30, abs=1e-4)
    assert [a["id"] for a in skills["answers"]] == [s.id for s, _ in skill_samples(30, 3)]
    against = result["against"][0]["skills"]
    assert against["difference"] == round(right / 30, 4)
    assert against["by_type"]["place"]["difference"] == right / 10
    assert (result["n"], len(result["answers"]), result["against"][0]["n"]) == (4, 4, 4)
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(result))
    assert (
        compare(OTHER, [str(path)], plan, open_model)["against"][0]["skills"]["difference"]
        == -against["difference"]
    )
    with pytest.raises(UsageError, match=r"30 there, 29 here; .*use the same --skills"):
        compare(OTHER, [str(path)], replace(plan, skills=29), never)
    del result["skills"]
    path.write_text(json.dumps(result))
    assert "skills" not in compare(OTHER, [str(path)], plan, open_model)["against"][0]


def test_captions_are_not_cut_where_answers_to_the_scenes_are(mine: str) -> None:
    (caption,) = expected_answers("skills", 1).values()
    long = " ; ".join([caption.split(" ; ")[0]] * 7)
    table = skill_table(lambda _: long, 0, 1, QUESTIONS)
    result = compare(TINY, [], Plan(mine, skills=1), lambda _: table)
    assert {len(a["tokens"]) for a in result["answers"]} == {16}
    for scored in (result["skills"], compare(TINY, [], Plan("skills", limit=1), lambda _: table)):
        assert len(scored["answers"][0]["tokens"]) == 48
        assert 0 < scored["accuracy"] < 1  # one thing of several is told
    assert (
        len(
            compare(TINY, [], Plan("skills", limit=1, max_tokens=5), lambda _: table)["answers"][0][
                "tokens"
            ]
        )
        == 5
    )


def test_skills_are_not_asked_twice() -> None:
    with pytest.raises(UsageError, match="--suite skills asks them already"):
        compare(TINY, [], Plan("skills", skills=4), never)


def test_a_tuned_checkpoint_names_its_base_to_compare_with(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    tuned = Path(shutil.copytree(small_checkpoint, tmp_path / "tuned"))
    (tuned / "adapter_model.safetensors").write_bytes(b"weights")
    for base, name in ((OTHER, "tiny"), (str(small_checkpoint), str(small_checkpoint))):
        (tuned / "lvr_config.json").write_text(json.dumps({"base": base, "latent": {"steps": 2}}))
        assert reference_hint(str(tuned)) == f"what tuning cost: --against {name}"
    assert reference_hint(TINY) == reference_hint(str(small_checkpoint)) == ""


def test_a_bundle_of_a_tuned_model_says_that_its_base_is_needed(
    small_fp32: Path, tmp_path: Path
) -> None:
    assert reference_hint(str(small_fp32)) == ""
    manifest = json.loads((small_fp32 / "lvr.json").read_text())
    manifest["source"]["adapter"] = True
    (tmp_path / "lvr.json").write_text(json.dumps(manifest))
    assert "--against BASE" in reference_hint(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# what people see


def shown(result: dict[str, Any]) -> str:
    out = io.StringIO()
    show(result, Console(file=out, width=160))
    return out.getvalue()


def difference(value: float) -> dict[str, Any]:
    return {
        "n": 50,
        "accuracy": 0.5,
        "difference": value,
        "interval": [value - 0.04, value + 0.04],
        "p": 0.0004,
    }


def with_skills(result: dict[str, Any], **changes: float) -> dict[str, Any]:
    """A result with three skills and one model beside it, whose skills differ by `changes`."""
    by_type = {kind: {"n": 50, "accuracy": 0.9} for kind in changes}
    skills = difference(0.0) | {
        "by_type": {kind: difference(value) for kind, value in changes.items()}
    }
    against = difference(0.031) | {
        "source": "base[x]",
        "model": "base",
        "by_type": {"odd": difference(-0.125)},
        "skills": skills,
    }
    return result | {
        "suite": "mine",
        "skills": {"n": 150, "accuracy": 0.88, "by_type": by_type},
        "against": [against],
    }


def test_a_skill_that_falls_by_more_than_two_points_is_told_in_words(runtime: Table) -> None:
    text = shown(with_skills(evaluate(runtime, items()), caption=-0.031, place=-0.02, short=0.05))
    lines = {
        kind: next(line for line in text.splitlines() if kind in line)
        for kind in ("caption", "place", "short")
    }
    assert "falls by 3.1 points: -3.1 [-7.1, 0.9]" in lines["caption"]
    assert "-2.0 [-6.0, 2.0]" in lines["place"]
    assert "5.0 [1.0, 9.0]" in lines["short"]
    assert text.count("falls by") == 1


def test_a_comparison_has_one_row_with_difference_interval_p_n_and_types(runtime: Table) -> None:
    text = shown(with_skills(evaluate(runtime, items()), caption=0.0))
    (row,) = (line for line in text.splitlines() if "odd" in line)
    for part in ("base[x]", "50", "3.1 [-0.9, 7.1]", "< 0.001", "odd -12.5"):
        assert part in row


def test_a_file_without_skills_is_said_to_have_none(runtime: Table) -> None:
    result = with_skills(evaluate(runtime, items()), caption=-0.5)
    del result["against"][0]["skills"]
    assert "not in that file" in shown(result)
    assert "falls" not in shown(result)


def test_without_skills_or_models_beside_there_is_one_table(runtime: Table) -> None:
    text = shown(evaluate(runtime, items()) | {"suite": "mine"})
    assert "outside the suite" not in text
    assert "difference" not in text


# --------------------------------------------------------------------------------------------------
# looks, sizes of pictures, room for answers


@pytest.mark.parametrize(("look", "looked"), [("auto", 0.0), ("always", 1.0), ("never", 0.0)])
def test_the_share_of_answers_that_looked_is_told(look: Any, looked: float) -> None:
    result = evaluate(NeverLooks("n"), items(), Options(look=look))
    assert result["looked"] == looked
    assert [answer["looks"] for answer in result["answers"]] == [int(looked)] * 5
    free = evaluate(OneWord("w"), items(), Options(look=look))
    assert free["looked"] == (look != "never")


def test_visual_tokens_are_told_by_picture() -> None:
    """Pictures of 56 pixels by 56, 84 … 168: two rows of 2 to 6 tokens."""
    two = ((sample, pictures * (1 + (sample.id == "s4"))) for sample, pictures in items())
    result = evaluate(OneWord("w"), two)
    tokens = [answer["visual_tokens"] for answer in result["answers"]]
    assert tokens == [[4], [6], [8], [10], [12, 12]]
    assert result["visual_tokens"] == {"p50": 9.0, "max": 12}


def test_a_plan_forces_the_look_of_suite_and_skills(mine: str) -> None:
    plan = Plan(mine, skills=3, look="always")
    result = compare(TINY, [], plan, lambda name: NeverLooks(name))
    assert (result["look"], result["looked"], result["skills"]["looked"]) == ("always", 1.0, 1.0)
    shown = Console(file=io.StringIO(), width=200)
    show(result, shown)
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "100% of the answers looked; --look always; visual tokens a picture: 8, at most" in text


def test_a_look_is_refused_of_a_model_that_cannot(mine: str) -> None:
    with pytest.raises(UsageError, match="look always: table was not tuned for latent steps"):
        compare(TINY, [], Plan(mine, look="always"), opener(tiny=SAID))
    # Beside one that can, it is compared as it is.
    models = {TINY: NeverLooks("n"), OTHER: OneWord("w", LatentSpec())}
    result = compare(TINY, [OTHER], Plan(mine, look="always"), models.__getitem__)
    assert (result["looked"], result["against"][0]["looked"]) == (1.0, 0.0)


def test_models_are_compared_on_pictures_of_the_smallest_size(
    mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {TINY: 28 * 28 * 4, OTHER: 28 * 28 * 256}
    monkeypatch.setattr(
        comparing, "processor_of", lambda m: TINY_PROCESSOR.with_max_pixels(sizes[m])
    )

    def most(**plan: Any) -> tuple[int, int]:
        """The largest picture in visual tokens that TINY and OTHER see."""

        def opened(name: str) -> OneWord:
            runtime = OneWord(name)
            runtime.processor = runtime.processor.with_max_pixels(sizes[name])
            return runtime

        result = compare(TINY, [OTHER], Plan(mine, **plan), opened)
        return result["visual_tokens"]["max"], result["against"][0]["visual_tokens"]["max"]

    assert most() == (4, 4)
    assert most(max_pixels=28 * 28 * 8) == (8, 8)
    assert most(max_pixels=28 * 28 * 8, against_max_pixels=28 * 28 * 6) == (8, 6)
    assert most(against_max_pixels=28 * 28 * 256) == (4, 12)
    sizes[TINY], sizes[OTHER] = sizes[OTHER], sizes[TINY]
    assert most() == (4, 4)


def test_an_answer_to_a_file_has_room_for_the_longest_right_one(tmp_path: Path) -> None:
    answer = "the red star is above the blue heart " * 6
    file = tmp_path / "long.jsonl"
    Image.new("RGB", (56, 56)).save(tmp_path / "p.png")
    rows = [
        {"id": str(i), "image": "p.png", "question": "q", "answer": a}
        for i, a in enumerate(["red", answer])
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    tokens = len(TINY_PROCESSOR.tokenizer.encode(answer).ids)
    assert tokens > 40
    assert Plan(str(file)).tokens(TINY_PROCESSOR) >= tokens + tokens // 2 - 1
    assert Plan(str(file), max_tokens=7).tokens(TINY_PROCESSOR) == 7
    assert Plan().tokens(TINY_PROCESSOR) == 16
    result = compare(TINY, [], Plan(str(file)), lambda _: Table({"q": answer}))
    assert [a["correct"] for a in result["answers"]] == [False, True]


def test_a_repetition_penalty_that_is_not_applied_is_told(
    small_checkpoint: Path, tmp_path: Path, mine: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_checkpoint, base)
    assert comparing.not_applied(str(base)) == {}
    path = base / "generation_config.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | {"repetition_penalty": 1.05}))
    result = compare(str(base), [], Plan(mine), opener(other=SAID))
    assert result["not_applied"] == {"repetition_penalty": 1.05}
    shown = Console(file=io.StringIO(), width=300)
    show(result, shown)
    assert "repetition penalty of 1.05" in shown.file.getvalue()  # type: ignore[attr-defined]
