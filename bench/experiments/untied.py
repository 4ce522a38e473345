"""Whether a model with a head of its own learns to open the latent loop as a tied one does.

The embedded model is tuned twice on the same samples: as it is, and with a head that begins as a
copy of the embedding and is a matrix of its own from then on.

    python -m lvr_lite.bench.experiments.untied --out build/untied --page docs/results/tuning.md
"""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

from safetensors.torch import load_file, save_file

from lvr_lite.bench.experiments.runner import (
    Out,
    Page,
    Seeds,
    launch,
    once,
    overrides,
    publish,
    read_json,
    table,
    write_results,
)
from lvr_lite.model.checkpoint import resolve

RECIPE = Path(str(resources.files("lvr_lite"))) / "toy" / "recipe.yaml"
TITLES = ("head", "seed", "answers that looked", "accuracy", "95 % interval", "n")


def untied_base(folder: Path) -> Path:
    """The embedded model's folder with a head that is a matrix of its own."""
    if folder.is_dir():
        return folder
    shutil.copytree(resolve("tiny"), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    config["text_config"]["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    file = folder / "model.safetensors"
    weights = load_file(str(file))
    (table_name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights["lm_head.weight"] = weights[table_name].clone()
    save_file(weights, str(file), metadata={"format": "pt"})
    return folder


def main(
    out: Out = Path("build/untied"),
    seeds: Seeds = "0",
    steps: int = 500,
    limit: int = 500,
    page: Page = None,
) -> None:
    bases = {"tied": "tiny", "its own": str(untied_base(out / "base"))}
    results: list[dict[str, object]] = []
    for seed in seeds.split(","):
        for head, base in bases.items():
            tuned = out / f"{head.replace(' ', '-')}-{seed}"
            settings = overrides(
                f"train.steps={steps}",
                f"train.eval_every={steps}",
                f"train.save_every={steps}",
                f"train.seed={seed}",
            )
            source = ("--model", base, "--data", "scenes", "--config", RECIPE)
            log = out / "log.txt"
            once(tuned / "metrics.json", "finetune", *source, "--out", tuned, *settings, log=log)
            file = out / f"{tuned.name}.json"
            once(file, "eval", tuned, "--limit", limit, "--skills", 0, "--json", file, log=log)
            score = read_json(file)
            kept = ("looked", "accuracy", "interval", "n")
            results.append({"head": head, "seed": seed} | {name: score[name] for name in kept})
    write_results(out / "untied.json", {"steps": steps, "models": results})
    rows = [[line(value) for value in result.values()] for result in results]
    publish(f"{steps} steps.\n\n{table(TITLES, rows)}", page, "untied heads")


def line(value: object) -> str:
    if isinstance(value, list):
        return " – ".join(f"{bound:.3f}" for bound in value)
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)


if __name__ == "__main__":
    launch(main, __doc__)
