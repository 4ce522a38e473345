"""Export and quantization of models of real size on a small machine: time, peak memory, bytes.

    python -m lvr_lite.bench.experiments.real_size --out build/real-size --shape qwen2-vl-2b

Makes a checkpoint of that shape with random weights in bf16, exports it with `lvr-lite export` in a
process of its own, and runs the bundle with `lvr-lite run`; writes OUT/SHAPE-PRECISION.json.
--calibration is of int4; scenes, as `export` has it by default, takes longer.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lvr_lite.bench.experiments.runner import Out, launch, read_json, run, write_results
from lvr_lite.export.synthetic import SyntheticWeights, shape_of
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.model.weight_files import INDEX
from lvr_lite.toy.make import scene_samples


def make_checkpoint(shape: str, folder: Path) -> None:
    """Random weights in bf16, a file for each layer."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = shape_of(shape)
    weights = SyntheticWeights(checkpoint)
    groups: dict[str, list[str]] = {}
    for name, _ in weights.model.named_parameters():
        parts = name.split(".")
        layer = next((part for part in parts if part.isdigit()), "rest")
        groups.setdefault(f"{parts[1]}-{layer}", []).append(name)
    places: dict[str, str] = {}
    for i, group in enumerate(groups.values()):
        tensors = {name: weights[name].to(torch.bfloat16) for name in group}
        file = f"model-{i:05}.safetensors"
        save_file(tensors, folder / file)
        places |= dict.fromkeys(group, file)
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8"
    )
    config = {**checkpoint.config, "eos_token_id": checkpoint.processor.tokens.end[0]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    checkpoint.processor.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(checkpoint.processor.template, encoding="utf-8")
    image = checkpoint.processor.image
    preprocessor = {
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "min_pixels": image.min_pixels,
        "max_pixels": image.max_pixels,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    read_checkpoint(folder)


def answer(out: Path, bundle: Path) -> float:
    """Peak RSS of one answer to a question about a picture of 448 px, in MiB."""
    sample, image = next(iter(scene_samples(1, 0, "test")))
    picture = out / "picture.png"
    image.resize((448, 448)).save(picture)
    report = out / "run.json"
    question = (picture, sample.question, "--max-tokens", 8)
    run(
        "run",
        bundle,
        *question,
        "--json",
        report,
        log=out / "log.txt",
    )
    return float(read_json(report)["peak_rss_mb"])


def main(
    out: Out,
    shape: str = "qwen2-vl-2b",
    precision: str = "int4",
    calibration: str = "none",
) -> None:
    checkpoint = out / shape
    bundle = out / f"{shape}-{precision}"
    if not (checkpoint / "preprocessor_config.json").is_file():
        make_checkpoint(shape, checkpoint)
    began = time.time()
    how = ["--precision", precision]
    if precision == "int4":
        how += ["--calibration", calibration]
    lines = run(
        "export",
        checkpoint,
        bundle,
        *how,
        log=out / "log.txt",
    ).splitlines()
    seconds = round(time.time() - began)
    manifest = Bundle.open(bundle, check=False).manifest
    sizes = {name: graph.bytes for name, graph in manifest.graphs.items()}
    embedding = manifest.decoder.vocab_size * manifest.decoder.hidden_size
    weights = read_json(bundle / "report.json")["graphs"]["decoder"]["weights"]
    measured = {
        "shape": shape,
        "precision": precision,
        "seconds": seconds,
        # Of what it printed, with its peak memory.
        "lines": lines[-8:],
        "bytes": sizes,
        "language_bytes": sum(n for name, n in sizes.items() if name != "vision_encoder"),
        "language_fp16_bytes": 2 * (weights + embedding),
        "run_peak_rss_mb": answer(out, bundle),
    }
    write_results(out / f"{bundle.name}.json", measured)
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    launch(main, __doc__)
