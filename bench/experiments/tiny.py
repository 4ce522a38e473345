"""The embedded model tuned, exported, scored and probed by commands of `lvr-lite`, each on one
thread and only where an earlier run has not done it. What they print goes to log.txt beside the
result.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lvr_lite.bench.experiments.runner import RECIPES, is_whole, once, overrides, run


def finetune(checkpoint: Path, report: Path, method: str, *settings: str) -> None:
    """Tune by a recipe of configs/methods. report: JSON of the command, written last."""
    recipe = RECIPES / f"{method}.yaml"
    source = ("finetune", "--model", "tiny", "--data", "scenes", "--config", recipe)
    _train(checkpoint, report, *source, *overrides(*settings))


def reinforce(checkpoint: Path, report: Path, start: Path, *settings: str) -> None:
    """Stage 2 from the checkpoint `start`."""
    source = ("grpo", "--checkpoint", start, "--data", "scenes")
    _train(checkpoint, report, *source, *overrides(*settings))


def _train(checkpoint: Path, report: Path, *arguments: object) -> None:
    if not is_whole(report):
        shutil.rmtree(checkpoint, ignore_errors=True)
        target = ("--out", checkpoint, "--json", report)
        run(
            *arguments,
            *target,
            log=report.parent / "log.txt",
            threads=1,
        )


def export(model: Path | str, bundle: Path) -> None:
    """Export to int8."""
    arguments = ("export", model, bundle, "--precision", "int8")
    once(
        bundle / "lvr.json",
        *arguments,
        log=bundle.parent / "log.txt",
        threads=1,
    )


def evaluate(bundle: Path, report: Path, limit: int, skills: int, *more: object) -> None:
    """Accuracy over `limit` held-out scenes and `skills` questions outside the suite."""
    _score(report, "eval", bundle, "--limit", limit, "--skills", skills, *more)


def probe(bundle: Path, report: Path, limit: int, only: str | None, *more: object) -> None:
    """What the latents carry. only: these interventions, with commas between; all by default."""
    chosen = () if only is None else ("--only", only)
    _score(report, "probe", bundle, "--limit", limit, *chosen, *more)


def _score(report: Path, *arguments: object) -> None:
    output = ("--threads", 1, "--json", report)
    once(
        report,
        *arguments,
        *output,
        log=report.parent / "log.txt",
        threads=1,
    )
