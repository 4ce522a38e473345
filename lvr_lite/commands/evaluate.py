"""`lvr-lite eval` and `probe`: how well a model answers, and whether its latents carry the answer.
May import: all that stands above `commands`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lvr_lite.commands import model as models
from lvr_lite.eval import probe as probing
from lvr_lite.eval.comparing import compare
from lvr_lite.eval.interventions import chosen
from lvr_lite.eval.plan import Plan
from lvr_lite.files import JsonObject
from lvr_lite.generate.records import Look
from lvr_lite.terminal import progress

# What `evaluate` asks.
EvalOptions = Plan


@dataclass(frozen=True)
class Evaluation:
    """How a model answered the questions of a suite.

    n: questions.
    accuracy: share of right answers.
    interval: of `accuracy`, 95 %.
    report: all of it, as `lvr-lite eval --json` writes it: by type, by answer, beside others.
    """

    n: int
    accuracy: float
    interval: tuple[float, float]
    report: JsonObject

    def to_json(self) -> JsonObject:
        return self.report


@dataclass(frozen=True)
class ProbeOptions:
    """What `probe` asks.

    data: "scenes" (held-out ones), or a file of samples.
    limit: questions at most.
    seed: of the scenes, noise, orders, donors and intervals.
    only: some interventions alone, such as "noise,donor_same_question"; all by default.
    batch: questions decoded together.
    look: "auto" lets the model choose whether it looks, "always" opens the loop in every answer.
    max_pixels: area that pictures are shrunk to; None for the model's own.
    """

    data: str = "scenes"
    limit: int = 300
    seed: int = 0
    only: str | None = None
    batch: int = 16
    look: Look = "auto"
    max_pixels: int | None = None


@dataclass(frozen=True)
class Probing:
    """What became of the answers when the latents were replaced by others.

    verdict: in one sentence.
    report: all of it, as `lvr-lite probe --json` writes it.
    """

    verdict: str
    report: JsonObject

    def to_json(self) -> JsonObject:
        return self.report

    @property
    def changed_by_sham(self) -> int:
        """Answers that changed although their own latents were put back: differences of that size
        mean nothing.
        """
        sham = self.report["interventions"].get("self", {})
        return int(sham.get("changed_count") or 0)


def evaluate(
    model: str | Path,
    options: EvalOptions | None = None,
    against: Sequence[str] = (),
    threads: int | None = None,
) -> Evaluation:
    """Score a bundle or a checkpoint on held-out questions, and beside others on the same ones.

    against: models, or files that `lvr-lite eval --json` wrote.
    threads: of ONNX Runtime or torch.

    Raises DataError and UsageError for a suite that cannot be asked, and where a file in `against`
    is not about the same questions.
    """
    plan = options or EvalOptions()
    with progress("answering") as bar:
        report = compare(
            str(model),
            against,
            plan,
            lambda name: models.open_runtime(name, threads),
            lambda count: bar(advance=count),
            lambda total: bar(total=total),
        )
    low, high = report["interval"]
    return Evaluation(
        n=report["n"], accuracy=report["accuracy"], interval=(low, high), report=report
    )


def probe(
    model: str | Path, options: ProbeOptions | None = None, threads: int | None = None
) -> Probing:
    """Say whether the latents carry the answer: replace them by others, and see what becomes of it.

    Raises UsageError for a model without latents, and where it opened the latent loop in no answer.
    """
    options = options or ProbeOptions()
    interventions = chosen(options.only)
    # Wrong data is told before the model is opened.
    probing.load_items(options.data, options.limit, options.seed)
    runtime = models.open_runtime(model, threads, max_pixels=options.max_pixels)
    special = runtime.processor.special_tokens
    items = probing.load_items(
        data=options.data, limit=options.limit, seed=options.seed, special_tokens=special
    )
    with progress("answering") as bar:
        report = probing.probe(
            runtime,
            items,
            interventions,
            options.seed,
            options.batch,
            lambda completed, total: bar(completed=completed, total=total),
            options.look,
        )
    report["data"] = options.data
    if options.data == "scenes":
        report["seeds"]["scenes"] = options.seed
    return Probing(report["verdict"], report)
