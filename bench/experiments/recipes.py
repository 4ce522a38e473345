"""The recipes by card (configs/cards) on every family: peaks of live tensors, and what is left.

    python -m lvr_lite.bench.experiments.recipes --page docs/results/memory.md

Traced on the simulated card, without weights and without a card.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from lvr_lite.bench.experiments.runner import ROOT, Page, launch, publish, table, write_results
from lvr_lite.config import load_settings
from lvr_lite.export.synthetic import shape_of
from lvr_lite.train.memory import GIB, trace_finetune

CARDS = (8, 12, 16, 24)
FAMILIES = "qwen2-vl-2b,qwen2.5-vl-3b,qwen3-vl-2b,smolvlm-500m,smolvlm-2.2b"
TITLES = ("card, GB", "model", "visual tokens", "peak at", "tensors, GiB", "card, GiB", "room")


def recipe_of(gb: int) -> Path:
    return ROOT / "configs" / "cards" / f"{gb}gb.yaml"


def main(
    models: str = FAMILIES,
    cards: str = ",".join(map(str, CARDS)),
    page: Page = None,
    out: Path | None = None,
) -> None:
    warnings.filterwarnings("ignore")
    rows: list[list[object]] = []
    for gb in map(int, cards.split(",")):
        settings = load_settings(recipe_of(gb))
        for model in models.split(","):
            trace = trace_finetune(shape_of(model), settings)
            room = 1 - trace.card / (gb * GIB)
            sizes = [f"{trace.tensors / GIB:.2f}", f"{trace.card / GIB:.2f}", f"{room:.0%}"]
            rows.append([gb, model, trace.tokens.visual, trace.phase, *sizes])
            print(rows[-1], flush=True)
    publish(table(TITLES, rows), page, "recipes")
    if out is not None:
        write_results(out, {"rows": rows})


if __name__ == "__main__":
    launch(main, __doc__)
