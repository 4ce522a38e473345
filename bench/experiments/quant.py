"""Quantization of the embedded model: accuracy by question type, probe, drift; and `exact` against
the 4-bit torch model that was trained.

    lvr-lite finetune --model tiny --data scenes --out build/quant/tuned
    python docs/results/quant.py --checkpoint build/quant/tuned --out build/quant        (about 40 minutes on 2 cores)

Every number comes from a command of lvr-lite; their JSON files stay in OUT, what the tables need
goes to OUT/quant.json, and the figure of drift to OUT/drift.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, decode
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.quant import drift
from lvr_lite.toy.make import scene_samples
from lvr_lite.train import load as nf4

BUNDLES = {
    "int8": ["--precision", "int8"],
    "int4": ["--precision", "int4"],
    "int4-plain": ["--precision", "int4", "--calibration", "none"],
    "int4-plain-b32": ["--precision", "int4", "--block", "32", "--calibration", "none"],
    "mixed": ["--precision", "mixed", "--bits", "5"],
    "fp16": ["--precision", "fp16"],
}
LATENT_STEPS, SCENES = 8, 500


def run(*arguments: str) -> None:
    print("lvr-lite", *arguments, flush=True)
    subprocess.run(
        [sys.executable, "-m", "lvr_lite", *arguments], check=True, stdout=subprocess.DEVNULL
    )


def exactness(checkpoint_folder: Path, bundle: Path) -> dict[str, Any]:
    """`exact` against torch's 4-bit model: states after the prompt and 8 latent steps, and the
    tokens of 500 held-out scenes.
    """
    checkpoint = read_checkpoint(checkpoint_folder)
    torch_runtime, onnx = (
        TorchRuntime(nf4.load_trained(checkpoint, torch.float32), checkpoint),
        OnnxRuntime(bundle),
    )
    same, worst, answered = 0, 0.0, 0
    items = [(sample, picture) for sample, picture in scene_samples(SCENES, 0, "test")]
    for first in range(0, SCENES, 20):
        part = items[first : first + 20]
        said = []
        for runtime in (onnx, torch_runtime):
            prompts = [
                prepare_prompt(runtime, [picture], sample.question)[0] for sample, picture in part
            ]
            said.append(decode(runtime, prompts, Options(max_tokens=16, keep_hidden=True)))
            if first < 100:  # eight steps, whatever K the model has
                steps = decode(
                    runtime, prompts, Options(max_tokens=1, steps=LATENT_STEPS, keep_hidden=True)
                )
                said[-1] = list(zip(said[-1], steps, strict=True))
        for mine, theirs in zip(*said, strict=True):
            if first < 100:
                (mine, deep), (theirs, reference) = mine, theirs
                for a, b in zip(deep.hidden, reference.hidden, strict=True):
                    worst = max(worst, float(np.linalg.norm(a - b) / np.linalg.norm(b)))
                answered += len(reference.latents) == LATENT_STEPS
            same += mine.tokens == theirs.tokens
    return {
        "scenes": SCENES,
        "same_tokens": same,
        "prompts": 100,
        "of_them_with_8_latents": answered,
        "hidden_relative_worst": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2400, help="held-out scenes")
    options = parser.parse_args()
    out, count = options.out, str(options.count)
    out.mkdir(parents=True, exist_ok=True)
    run("export", str(options.checkpoint), str(out / "fp32"), "--precision", "fp32")
    run("export", str(options.checkpoint), str(out / "exact"), "--precision", "exact")
    for name, how in BUNDLES.items():
        run("quantize", str(out / "fp32"), str(out / name), *how)
    names = ["fp32", "exact", *BUNDLES]
    found: dict[str, Any] = {
        "exact_against_torch": exactness(options.checkpoint, out / "exact"),
        "bundles": {},
    }
    for name in names:
        against = [] if name == "fp32" else ["--against", str(out / "eval-fp32.json")]
        run(
            "eval",
            str(out / name),
            "--limit",
            count,
            "--skills",
            "0",
            *against,
            "--json",
            str(out / f"eval-{name}.json"),
        )
        scored = json.loads((out / f"eval-{name}.json").read_text())
        report = json.loads((out / name / "report.json").read_text())
        versus = scored["against"][0] if against else None
        fp32 = json.loads((out / "eval-fp32.json").read_text())["answers"]
        unlike = sum(
            mine["answer"] != theirs["answer"]
            for mine, theirs in zip(scored["answers"], fp32, strict=True)
        )
        found["bundles"][name] = {
            "bits": report.get("bits_per_weight"), "bytes": report.get("bytes"), "n": scored["n"], "accuracy": scored["accuracy"],
            "answers_unlike_fp32": unlike,
            "by_type": {k: v["accuracy"] for k, v in scored["by_type"].items()}, "against_fp32": versus, "drift": report.get("drift"),
        }  # fmt: skip
        (out / "quant.json").write_text(json.dumps(found, indent=1))
    for name in ("fp32", "int8", "mixed"):
        probed = out / f"probe-{name}.json"
        run(
            "probe",
            str(out / name),
            "--limit",
            "800",
            "--only",
            "noise,donor_same_question",
            "--json",
            str(probed),
        )
        data = json.loads(probed.read_text())
        found["bundles"][name]["probe"] = {
            "n": data["n"], "flips": data["interventions"]["donor_same_question"]["flips_to_donor"],
            "noise_accuracy": data["interventions"]["noise"]["accuracy"], "baseline": data["baseline"]["accuracy"],
        }  # fmt: skip
        (out / "quant.json").write_text(json.dumps(found, indent=1))
    drift.draw(
        {name: found["bundles"][name]["drift"] for name in ("int8", "int4", "mixed")},
        out / "drift.png",
    )


if __name__ == "__main__":
    main()
