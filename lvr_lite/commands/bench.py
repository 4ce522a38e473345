"""`lvr-lite bench`: latency by stage, memory and answers of several systems, and what changed
between two such runs. May import: Pillow and all that stands above `commands`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lvr_lite.bench import compare, machine, record, report
from lvr_lite.bench.compare import Comparison
from lvr_lite.bench.measure import measure
from lvr_lite.bench.plan import Plan, Request, Setting, System
from lvr_lite.bench.record import Accuracy, Benchmark
from lvr_lite.commands import model as models
from lvr_lite.errors import LvrError
from lvr_lite.eval.plan import MAX_TOKENS, load_suite
from lvr_lite.eval.suite import evaluate
from lvr_lite.generate.decode import Options
from lvr_lite.generate.records import Look
from lvr_lite.model.bundle import Bundle, is_bundle
from lvr_lite.model.images import open_for_model
from lvr_lite.system import usable_cores
from lvr_lite.terminal import progress

# Without a number of runs: at least so many, and more until so many seconds have passed.
RUNS = 20
SECONDS = 15.0
# scenes that are drawn for requests, and how many of them are asked
DRAWN = 16
ASKED = 12


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how.

    vs: other bundles or checkpoints, measured in the same rounds.
    runs: timed requests a system; by default 20, and more until 15 seconds have passed.
    warmup: untimed requests a system.
    tokens: text tokens of every answer.
    steps: latent steps; None stands for the model's own.
    image_tokens: visual tokens that pictures are scaled to; None leaves them as they are.
    batch: requests decoded together.
    image, question: what is asked; drawn scenes by default.
    look: whether answers look; None is "always" wherever latent steps are measured.
    max_pixels: area that pictures are shrunk to; None for each model's own.
    limit: held-out scenes that are scored beside the speed.
    provider: what runs the graphs of bundles.
    threads: of ONNX Runtime; all usable cores by default.
    """

    vs: tuple[str, ...] = ()
    runs: int | None = None
    warmup: int = 3
    tokens: int = 16
    steps: tuple[int | None, ...] = (None,)
    image_tokens: tuple[int | None, ...] = (None,)
    batch: tuple[int, ...] = (1,)
    image: Path | None = None
    question: str = "describe"
    look: Look | None = None
    max_pixels: int | None = None
    limit: int = 0
    provider: str = "cpu"
    threads: int | None = None

    @property
    def plan(self) -> Plan:
        settings = tuple(
            Setting(steps, image_tokens, batch)
            for batch in self.batch
            for image_tokens in self.image_tokens
            for steps in self.steps
        )
        return Plan(
            rounds=self.runs or RUNS,
            seconds=SECONDS if self.runs is None else 0.0,
            warmup=self.warmup,
            tokens=self.tokens,
            settings=settings,
            threads=self.threads or usable_cores(),
            look=self.look,
        )

    def provider_of(self, model: str) -> str:
        """A checkpoint runs under torch, whatever runs the bundles."""
        if not is_bundle(Path(model)):
            return "cpu"
        return self.provider


def benchmark(model: str | Path, options: BenchOptions | None = None) -> Benchmark:
    """Measure a bundle or a checkpoint, and others beside it, interleaved.

    Raises UsageError for a provider that is not there and for pictures that cannot have the visual
    tokens that are asked for.
    """
    options = options or BenchOptions()
    plan = options.plan
    requests = _requests(options)
    names = [str(model), *options.vs]
    systems = [_system(name, names, options) for name in names]
    with progress("measuring") as bar:
        run = measure(
            systems,
            requests,
            plan,
            lambda completed, total: bar(completed=completed, total=total),
        )
    bundles = {name: Path(name) for name in names if is_bundle(Path(name))}
    card = {"provider": options.provider} | machine.card(plan.threads, bundles)
    return run.result(card)


def compare_benchmarks(
    before: str | Path, after: str | Path, tolerance: float = compare.TOLERANCE
) -> Comparison:
    """Say what changed between two files that `lvr-lite bench --json` wrote.

    tolerance: what a median may move without being called changed.

    Raises DataError for other files, and where they have no system in common.
    """
    return compare.compare(record.read(Path(before)), record.read(Path(after)), tolerance)


def table_of_benchmarks(files: Sequence[str | Path]) -> str:
    """Files that `lvr-lite bench --json` wrote, of several machines, as one Markdown table."""
    return report.machines_table([(str(file), record.read(Path(file))) for file in files])


def _requests(options: BenchOptions) -> list[Request]:
    if options.image is not None:
        return [Request(open_for_model(options.image), options.question)]
    # Those without boxes are answered without latents.
    items = (item for item in load_suite("scenes", DRAWN) if item[0].boxes)
    return [Request(pictures[0], sample.question) for sample, pictures in islice(items, ASKED)]


def _system(name: str, names: Sequence[str], options: BenchOptions) -> System:
    """One of the models `names`, open, with what is measured of it apart."""
    provider = options.provider_of(name)
    runtime = models.open_runtime(name, options.threads, provider, max_pixels=options.max_pixels)
    precision = "fp32"
    sizes = {}
    if is_bundle(Path(name)):
        manifest = Bundle.open(Path(name), check=False).manifest
        precision = manifest.precision
        sizes = {graph: written.bytes for graph, written in manifest.graphs.items()}
    accuracy = None
    if options.limit:
        how = Options(max_tokens=MAX_TOKENS, look=options.look or "auto")
        scores = evaluate(runtime, load_suite("scenes", options.limit), how)
        names = ("n", "accuracy", "interval", "looked")
        accuracy = Accuracy("scenes", *(scores[field] for field in names))
    folders = [Path(other).name for other in names]
    unique = folders.count(Path(name).name) == 1
    return System(
        name=Path(name).name if unique else name.rstrip("/"),
        precision=precision,
        runtime=runtime,
        bytes=sizes,
        peak_rss_mb=_rss_of_run(name, options, bool(runtime.latent.steps)),
        accuracy=accuracy,
    )


def _rss_of_run(model: str, options: BenchOptions, can_look: bool) -> float | None:
    """Peak memory in MiB of `lvr-lite run` with this model, in a process of its own."""
    look = options.look or ("always" if can_look else "auto")
    sample, pictures = next(load_suite("scenes", 1))
    with tempfile.TemporaryDirectory() as folder:
        picture = f"{folder}/picture.png"
        result = f"{folder}/run.json"
        pictures[0].save(picture)
        command = [sys.executable, "-m", "lvr_lite", "run", model, picture, sample.question]
        command += ["--look", look, "--json", result, "--provider", options.provider_of(model)]
        if options.max_pixels:
            command += ["--max-pixels", str(options.max_pixels)]
        if options.threads:
            command += ["--threads", str(options.threads)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            raise LvrError(
                f"{model}: `lvr-lite run` failed while its memory was measured: "
                f"{done.stderr.strip().splitlines()[-1:]}"
            )
        peak: float | None = json.loads(Path(result).read_text(encoding="utf-8"))["peak_rss_mb"]
        return peak
