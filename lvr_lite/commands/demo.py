"""`lvr-lite demo`: the whole job on the embedded model, as a user would do it. May import: the
core, Pillow and rich.

Every stage is one of the commands, in a process of its own, so that the demo shows what the
commands do and nothing else; what they measured comes back through their --json files. Only the
page's heat maps are drawn in this process, with the int8 bundle.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from lvr_lite.errors import LvrError, UsageError
from lvr_lite.files import write_atomically
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import decode
from lvr_lite.generate.runtime import Runtime
from lvr_lite.toy.make import scene_samples
from lvr_lite.views.look import View, views

RESULTS = "results.json"
SHOWN = 12  # pictures on the page


def run_demo(out: Path, quick: bool) -> None:
    """Tune, export, quantize, score and measure into `out`: checkpoint/, fp32/, int8/, int4/,
    results.json, report.html.

    quick: a few steps and questions. Raises UsageError where `out` holds something else, LvrError
    where a stage fails.
    """
    if out.exists() and not (
        out.is_dir() and (not any(out.iterdir()) or (out / RESULTS).is_file())
    ):
        raise UsageError(
            f"{out}: exists and is not an earlier demo; choose another --out, or remove it"
        )
    questions = 24 if quick else 300
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=out) as scratch:
        demo = _Demo(Path(scratch))
        results = demo.stages(out, quick, questions)
        if (out / "checkpoint").exists():
            shutil.rmtree(out / "checkpoint")
        for name in ("checkpoint", "fp32", "int8", "int4"):
            if (out / name).exists():
                shutil.rmtree(out / name)
            (Path(scratch) / name).rename(out / name)
    results["minutes"]["all"] = round((time.time() - began) / 60, 2)
    _finish(out, results)


class _Demo:
    """The stages, with their commands, times and results."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.commands: list[str] = []
        self.minutes: dict[str, float] = {}
        self.console = Console(stderr=True)

    def stages(self, out: Path, quick: bool, questions: int) -> dict[str, Any]:
        here = self.scratch
        tuned, bundles = (
            here / "checkpoint",
            {name: here / name for name in ("fp32", "int8", "int4")},
        )
        # so many that the model opens the latent loop, without which there is nothing to probe
        faster = [
            "--set",
            "train.steps=60",
            "--set",
            "train.eval_every=30",
            "--set",
            "train.save_every=30",
            "--set",
            "data.count=640",
        ]
        small = ["--set", "data.eval_count=12"]
        with self.stage("tune in 4 bits (QLoRA)"):
            tuning = self.run(
                "finetune",
                "--model",
                "tiny",
                "--data",
                "scenes",
                "--out",
                str(tuned),
                *((faster + small) if quick else []),
            )
        with self.stage("export to ONNX"):
            self.run("export", str(tuned), str(bundles["fp32"]), "--precision", "fp32")
        with self.stage("quantize"):
            for name in ("int8", "int4"):
                self.run("quantize", str(bundles["fp32"]), str(bundles[name]), "--precision", name)
        models = {"base (torch)": "tiny", "tuned (torch)": str(tuned)} | {
            f"ONNX {name}": str(path) for name, path in bundles.items()
        }
        with self.stage("score on held-out scenes"):
            scored = {
                name: self.run("eval", model, "--limit", str(questions), "--skills", "0")
                for name, model in models.items()
            }
        with self.stage("probe the latents"):
            probed = self.run(
                "probe",
                str(bundles["int8"]),
                "--limit",
                str(questions),
                "--html",
                str(out / "probe.html"),
            )
        with self.stage("measure latency"):
            runs = "3" if quick else "20"
            against = [
                part for path in (bundles["int8"], bundles["int4"]) for part in ("--vs", str(path))
            ]
            measured = self.run(
                "bench",
                str(bundles["fp32"]),
                *against,
                "--runs",
                runs,
                "--html",
                str(out / "bench.html"),
            )
        return {
            "schema": "lvr-lite/demo",
            "version": 1,
            "systems": [
                _system(name, scored[name], _of_bundle(measured, models[name])) for name in models
            ],
            "probe": {
                k: probed[k] for k in ("n", "baseline", "interventions", "retrieval", "verdict")
            },
            "curve": _curve(tuning["history"]),
            "machine": measured["machine"],
            "commands": [c.replace(str(here), str(out)) for c in self.commands],
            "minutes": self.minutes,
            "answers": {name: score["answers"] for name, score in scored.items()},
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.time()
        self.console.print(f"[bold]{name}[/] …")
        yield
        self.minutes[name] = round((time.time() - began) / 60, 2)
        self.console.print(f"[dim]{name}: {self.minutes[name]:.1f} min[/]")

    def run(self, command: str, *arguments: str) -> dict[str, Any]:
        """One command of lvr-lite, its output passed on; returns what it wrote as JSON."""
        found = self.scratch / f"{len(self.commands)}.json"
        line = [command, *arguments]
        self.commands.append("lvr-lite " + " ".join(line))
        with (self.scratch / "stdout").open("w") as stdout:
            code = subprocess.run(
                [sys.executable, "-m", "lvr_lite", *line, "--json", str(found)],
                stdout=stdout,
                check=False,
            ).returncode
        if code != 0:
            raise LvrError(
                f"the demo stopped: `lvr-lite {' '.join(line)}` ended with exit code {code} (its message stands above)"
            )
        return dict(json.loads(found.read_text()))


def _of_bundle(measured: dict[str, Any], model: str) -> dict[str, Any] | None:
    return next((s for s in measured["systems"] if s["name"] == Path(model).name), None)


def _system(name: str, scored: dict[str, Any], measured: dict[str, Any] | None) -> dict[str, Any]:
    """One row of the table."""
    row = {"name": name} | {
        k: scored[k] for k in ("n", "accuracy", "interval", "by_type", "pair_accuracy")
    }
    speed = {
        f"{k}_ms": measured[f"{k}_ms"]["p50_ms"] if measured else None
        for k in ("ttft", "ttfa", "tpls", "tpot")
    }
    size = round(sum(measured["bytes"].values()) / 1e6, 2) if measured else None
    return (
        row
        | speed
        | {"size_mb": size, "peak_rss_mb": measured["peak_rss_mb"] if measured else None}
    )


def _curve(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    losses = [{"step": h["step"], "loss": h["loss"]} for h in history if "loss" in h]
    return losses + [
        {"step": h["step"], "accuracy": h["eval_accuracy"]} for h in history if "eval_accuracy" in h
    ]


def _finish(out: Path, results: dict[str, Any]) -> None:
    from lvr_lite.generate.onnx import OnnxRuntime
    from lvr_lite.model.bundle import Bundle
    from lvr_lite.views.page import write_page

    answers = results.pop("answers")
    int8 = OnnxRuntime(Bundle.open(out / "int8"))
    examples = []
    for i, (sample, picture) in enumerate(scene_samples(SHOWN, 0, "test")):
        said = {name: given[i]["answer"] for name, given in answers.items()}
        asked = {
            "question": sample.question,
            "expected": sample.answer,
            "answer": said["ONNX int8"],
            "by_system": said,
        }
        examples.append(
            {
                "image": picture,
                "view": _view(int8, picture, sample.question),
                "boxes": [list(b) for b in sample.boxes],
            }
            | asked
        )
    write_page(results | {"examples": examples}, out / "report.html")
    write_atomically(out / RESULTS, json.dumps(results, indent=1))
    show(results["systems"])
    Console().print(f"probe of ONNX int8: {results['probe']['verdict']}", highlight=False)
    Console(stderr=True).print(
        f"{results['minutes']['all']:.1f} min; the page: {out / 'report.html'}"
    )


def _view(runtime: Runtime, picture: Image.Image, question: str) -> View | None:
    """What the latent steps of an answer are near to; None for an answer without them."""
    prompt, _ = prepare_prompt(runtime, [picture], question)
    (result,) = decode(runtime, [prompt])
    return views(runtime, [picture], prompt, result)[0] if result.latents else None


def show(systems: list[dict[str, Any]]) -> None:
    """The demo's table on the terminal."""
    table = Table(title="held-out scenes, greedy decoding", title_justify="left")
    for column in ("", "accuracy", "95 % interval", "n", "MB", "TTFT ms", "TPLS ms", "TPOT ms"):
        table.add_column(column, justify="left" if not column else "right")

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    for s in systems:
        low, high = s["interval"]
        speeds = [
            number(s["size_mb"], 1),
            number(s["ttft_ms"], 2),
            number(s["tpls_ms"], 3),
            number(s["tpot_ms"], 3),
        ]
        table.add_row(
            s["name"], f"{s['accuracy']:.1%}", f"{low:.1%} – {high:.1%}", str(s["n"]), *speeds
        )
    Console().print(table)
