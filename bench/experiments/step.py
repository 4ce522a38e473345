"""What a step of each method costs with gradient checkpointing, against plain QLoRA on the same
sequence; and what drawing a token costs beside the head.

Multiply-adds are counted of the language model alone, on one picture of `--visual` tokens; seconds
are of whole steps on the same batch, interleaved.

    python -m lvr_lite.bench.experiments.step --out build/step --page docs/results/step.md
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lvr_lite.bench.experiments.runner import (
    Out,
    Page,
    Rounds,
    launch,
    publish,
    table,
    write_results,
)
from lvr_lite.config import Settings, load_settings
from lvr_lite.data.sources import Item, open_source
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint, resolve
from lvr_lite.train.batches import Collator
from lvr_lite.train.load import adapted, load_base
from lvr_lite.train.sft import LatentSFT

METHODS = ("sft", "dummy", "lvr", "lvr-free", "lvr-bottleneck")
BOX = ((0.1, 0.2, 0.6, 0.5),)
# Ids of Qwen2.5-VL, and answers that are drawn at once.
VOCABULARY = 151_936
ROWS = 8


def settings_of(method: str) -> Settings:
    return load_settings(
        None,
        [f"latent.method={method}", "latent.steps=4", "latent.samples=all", "train.precision=fp32"],
    )


def item_of(visual: int) -> tuple[Checkpoint, Item]:
    """The embedded model, and a scene that takes so many visual tokens (a square number)."""
    side = round(visual**0.5) * 28
    checkpoint = read_checkpoint(resolve("tiny"))
    processor = checkpoint.processor.with_max_pixels(side * side)
    sample, (picture,) = open_source("scenes", "train", 0, 1)[0]
    item = (replace(sample, boxes=sample.boxes or BOX), (picture.resize((side, side)),))
    return replace(checkpoint, processor=processor), item


def step_of(checkpoint: Checkpoint, item: Item, method: str) -> tuple[LatentSFT, Any]:
    settings = settings_of(method)
    model = adapted(load_base(checkpoint, torch.float32, "cpu", settings), checkpoint, settings)
    sft = LatentSFT(model.train(), checkpoint.processor.tokens, settings.latent)
    return sft, Collator(checkpoint, settings.latent)([item])


def multiply_adds(sft: LatentSFT, batch: Any) -> int:
    """Of one step of the language model: those of the tower are counted apart and taken off."""
    # The counter knows no fused attention of CPUs.
    sft.core.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as whole:
        sft(**batch)["loss"].backward()
    with FlopCounterMode(display=False) as tower, torch.no_grad():
        sft.core.model.get_image_features(batch["pixel_values"], batch["grid_thw"])
    sft.core.set_attn_implementation("sdpa")
    return int(whole.get_total_flops() - tower.get_total_flops()) // 2


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def one_step(sft: LatentSFT, batch: Any) -> None:
    sft.model.zero_grad(set_to_none=True)
    sft(**batch)["loss"].backward()


def drawing(rounds: int) -> dict[str, float]:
    """Milliseconds of the head at VOCABULARY ids, of head and drawing, and of one layer of a 3B."""
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    config = Qwen2_5_VLTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=2,
    )
    model = Qwen2_5_VLTextModel(config).eval()
    head = torch.nn.Linear(config.hidden_size, VOCABULARY, bias=False)
    head.requires_grad_(False)
    states = torch.randn(ROWS, config.hidden_size)
    closed = [[5, 6, 7]] * ROWS
    at = np.linspace(0, 0.99, ROWS).tolist()
    positions = torch.zeros(3, ROWS, 1, dtype=torch.long)
    found: dict[str, list[float]] = {"layer": [], "head": [], "draw": []}
    with torch.inference_mode():
        for _ in range(rounds):
            read = partial(model, inputs_embeds=states[:, None], position_ids=positions)
            found["layer"].append(seconds(read))
            found["head"].append(seconds(partial(head, states)))
            draw = partial(TorchRuntime.drawn, head(states), closed, at, 1.0, 1.0)
            found["draw"].append(seconds(draw))
    return {name: 1e3 * statistics.median(values) for name, values in found.items()}


def main(
    out: Out = Path("build/step"), visual: int = 1024, rounds: Rounds = 5, page: Page = None
) -> None:
    torch.set_num_threads(1)
    checkpoint, item = item_of(visual)
    steps = {method: step_of(checkpoint, item, method) for method in METHODS}
    work = {method: multiply_adds(*step) for method, step in steps.items()}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(rounds + 1):
        for method in METHODS[:: 1 if number % 2 else -1]:
            taken = seconds(partial(one_step, *steps[method]))
            # The first round warms up.
            if number:
                times[method].append(taken)
    drawn = drawing(rounds)
    middle = {method: statistics.median(values) for method, values in times.items()}
    write_results(
        out / "step.json",
        {"visual": visual, "work": work, "seconds": times, "draw_ms": drawn},
        threads=1,
    )
    rows = [
        (
            f"`{method}`",
            f"{work[method] / 1e9:.2f}",
            f"{work[method] / work['sft']:.3f}",
            f"{middle[method]:.2f}",
            f"{middle[method] / middle['sft']:.2f}",
        )
        for method in METHODS
    ]
    titles = ("method", "10⁹ multiply-adds", "of `sft`", "s/step", "of `sft`")
    rollout = 36 * drawn["layer"] + drawn["head"]
    text = (
        f"{visual} visual tokens, K = 4, gradient checkpointing, fp32, one thread.\n\n"
        f"{table(titles, rows)}\n\n"
        f"Drawing {ROWS} tokens of {VOCABULARY:,} ids takes {drawn['draw']:.1f} ms; a step of a 3B "
        f"for them (36 layers and the head) {rollout:.0f} ms: {drawn['draw'] / rollout:.1%}."
    )
    publish(text, page, "steps")


if __name__ == "__main__":
    launch(main, __doc__)
