"""`lvr-lite bench`: its sub-commands, and the one that is meant where none is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Call, Refused


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("bench nosuch", 1, "nosuch: no such folder"),
        ("bench --runs 3 nosuch", 1, "nosuch: no such folder"),
        ("bench run nosuch", 1, "nosuch: no such folder"),
        ("bench INT8 --image nosuch.png", 1, "nosuch.png: no such picture"),
        ("bench INT8 --vs nosuch", 1, "nosuch: no such folder"),
        ("bench INT8 --provider coreml --runs 1", 2, "provider coreml: the onnxruntime"),
        ("bench INT8 --steps four", 2, "--steps four: give whole numbers"),
        ("bench INT8 --batch 2,2", 2, "--batch 2,2: a number is there twice"),
        ("bench INT8 --batch 0", 2, "batch must be 1 or more, not 0"),
        ("bench INT8 --image-tokens 4000 --runs 1 --warmup 0", 2, "int8 gives such a picture"),
        ("bench compare nosuch.json nosuch.json", 1, "nosuch.json: No such file"),
        ("bench compare PICTURE PICTURE", 1, "picture.png: not JSON"),
        ("bench table PICTURE", 1, "picture.png: not JSON"),
    ],
)
def test_a_wrong_input_is_one_line(refused: Refused, arguments: str, code: int, words: str) -> None:
    refused(arguments, code, words)


@pytest.mark.parametrize(
    "arguments",
    [
        "bench",
        "bench int8 int4",
        "bench int8 --runs 0",
        "bench int8 --runs many",
        "bench int8 --tolerance 0.1",
        "bench compare a.json",
        "bench compare a.json b.json --vs int4",
        "bench table",
        "bench table a.json --json out.json",
    ],
)
def test_arguments_that_mean_nothing_here_are_refused_with_the_usage(
    call: Call, arguments: str
) -> None:
    done = call(*arguments.split())
    assert done.code == 2
    assert "Usage: lvr-lite bench" in done.err


def test_help_shows_the_sub_commands_and_the_options_of_the_default(call: Call) -> None:
    done = call("bench", "--help")
    assert all(f"\n  {command}" in done.out for command in ("run", "compare", "table"))
    assert "--vs" in done.out
    assert "--tolerance" not in done.out
    assert "--tolerance" in call("bench", "compare", "--help").out


def test_runs_are_written_in_every_form_compared_and_listed(
    call: Call, small_int8: Path, tmp_path: Path
) -> None:
    a, b, changes = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "changes.json"
    samples, page = tmp_path / "samples.csv", tmp_path / "page.html"
    options = ("--runs", 2, "--warmup", 0, "--tokens", 2, "--steps", "0,2", "--batch", "1,2")
    outputs = ("--json", a, "--csv", samples, "--html", page)
    done = call("bench", small_int8, *options, *outputs)
    assert done.code == 0, done.err
    run = json.loads(a.read_text())
    assert json.loads(done.out.splitlines()[-1]) == run
    settings = [system["name"].removeprefix("int8, ") for system in run["systems"]]
    assert settings == ["K 0", "K 2", "K 0, batch 2", "K 2, batch 2"]
    assert all(system["peak_rss_mb"] > 1 for system in run["systems"])
    assert samples.read_text().startswith("system,precision,")
    assert "How it grows" in page.read_text()
    for system in run["systems"]:
        system["end_to_end_ms"] |= {"samples_ms": [9e3, 9e3], "p50_ms": 9e3}
    b.write_text(json.dumps(run))
    assert call("bench", "compare", a, a).code == 0
    assert call("bench", "table", a, a).out.count("batch 2") == 4
    assert call("bench", "compare", a, b, "--json", changes).code == 1
    rows = json.loads(changes.read_text())["rows"]
    assert {row["measure"] for row in rows if row["verdict"] == "slower"} == {"end_to_end"}
