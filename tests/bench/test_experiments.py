"""Experiments: what the runner does for all of them, what is collected from finished runs, and the
page that is made of it.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from lvr_lite.bench.experiments import latents, latents_page, runner
from lvr_lite.bench.experiments.rivals.builders import choose

FOLDER = Path(runner.__file__).parent
EXPERIMENTS = [
    "rivals",
    "rivals.agree",
    *(path.stem for path in FOLDER.glob("*.py") if "\n    launch(main" in path.read_text()),
]


def scores(right: str) -> dict[str, Any]:
    """What `eval --json` writes about four questions, of which "1" is answered rightly; two of the
    skills likewise.
    """
    answers: list[dict[str, Any]] = [
        {
            "id": str(i),
            "type": "count" if i < 2 else "odd",
            "expected": "red",
            "score": int(digit),
        }
        for i, digit in enumerate(right)
    ]
    by_type = {
        kind: {"accuracy": sum(a["score"] for a in answers if a["type"] == kind) / 2}
        for kind in ("count", "odd")
    }
    skills = {"accuracy": 0.5, "by_type": {"caption": {"accuracy": 0.5}}, "answers": answers}
    accuracy = right.count("1") / 4
    return {
        "model": "tiny",
        "accuracy": accuracy,
        "by_type": by_type,
        "answers": answers,
        "skills": skills,
    }


def probe() -> dict[str, Any]:
    interventions: dict[str, Any] = {
        name: {"accuracy": 0.2, "flips_to_donor": None} for name in ("noise", "self")
    }
    interventions["none"] = {"accuracy": 0.85, "flips_to_donor": None}
    interventions["donor_same_question"] = {"accuracy": 0.2, "flips_to_donor": 0.75}
    retrieval = {"r_at_1": 0.8, "chance": 0.1}
    parts = {"interventions": interventions, "retrieval": retrieval, "items": [1]}
    return {**parts, "verdict": "they carry it"}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Two methods, of which one has run with both seeds, and the base."""
    training = {"steps": 3, "minutes": 1.5, "peak_memory_gb": 0.25, "history": [1]}
    for seed in (0, 1):
        runner.write_json(tmp_path / "tiny" / f"eval-{seed}.json", scores("1000"))
    for name, right in (("sft-0", "1100"), ("sft-1", "1010"), ("lvr-bottleneck-0", "1111")):
        runner.write_json(tmp_path / name / "eval.json", scores(right))
        runner.write_json(tmp_path / name / "finetune.json", training)
    runner.write_json(tmp_path / "lvr-bottleneck-0" / "probe.json", probe())
    return tmp_path


def collected(folder: Path) -> Any:
    return latents.collect(folder, ["sft", "lvr-bottleneck", "dummy"], [0, 1])


def test_runs_are_compared_with_the_controls_of_their_seed_item_by_item(finished: Path) -> None:
    runs = collected(finished)["runs"]
    names = [(run["method"], run["seed"]) for run in runs]
    assert names == [("sft", 0), ("sft", 1), ("lvr-bottleneck", 0)]
    against = runs[2]["against"]
    assert set(against) == {"base", "sft"}
    assert against["sft"]["difference"] == 0.5
    assert against["base"]["by_type"]["odd"]["difference"] == 1.0
    assert not re.search('"(answers|items|history)"', json.dumps(runs))


def test_the_page_has_every_figure_and_keeps_the_words_around_it(
    finished: Path, tmp_path: Path
) -> None:
    runner.write_json(tmp_path / "latents.json", collected(finished))
    page = tmp_path / "latents.md"
    mark = latents_page.MARK
    page.write_text(f"before\n<!-- {mark} -->\nold\n<!-- end of {mark} -->\nafter\n")
    latents_page.write(tmp_path / "latents.json", tmp_path)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for line in (
        "| before tuning | 25.0 (25.0 – 25.0) | 50.0 (50.0 – 50.0) | 0.0 (0.0 – 0.0) |",
        "| `sft` | **50.0 (50.0 – 50.0)** | 75.0 (50.0 – 100.0) | 25.0 (0.0 – 50.0) |",
        "| `lvr-bottleneck` | **100.0** | 100.0 | 100.0 |",
        "| donor_same_question: flips to the donor's answer | 75.0 |",
        "| none | 85.0 |",
        "| `lvr-bottleneck` | 80.0 | 10.0 | 8.0 |",
        "| `sft` | 3 | 1.5 (1.5 – 1.5) | 0.25 (0.25 – 0.25) |",
        "| `lvr-bottleneck` | sft | 0 | 4 | +50.0 |",
        "- `lvr-bottleneck`, seed 0: they carry it",
    ):
        assert line in text, line
    for name in ("latents_accuracy.png", "latents_interventions.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_table_replaces_the_last_one_of_its_mark_and_keeps_the_words_around_it(
    tmp_path: Path,
) -> None:
    page = tmp_path / "rivals.md"
    page.write_text("before\n<!-- short -->\n<!-- end of short -->\n")
    runner.publish("| first |", page, "short")
    runner.publish("| long |", page, "long")
    page.write_text(page.read_text() + "after\n")
    runner.publish("| second |", page, "short")
    expected = "before\n<!-- short -->\n| second |\n<!-- end of short -->\n\n"
    expected += "<!-- long -->\n| long |\n<!-- end of long -->\nafter\n"
    assert page.read_text() == expected


def test_a_page_with_half_of_the_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "rivals.md"
    page.write_text("<!-- short -->\nwords that would be lost\n")
    with pytest.raises(SystemExit, match="has no <!-- end of short --> after it"):
        runner.publish("| first |", page, "short")


def test_a_command_that_was_finished_does_not_run_again(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    log = tmp_path / "log.txt"
    with pytest.raises(SystemExit, match="lvr-lite no-such-command ended with 2; see"):
        runner.once(result, "no-such-command", log=log)
    assert "No such command" in log.read_text()
    result.write_text("{}")
    runner.once(result, "no-such-command", log=log)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = f"lvr_lite.bench.experiments.{name}"
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    assert f"python -m {module}" in capsys.readouterr().out


@pytest.mark.parametrize(("only", "without"), [("lvr-lite|llama", None), (None, "llama")])
def test_a_rival_that_is_not_known_is_refused(only: str | None, without: str | None) -> None:
    with pytest.raises(typer.BadParameter, match="llama: not known; choose from lvr-lite"):
        choose({"lvr-lite": "numpy"}, only, without, Path("x"))


def test_rivals_are_those_asked_for_or_installed_without_those_left_out() -> None:
    packages = {"a": "numpy", "b": "no-such-package", "c": "numpy"}
    assert choose(packages, None, None, Path("x")) == ["a", "c"]
    assert choose(packages, None, "c", Path("x")) == ["a"]
    assert choose(packages, "b|a", "a", Path("x")) == ["b"]


def test_a_result_of_another_command_is_not_told_as_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "scores.json"
    ran: list[object] = []

    def run(*arguments: object, **_: object) -> None:
        ran.append(arguments[-1])
        runner.write_json(result, {})

    monkeypatch.setattr(runner, "run", run)
    for steps in (250, 250):
        runner.once(result, "eval", steps, log=tmp_path / "log.txt")
    assert ran == [250]
    with pytest.raises(SystemExit, match=r"scores\.json: another command made it"):
        runner.once(result, "eval", 500, log=tmp_path / "log.txt")
