"""`lvr-lite demo`: the whole job on the embedded model, as a user would do it. May import: all that
stands above `commands`, Pillow and rich.

Every stage is one of the commands, in a process of its own, so that the demo shows what the
commands do and nothing else; what they measured comes back through their --json files. Only the
page's heat maps are drawn in this process, with the int8 bundle.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lvr_lite.commands.model import open_model
from lvr_lite.errors import LvrError, UsageError
from lvr_lite.files import (
    LOCK,
    JsonObject,
    locked,
    scratch_folder,
    take_place,
    write_atomically,
)
from lvr_lite.terminal import stderr
from lvr_lite.toy.make import scene_samples
from lvr_lite.views.look import answer_views
from lvr_lite.views.page import write_page

RESULTS = "results.json"
BUNDLES = ("fp32", "int8", "int4")
# pictures on the page
EXAMPLES = 12
# Of --quick: so many steps that the model opens the latent loop, without which there is nothing to
# probe.
QUICK = {
    "train.steps": 60,
    "train.eval_every": 30,
    "train.save_every": 30,
    "data.count": 640,
    "data.eval_count": 12,
}


@dataclass(frozen=True)
class DemoSystem:
    """One model of the demo.

    n, accuracy, interval, by_type, pair_accuracy: on held-out scenes, as `eval` writes them.
    ttft_ms, ttfa_ms, tpls_ms, tpot_ms: medians; None for a checkpoint, which is not measured.
    size_mb: of all graphs, in MB.
    peak_rss_mb: of `lvr-lite run`, in MiB.
    """

    name: str
    n: int
    accuracy: float
    interval: list[float]
    by_type: JsonObject
    pair_accuracy: float | None
    ttft_ms: float | None = None
    ttfa_ms: float | None = None
    tpls_ms: float | None = None
    tpot_ms: float | None = None
    size_mb: float | None = None
    peak_rss_mb: float | None = None


@dataclass(frozen=True)
class Demo:
    """What the demo measured.

    out: holds checkpoint/, fp32/, int8/, int4/, results.json, report.html and the pages of `probe`
        and `bench`.
    probe: of the int8 bundle.
    curve: loss and accuracy by step.
    machine: the card of what was measured on.
    commands: what was run.
    minutes: by stage, and "all".
    """

    out: Path
    systems: list[DemoSystem]
    probe: JsonObject
    curve: list[JsonObject]
    machine: JsonObject
    commands: list[str]
    minutes: dict[str, float]

    @property
    def page(self) -> Path:
        return self.out / "report.html"

    def to_json(self) -> JsonObject:
        fields = asdict(self)
        del fields["out"]
        return {"schema": "lvr-lite/demo", "version": 1} | fields


def demo(out: str | Path = "demo-out", quick: bool = False) -> Demo:
    """Tune, export, quantize, score, probe and measure the embedded model into the folder `out`.

    quick: a few steps and questions.

    Raises UsageError where `out` holds something else, LvrError where a stage fails.
    """
    out = Path(out)
    began = time.time()
    _refuse_foreign(out)
    with locked(out, "folder", inside=True):
        _refuse_foreign(out)
        with scratch_folder(out / "demo", RESULTS) as scratch:
            stages = _Stages(out, scratch, quick)
            result, answers = stages.run_all()
            for name in ("checkpoint", *BUNDLES):
                take_place(scratch / name, out / name)
        return _written(result, answers, began)


def _refuse_foreign(out: Path) -> None:
    """A folder that is new, or holds an earlier demo or what a killed one left."""
    if not out.exists() or (out / RESULTS).is_file():
        return
    own = (LOCK, ".demo.")
    if not out.is_dir() or any(not path.name.startswith(own) for path in out.iterdir()):
        raise UsageError(
            f"{out}: exists and is not an earlier demo; choose another --out, or remove it"
        )


def _written(result: Demo, answers: dict[str, list[JsonObject]], began: float) -> Demo:
    """The page and the results of a demo, in its folder."""
    out = result.out
    result.minutes["all"] = round((time.time() - began) / 60, 2)
    write_page(result.to_json() | {"examples": _examples(out / "int8", answers)}, result.page)
    write_atomically(out / RESULTS, json.dumps(result.to_json(), indent=1))
    return result


class _Stages:
    """The stages of a demo, each a few commands, with their times."""

    def __init__(self, out: Path, scratch: Path, quick: bool) -> None:
        self.out = out
        self.scratch = scratch
        self.quick = quick
        self.commands: list[str] = []
        self.minutes: dict[str, float] = {}
        self.console = stderr()

    def run_all(self) -> tuple[Demo, dict[str, list[JsonObject]]]:
        """What was measured, and each system's answers to the held-out scenes."""
        tuned = str(self.scratch / "checkpoint")
        bundles = {name: str(self.scratch / name) for name in BUNDLES}
        models = {"base (torch)": "tiny", "tuned (torch)": tuned}
        models |= {f"ONNX {name}": path for name, path in bundles.items()}
        limit = ("--limit", "24" if self.quick else "300")
        overrides = []
        if self.quick:
            overrides = [f"--set={k}={v}" for k, v in QUICK.items()]
        with self._stage("tune in 4 bits (QLoRA)"):
            source = ("--model", "tiny", "--data", "scenes")
            tuning = self._run("finetune", *source, "--out", tuned, *overrides)
        with self._stage("export to ONNX"):
            self._run("export", tuned, bundles["fp32"], "--precision", "fp32")
        with self._stage("quantize"):
            for name in ("int8", "int4"):
                self._run("quantize", bundles["fp32"], bundles[name], "--precision", name)
        with self._stage("score on held-out scenes"):
            scores = {
                name: self._run("eval", model, *limit, "--skills", "0")
                for name, model in models.items()
            }
        with self._stage("probe the latents"):
            page = str(self.out / "probe.html")
            probe = self._run("probe", bundles["int8"], *limit, "--html", page)
        with self._stage("measure latency"):
            others = ("--vs", bundles["int8"], "--vs", bundles["int4"])
            runs = ("--runs", "3" if self.quick else "20")
            page = str(self.out / "bench.html")
            bench = self._run("bench", bundles["fp32"], *others, *runs, "--html", page)
        measured = {f"ONNX {system['name']}": system for system in bench["systems"]}
        fields = ("n", "baseline", "interventions", "retrieval", "verdict")
        result = Demo(
            out=self.out,
            systems=[_system(name, scores[name], measured.get(name)) for name in models],
            probe={field: probe[field] for field in fields},
            curve=_curve(tuning["history"]),
            machine=bench["machine"],
            commands=[line.replace(str(self.scratch), str(self.out)) for line in self.commands],
            minutes=self.minutes,
        )
        return result, {name: score["answers"] for name, score in scores.items()}

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.time()
        self.console.print(f"[bold]{name}[/] …")
        yield
        self.minutes[name] = round((time.time() - began) / 60, 2)
        self.console.print(f"[dim]{name}: {self.minutes[name]:.1f} min[/]")

    def _run(self, *arguments: str) -> JsonObject:
        """One command of lvr-lite, its messages passed on; returns what it wrote as JSON."""
        result = self.scratch / f"{len(self.commands)}.json"
        line = f"lvr-lite {' '.join(arguments)}"
        self.commands.append(line)
        command = [sys.executable, "-m", "lvr_lite", *arguments, "--json", str(result)]
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        if code != 0:
            raise LvrError(
                f"the demo stopped: `{line}` ended with exit code {code} (its message stands above)"
            )
        return dict(json.loads(result.read_text(encoding="utf-8")))


def _system(name: str, score: JsonObject, measured: JsonObject | None) -> DemoSystem:
    quality = ("n", "accuracy", "interval", "by_type", "pair_accuracy")
    known: JsonObject = {field: score[field] for field in quality}
    if measured is not None:
        medians = ("ttft_ms", "ttfa_ms", "tpls_ms", "tpot_ms")
        known |= {field: measured[field]["p50_ms"] for field in medians}
        known["size_mb"] = round(sum(measured["bytes"].values()) / 1e6, 2)
        known["peak_rss_mb"] = measured["peak_rss_mb"]
    return DemoSystem(name, **known)


def _curve(history: list[JsonObject]) -> list[JsonObject]:
    losses = [{"step": h["step"], "loss": h["loss"]} for h in history if "loss" in h]
    scores = [
        {"step": h["step"], "accuracy": h["eval_accuracy"]} for h in history if "eval_accuracy" in h
    ]
    return losses + scores


def _examples(bundle: Path, answers: dict[str, list[JsonObject]]) -> list[JsonObject]:
    """The page's pictures, each with its question, every system's answer, and what the bundle's
    latent steps are near to (None for an answer without them).
    """
    model = open_model(bundle)
    examples = []
    for i, (sample, picture) in enumerate(scene_samples(EXAMPLES, 0, "test")):
        by_system = {name: listed[i]["answer"] for name, listed in answers.items()}
        answer = model.ask([picture], sample.question)
        view = None
        if answer.latent_steps:
            (view,) = answer_views(
                runtime=model.runtime,
                pictures=answer.pictures,
                prompt=answer.prompt,
                result=answer.result,
            )
        example = {
            "image": picture,
            "view": view,
            "boxes": [list(box) for box in sample.boxes],
            "question": sample.question,
            "expected": sample.answer,
            "answer": by_system["ONNX int8"],
            "by_system": by_system,
        }
        examples.append(example)
    return examples
