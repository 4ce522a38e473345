"""`lvr-lite eval`; `probe` is called in tests/eval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import Call, Refused


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("eval nosuch --limit 1", 1, "nosuch: no such folder"),
        ("eval INT8 --limit 0", 2, "--limit must be 1 or more"),
        ("eval INT8 --limit 2 --against nosuch", 1, "nosuch: no such folder"),
        ("eval INT8 --limit 2 --against none.json", 1, "--against none.json: cannot be read"),
        ("eval INT8 --limit 2 --against TEXT", 1, "not what `lvr-lite eval --json` writes"),
        ("eval INT8 --limit 2 --against EMPTY", 1, "config.json: missing"),
        ("eval INT8 --suite mmvp --path EMPTY", 1, "is not mmvp as it is published"),
        ("eval INT8 --suite vstar --path nosuch", 1, "--path nosuch: no such folder"),
        ("eval INT8 --steps four", 2, "--steps four: give whole numbers"),
        ("eval INT8 --look sometimes", 2, "--look sometimes: must be auto, always or never"),
        ("eval INT8 --limit 1 --max-pixels 99999999", 2, "was exported for pictures of at most"),
        ("eval INT8 --limit 1 --max-pixels 3", 2, "max_pixels must lie between 784 and"),
        ("eval tiny --limit 1 --look always", 2, "was not tuned for latent steps and cannot look"),
        ("probe INT8 --look never", 2, "look never leaves nothing to probe"),
        ("eval INT8 --limit 1 --answers TEXT", 1, "text.png: exists and holds something else"),
    ],
)
def test_a_wrong_input_is_one_line(refused: Refused, arguments: str, code: int, words: str) -> None:
    refused(arguments, code, words)


def test_a_file_of_samples_is_scored(
    call: Call, small_int8: Path, scenes: Path, tmp_path: Path
) -> None:
    options = ("--suite", scenes, "--limit", 3, "--max-tokens", 2)
    done = call("eval", small_int8, *options, "--json", tmp_path / "eval.json")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "eval.json").read_text())
    assert (result["schema"], result["version"]) == ("lvr-lite/eval", 1)
    assert (result["suite"], result["n"], result["model"]) == (str(scenes), 3, "int8")
    assert {"accuracy", "interval", "by_type", "pair_accuracy", "answers"} <= set(result)


def test_models_are_compared_on_the_same_questions(
    call: Call, small_int8: Path, small_fp32: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    options = ("--limit", 3, "--skills", 4, "--max-tokens", 2)
    done = call("eval", small_fp32, *options, "--json", one)
    assert done.code == 0, done.err
    result = json.loads(one.read_text())
    assert [result["skills"]["n"], len(result["skills"]["answers"])] == [4, 4]
    assert "outside the suite" in done.out
    # as if one answer had come out otherwise
    result["answers"][0]["score"] = 1 - result["answers"][0]["score"]
    one.write_text(json.dumps(result))
    against = ("--against", one, "--against", small_int8)
    done = call("eval", small_fp32, *options, *against, "--json", two)
    assert done.code == 0, done.err
    from_file, from_model = json.loads(two.read_text())["against"]
    assert (from_file["source"], from_model["source"]) == (str(one), str(small_int8))
    assert abs(from_file["difference"]) == 0.3333
    fields = {"model", "n", "accuracy", "difference", "interval", "p", "by_type", "skills"}
    assert fields <= set(from_file)
    assert {"difference", "interval", "by_type"} <= set(from_model["skills"])
    assert "difference on the same questions" in done.out


def test_skills_are_a_suite_too_and_can_be_left_out(
    call: Call, small_int8: Path, tmp_path: Path
) -> None:
    file = tmp_path / "eval.json"
    short = ("--max-tokens", 2, "--json", file)
    assert call("eval", small_int8, "--suite", "skills", "--limit", 3, *short).code == 0
    result = json.loads(file.read_text())
    assert (result["n"], sorted(result["by_type"])) == (3, ["caption", "place", "short"])
    assert "skills" not in result
    done = call("eval", small_int8, "--limit", 2, "--skills", 0, *short)
    assert done.code == 0
    assert "outside" not in done.out
    assert "skills" not in json.loads(file.read_text())
