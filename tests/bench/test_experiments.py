"""`make results-latents`: what is collected from finished runs, and the page that is made of it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "results" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def scored(right: str) -> dict[str, Any]:
    """What `eval --json` writes about four questions, of which "1" is answered rightly; two of the
    skills likewise.
    """
    answers = [
        {
            "id": str(i),
            "type": "count" if i < 2 else "odd",
            "expected": "a",
            "score": int(x),
            "answer": "?",
        }
        for i, x in enumerate(right)
    ]
    kinds = {
        k: {"n": 2, "accuracy": sum(a["score"] for a in answers if a["type"] == k) / 2}
        for k in ("count", "odd")
    }
    skills = {
        "n": 4,
        "accuracy": 0.5,
        "by_type": {"caption": {"n": 2, "accuracy": 0.5}},
        "answers": answers,
    }
    return {
        "n": 4,
        "accuracy": right.count("1") / 4,
        "by_type": kinds,
        "answers": answers,
        "skills": skills,
    }


def probed(accuracy: float) -> dict[str, Any]:
    found = {name: {"accuracy": accuracy, "flips_to_donor": None} for name in ("noise", "self")}
    found["none"] = {"accuracy": 0.85, "flips_to_donor": None}  # of those that looked
    found["donor_same_question"] = {"accuracy": accuracy, "flips_to_donor": 0.75}
    retrieval = {"r_at_1": 0.8, "chance": 0.1}
    return {
        "baseline": {"accuracy": 0.9},
        "interventions": found,
        "retrieval": retrieval,
        "verdict": "they carry it",
        "items": [1],
    }


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Two methods, of which one has run with both seeds, and the base."""
    for seed in (0, 1):
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny" / f"eval-{seed}.json").write_text(json.dumps(scored("1000")))
    for method, seed, right in (
        ("sft", 0, "1100"),
        ("sft", 1, "1010"),
        ("lvr-bottleneck", 0, "1111"),
    ):
        here = tmp_path / f"{method}-{seed}"
        here.mkdir()
        (here / "eval.json").write_text(json.dumps(scored(right)))
        (here / "finetune.json").write_text(
            json.dumps({"steps": 3, "minutes": 1.5, "peak_memory_gb": 0.25, "history": [1]})
        )
        if method != "sft":
            (here / "probe.json").write_text(json.dumps(probed(0.2)))
    return tmp_path


def test_runs_are_compared_with_the_controls_of_their_seed_item_by_item(finished: Path) -> None:
    data = script("latents").collect(finished, ["sft", "lvr-bottleneck", "dummy"], [0, 1])
    assert [(r["method"], r["seed"]) for r in data["runs"]] == [
        ("sft", 0),
        ("sft", 1),
        ("lvr-bottleneck", 0),
    ]
    found = data["runs"][2]
    assert found["against"]["sft"]["difference"] == 0.5
    assert found["against"]["base"]["by_type"]["odd"]["difference"] == 1.0
    assert set(found["against"]) == {"base", "sft"}
    assert "answers" not in found["eval"]
    assert "answers" not in found["eval"]["skills"]
    assert "items" not in found["probe"]
    assert "history" not in found["finetune"]


def test_the_page_has_every_figure_and_keeps_the_words_around_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = script("latents_page")
    data = script("latents").collect(finished, ["sft", "lvr-bottleneck"], [0, 1])
    results = tmp_path / "latents.json"
    results.write_text(json.dumps(json.loads(json.dumps(data))))
    monkeypatch.setattr(page, "HERE", tmp_path)
    (tmp_path / "latents.md").write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write(results)
    text = (tmp_path / "latents.md").read_text()
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
        "- `lvr-bottleneck`, seed 0: they carry it",
    ):
        assert line in text, line
    assert "| `lvr-bottleneck` | sft | 0 | 4 | +50.0 |" in text
    for name in ("latents_accuracy.png", "latents_interventions.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_table_of_rivals_replaces_the_last_one_and_keeps_the_words_around_it(
    tmp_path: Path,
) -> None:
    publish, page = script("rivals").publish, tmp_path / "rivals.md"
    page.write_text("before\n<!-- rivals.py --past 300 -->\n<!-- end of rivals.py --past 300 -->\n")
    publish(["| first |", ""], page, "rivals.py --past 300")
    publish(["| long |"], page, "rivals.py --past 2000")
    page.write_text(page.read_text() + "after\n")
    publish(["| second |"], page, "rivals.py --past 300")
    assert re.findall(r"before|first|second|long|after", page.read_text()) == [
        "before",
        "second",
        "long",
        "after",
    ]


@pytest.mark.parametrize("flag", ["--only", "--without"])
def test_a_rival_that_is_not_known_is_one_line(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rivals = script("rivals")
    parser = rivals.arguments()
    with pytest.raises(SystemExit):
        rivals.chosen(
            parser, parser.parse_args(["--out", "x", flag, "lvr-lite|llama"]), rivals.RIVALS
        )
    assert "llama: not known; choose from lvr-lite|" in capsys.readouterr().err


def test_rivals_are_those_asked_for_or_installed_without_those_left_out() -> None:
    rivals = script("rivals")
    parser, known = (
        rivals.arguments(),
        {"a": ("numpy", None), "b": ("no-such-package", None), "c": ("numpy", None)},
    )
    for flags, names in (
        ([], ["a", "c"]),
        (["--without", "c"], ["a"]),
        (["--only", "b|a", "--without", "a"], ["b"]),
    ):
        assert rivals.chosen(parser, parser.parse_args(["--out", "x", *flags]), known) == names
