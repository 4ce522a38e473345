"""Quantization of the embedded model: accuracy by question type, probe, drift; and `exact` against
the 4-bit torch model that was trained. About 40 minutes on two cores.

    lvr-lite finetune --model tiny --data scenes --out build/quant/tuned
    python -m lvr_lite.bench.experiments.quant --checkpoint build/quant/tuned --out build/quant

Every number but those of `exact` against torch comes from a command of lvr-lite; their JSON files
stay in OUT, what the tables need goes to OUT/quant.json, and the figure of drift to OUT/drift.png.
Goes on where an earlier call stopped. --count is of held-out scenes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from lvr_lite.bench.experiments.runner import (
    JsonObject,
    Out,
    launch,
    once,
    read_json,
    write_results,
)
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, Result, decode
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.runtime import Runtime
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model import bundle as bundles
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.quant import drift
from lvr_lite.quant.reports import Drift
from lvr_lite.toy.make import scene_samples
from lvr_lite.train import load

BUNDLES = {
    "int8": ("--precision", "int8"),
    "int4": ("--precision", "int4"),
    "int4-plain": ("--precision", "int4", "--calibration", "none"),
    "int4-plain-b32": ("--precision", "int4", "--block", "32", "--calibration", "none"),
    "mixed": ("--precision", "mixed", "--bits", "5"),
    "fp16": ("--precision", "fp16"),
}
PROBED = ("fp32", "int8", "mixed")
DRAWN = ("int8", "int4", "mixed")
LATENT_STEPS = 8
SCENES = 500
# Scenes that go through LATENT_STEPS steps, whatever K the model has.
STEPPED = 100
BATCH = 20


@dataclass(frozen=True)
class Exactness:
    """`exact` against torch's 4-bit model.

    scenes, same_tokens: held-out scenes, and of how many the answers have the same tokens.
    prompts, of_them_with_8_latents: scenes that went through LATENT_STEPS steps.
    hidden_relative_worst: largest relative difference of a state after the prompt or a step.
    """

    scenes: int
    same_tokens: int
    prompts: int
    of_them_with_8_latents: int
    hidden_relative_worst: float


@dataclass(frozen=True)
class Bundle:
    """What is reported of one bundle. bits: of a weight. against_fp32: as `eval --against` has it.
    probe: {"n", "flips", "noise_accuracy", "baseline"}.
    """

    bits: float | None
    bytes: int | None
    n: int
    accuracy: float
    by_type: dict[str, float]
    answers_unlike_fp32: int
    against_fp32: JsonObject | None
    drift: Any
    probe: JsonObject | None = None


def exactness(folder: Path, bundle: Path) -> Exactness:
    checkpoint = read_checkpoint(folder)
    reference = TorchRuntime(load.load_trained(checkpoint, torch.float32), checkpoint)
    exact = OnnxRuntime(bundles.Bundle.open(bundle))
    answering = Options(max_tokens=16)
    answers = zip(
        _decode(exact, answering, SCENES), _decode(reference, answering, SCENES), strict=True
    )
    same = sum(a.tokens == b.tokens for a, b in answers)
    stepping = Options(max_tokens=1, steps=LATENT_STEPS, keep_hidden=True)
    ours = _decode(exact, stepping, STEPPED)
    theirs = _decode(reference, stepping, STEPPED)
    worst = max(
        float(np.linalg.norm(x - y) / np.linalg.norm(y))
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a.hidden, b.hidden, strict=True)
    )
    stepped = sum(len(result.latents) == LATENT_STEPS for result in theirs)
    return Exactness(
        scenes=SCENES,
        same_tokens=same,
        prompts=STEPPED,
        of_them_with_8_latents=stepped,
        hidden_relative_worst=worst,
    )


def _decode(runtime: Runtime, options: Options, count: int) -> list[Result]:
    """Of held-out scenes."""
    items = list(scene_samples(count, 0, "test"))
    results = []
    for first in range(0, count, BATCH):
        prompts = [
            prepare_prompt(runtime, [picture], sample.question)[0]
            for sample, picture in items[first : first + BATCH]
        ]
        results += decode(runtime, prompts, options)
    return results


def evaluate(out: Path, name: str, count: int) -> Bundle:
    """Accuracy and drift of one bundle. The one in fp32 comes first: the others are compared with
    it.
    """
    scores_file = out / f"eval-{name}.json"
    reference = out / "eval-fp32.json"
    arguments: list[object] = ["--limit", count, "--skills", 0, "--json", scores_file]
    if name != "fp32":
        arguments += ["--against", reference]
    once(
        scores_file,
        "eval",
        out / name,
        *arguments,
        log=out / "log.txt",
    )
    scores = read_json(scores_file)
    written = read_json(out / name / "report.json")
    pairs = zip(scores["answers"], read_json(reference)["answers"], strict=True)
    return Bundle(
        bits=written.get("bits_per_weight"),
        bytes=written.get("bytes"),
        n=scores["n"],
        accuracy=scores["accuracy"],
        by_type={kind: part["accuracy"] for kind, part in scores["by_type"].items()},
        answers_unlike_fp32=sum(a["answer"] != b["answer"] for a, b in pairs),
        against_fp32=None if name == "fp32" else scores["against"][0],
        drift=written.get("drift"),
    )


def probe(out: Path, name: str) -> JsonObject:
    """What noise and a donor's latents do to the answers of one bundle."""
    file = out / f"probe-{name}.json"
    chosen = ("--limit", 800, "--only", "noise,donor_same_question")
    once(
        file,
        "probe",
        out / name,
        *chosen,
        "--json",
        file,
        log=out / "log.txt",
    )
    report = read_json(file)
    interventions = report["interventions"]
    return {
        "n": report["n"],
        "flips": interventions["donor_same_question"]["flips_to_donor"],
        "noise_accuracy": interventions["noise"]["accuracy"],
        "baseline": report["baseline"]["accuracy"],
    }


def main(
    checkpoint: Annotated[Path, typer.Option()],
    out: Out,
    count: int = 2400,
) -> None:
    log = out / "log.txt"
    for name in ("fp32", "exact"):
        arguments = ("export", checkpoint, out / name, "--precision", name)
        once(out / name / "lvr.json", *arguments, log=log)
    for name, how in BUNDLES.items():
        once(
            out / name / "lvr.json",
            "quantize",
            out / "fp32",
            out / name,
            *how,
            log=log,
        )
    exact = exactness(checkpoint, out / "exact")
    bundles: dict[str, Bundle] = {}
    for name in ("fp32", "exact", *BUNDLES):
        bundles[name] = evaluate(out, name, count)
    for name in PROBED:
        bundles[name] = replace(bundles[name], probe=probe(out, name))
    write_results(out / "quant.json", {"exact_against_torch": exact, "bundles": bundles})
    drifts = {name: Drift.from_json(bundles[name].drift) for name in DRAWN}
    drift.draw(drifts, out / "drift.png")


if __name__ == "__main__":
    launch(main, __doc__)
