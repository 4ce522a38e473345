"""Export and quantization of models of real size on a small machine: time, peak memory, bytes.

    python docs/results/real_size.py --out build/real-size --shape qwen2-vl-2b --precision int4

Makes a checkpoint of that shape with random weights in bf16, exports it with `lvr-lite export` in a
process of its own, and runs the bundle with `lvr-lite run`; writes OUT/SHAPE-PRECISION.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lvr_lite.export.synthetic import SyntheticWeights, shape_of
from lvr_lite.model.bundle import read_manifest
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.toy.make import scene_samples


def make_checkpoint(shape: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = shape_of(shape)
    weights = SyntheticWeights(made)
    names = [name for name, _ in weights.model.named_parameters()]
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((p for p in parts if p.isdigit()), "rest")
        groups.setdefault(f"{parts[1]}-{number}", []).append(name)
    for i, group in enumerate(groups.values()):
        save_file(
            {name: weights[name].to(torch.bfloat16) for name in group},
            str(folder / f"model-{i:05}.safetensors"),
        )
    (folder / "config.json").write_text(
        json.dumps({**made.config, "eos_token_id": made.tokens.end[0]})
    )
    made.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(made.template)
    spec = made.image_spec
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_mean": spec["mean"],
                "image_std": spec["std"],
                "min_pixels": spec["min_pixels"],
                "max_pixels": spec["max_pixels"],
            }
        )
    )
    read_checkpoint(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="qwen2-vl-2b")
    parser.add_argument("--precision", default="int4")
    parser.add_argument(
        "--calibration",
        default="none",
        help="of int4; scenes, as export does by default, takes longer",
    )
    options = parser.parse_args()
    checkpoint, bundle = (
        options.out / options.shape,
        options.out / f"{options.shape}-{options.precision}",
    )
    if not (checkpoint / "preprocessor_config.json").is_file():
        make_checkpoint(options.shape, checkpoint)
    began = time.time()
    command = [
        sys.executable,
        "-m",
        "lvr_lite",
        "export",
        str(checkpoint),
        str(bundle),
        "--precision",
        options.precision,
    ]
    if options.precision == "int4":
        command += ["--calibration", options.calibration]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = round(time.time() - began)
    print(done.stderr)
    if done.returncode:
        sys.exit(done.returncode)
    picture = options.out / "picture.png"
    sample, image = next(iter(scene_samples(1, 0, "test")))
    image.resize((448, 448)).save(picture)
    run_json = options.out / "run.json"
    line = [
        sys.executable,
        "-m",
        "lvr_lite",
        "run",
        str(bundle),
        str(picture),
        sample.question,
        "--max-tokens",
        "8",
        "--json",
        str(run_json),
    ]
    subprocess.run(line, check=True, capture_output=True)
    manifest = read_manifest(bundle, check=False)
    sizes = {name: graph.bytes for name, graph in manifest.graphs.items()}
    table, decoder = (
        manifest.decoder["vocab_size"] * manifest.decoder["hidden_size"],
        json.loads((bundle / "report.json").read_text())["graphs"]["decoder"],
    )
    result = {
        "shape": options.shape, "precision": options.precision, "seconds": seconds, "said": done.stderr.strip().splitlines()[-8:],
        "bytes": sizes, "language_bytes": sum(v for k, v in sizes.items() if k != "vision_encoder"),
        "language_fp16_bytes": 2 * (decoder["weights"] + table), "run_peak_rss_mb": json.loads(run_json.read_text())["peak_rss_mb"],
    }  # fmt: skip
    (options.out / f"{options.shape}-{options.precision}.json").write_text(
        json.dumps(result, indent=1)
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
