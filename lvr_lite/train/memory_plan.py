"""`--plan`: what a training run will need of a GPU, what fits on which card, and what to lower.

May import: all that stands above `train`, and of it `memory`.

What was asked for is traced whole. Other sizes of pictures and lower settings are traced twice,
with SHALLOW layers: identical layers take identical bytes, so a phase's peak goes with their
number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lvr_lite.config import Settings
from lvr_lite.files import JsonObject
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.train.memory import (
    CONTEXT,
    GIB,
    MIB,
    SLACK,
    WORKSPACE,
    Trace,
    card_of,
    most_visual_tokens,
    trace_finetune,
    trace_grpo,
)

# GiB.
CARDS = (8.0, 12.0, 16.0, 24.0)
VISUAL_TOKENS = (64, 256, 512, 1024, 2048)
# Visual tokens of a picture that are still worth training on, and that the models take.
FEWEST = 64
MOST = 16384
LOWEST_RANK = 4
# Layers of the language model in traces of other sizes; Qwen3-VL adds features after three.
SHALLOW = (3, 4)
# Visual tokens of these traces: bytes are a polynomial of the second degree in their number.
TRACED_AT = (64, 512, 1536)
VISION = "vision tower, norms and biases"


@dataclass(frozen=True)
class Plan:
    """What is planned.

    checkpoint: with its own size of pictures.
    stage: 1 for `finetune`, 2 for `grpo`.
    whole: the trace of what was asked for.
    """

    checkpoint: Checkpoint
    stage: int
    whole: Trace
    known: dict[Settings, Estimate]

    def trace(self, checkpoint: Checkpoint, settings: Settings) -> Trace:
        trace = trace_finetune if self.stage == 1 else trace_grpo
        return trace(checkpoint, settings)

    def estimate(self, settings: Settings) -> Estimate:
        """What these settings need, whatever the size of pictures."""
        key = replace(settings, max_pixels=None)
        if key not in self.known:
            self.known[key] = Estimate.of(self, key)
        return self.known[key]

    def pixels(self, visual: int) -> int:
        """The largest area whose pictures have so many visual tokens at most."""
        processor = self.checkpoint.processor
        side = processor.image.token_side
        low = side * side
        high = 4 * (visual + 1) * side * side
        while high - low > side * side // 16:
            middle = (low + high) // 2
            if most_visual_tokens(processor.with_max_pixels(middle)) <= visual:
                low = middle
            else:
                high = middle
        return low


@dataclass(frozen=True)
class Estimate:
    """Bytes of each phase, and those that wait for the backward pass, by visual tokens: the
    coefficients of polynomials.
    """

    phases: dict[str, np.ndarray]
    saved: np.ndarray

    @classmethod
    def of(cls, plan: Plan, settings: Settings) -> Estimate:
        visual: list[int] = []
        traces: list[tuple[dict[str, float], float]] = []
        for tokens in TRACED_AT:
            sized = replace(settings, max_pixels=plan.pixels(tokens))
            few, more = (plan.trace(shallow(plan.checkpoint, n), sized) for n in SHALLOW)
            visual.append(few.tokens.visual)
            traces.append(_deepened(few, more, plan))
        names = traces[0][0]
        degree = len(set(visual)) - 1
        return cls(
            {
                name: np.polyfit(visual, [peaks[name] for peaks, _ in traces], degree)
                for name in names
            },
            np.polyfit(visual, [saved for _, saved in traces], degree),
        )

    def tensors(self, visual: int) -> int:
        """The most that is alive at once, with cuBLAS's workspace."""
        most = max(float(np.polyval(phase, visual)) for phase in self.phases.values())
        return int(most) + WORKSPACE


def shallow(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The same model with so many layers in its language model, and few in its vision tower."""
    config = copy.deepcopy(checkpoint.config)
    text = config.get("text_config", config)
    text["num_hidden_layers"] = min(layers, text["num_hidden_layers"])
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:layers]
    vision = config["vision_config"]
    inner = len(vision.get("deepstack_visual_indexes", ()))
    depth = max(2, inner)
    vision["depth" if "depth" in vision else "num_hidden_layers"] = depth
    if inner:
        vision["deepstack_visual_indexes"] = list(range(inner))
    if "fullatt_block_indexes" in vision:
        vision["fullatt_block_indexes"] = [depth - 1]
    return replace(checkpoint, config=config)


def _deepened(few: Trace, more: Trace, plan: Plan) -> tuple[dict[str, float], float]:
    """Peaks by phase, and `saved`, of the whole model, from two that have fewer layers."""
    config = plan.checkpoint.config
    layers = config.get("text_config", config)["num_hidden_layers"]
    times = int(layers) - SHALLOW[0]

    def deeper(one: float, other: float) -> float:
        return one + (other - one) * times

    towers = plan.whole.stays[VISION] - deeper(few.stays[VISION], more.stays[VISION])
    peaks = {name: deeper(few.phases[name], more.phases[name]) + towers for name in few.phases}
    return peaks, deeper(few.saved, more.saved)


@dataclass(frozen=True)
class Choice:
    """Settings, and how they were reached.

    visual: visual tokens of a picture.
    overrides: the `--set` values that lead here from the settings that were asked for.
    """

    plan: Plan
    settings: Settings
    visual: int
    overrides: tuple[str, ...] = ()

    def need(self) -> int:
        """Bytes of a card."""
        if not self.overrides and self.visual == self.plan.whole.tokens.visual:
            return self.plan.whole.card
        return card_of(self.plan.estimate(self.settings).tensors(self.visual))

    def fits(self, gib: float) -> bool:
        return self.need() <= gib * GIB

    def train(self, **changes: Any) -> Choice:
        """The same with other `train` settings."""
        settings = replace(self.settings, train=replace(self.settings.train, **changes))
        named = (f"train.{key}={str(value).lower()}" for key, value in changes.items())
        return self._to(settings, *named)

    def rows(self, rows: int) -> Choice:
        """The same with so many answers at once."""
        settings = replace(self.settings, grpo=replace(self.settings.grpo, rows=rows))
        return self._to(settings, f"grpo.rows={rows}")

    def picture(self, visual: int) -> Choice:
        """The same with pictures of so many visual tokens."""
        pixels = self.plan.pixels(visual)
        settings = replace(self.settings, max_pixels=pixels)
        return replace(self._to(settings, f"max_pixels={pixels}"), visual=visual)

    def rank(self, rank: int) -> Choice:
        """The same with adapters of this rank."""
        settings = replace(self.settings, lora=replace(self.settings.lora, rank=rank))
        return self._to(settings, f"lora.rank={rank}")

    def _to(self, settings: Settings, *overrides: str) -> Choice:
        return replace(self, settings=settings, overrides=self.overrides + overrides)


def largest_picture(choice: Choice, gib: float) -> int:
    """Most visual tokens of a picture with which training fits a card; 0 where none does."""
    estimate = choice.plan.estimate(choice.settings)
    low = 0
    high = MOST + 1
    while high - low > 1:
        middle = (low + high) // 2
        if card_of(estimate.tensors(middle)) <= gib * GIB:
            low = middle
        else:
            high = middle
    return low


# A lever lowers one setting: it gives the lower values, the mildest first.
Lever = Callable[[Choice, float], list[Choice]]


def _checkpointing(choice: Choice, _: float) -> list[Choice]:
    if choice.settings.train.gradient_checkpointing:
        return []
    return [choice.train(gradient_checkpointing=True)]


def _batch(choice: Choice, _: float) -> list[Choice]:
    """Smaller batches, and more of them: as many samples a step. Of answers half as many."""
    if choice.plan.stage == 2:
        rows = choice.settings.grpo.rows
        return [choice.rows(rows >> n) for n in range(1, 10) if rows >> n]
    batch = choice.settings.train.batch
    samples = batch * choice.settings.train.accumulation
    smaller = [b for b in range(batch - 1, 0, -1) if samples % b == 0]
    return [choice.train(batch=b, accumulation=samples // b) for b in smaller]


def _max_pixels(choice: Choice, gib: float) -> list[Choice]:
    visual = max(FEWEST, largest_picture(choice, gib))
    if visual >= choice.visual:
        return []
    return [choice.picture(visual)]


def _optimizer(choice: Choice, _: float) -> list[Choice]:
    if choice.settings.train.optimizer in ("paged_adamw_8bit", "sgd"):
        return []
    return [choice.train(optimizer="paged_adamw_8bit")]


def _rank(choice: Choice, _: float) -> list[Choice]:
    """Stage 2 goes on with the adapter that there is."""
    if choice.plan.stage == 2:
        return []
    halves = (choice.settings.lora.rank >> n for n in range(1, 13))
    return [choice.rank(rank) for rank in halves if rank >= LOWEST_RANK]


# What costs least first.
LEVERS: tuple[Lever, ...] = (_checkpointing, _batch, _max_pixels, _optimizer, _rank)


def lowered(choice: Choice, gib: float) -> Choice:
    """What trains such pictures on a card of so many GiB.

    These settings where they fit already; else the first change that is enough alone; else the
    first changes that are enough together. Where none are: all of them, though it does not fit.
    """
    if choice.fits(gib):
        return choice
    for lever in LEVERS:
        for lower in lever(choice, gib):
            if lower.fits(gib):
                return lower
    for lever in LEVERS:
        choices = lever(choice, gib)
        for lower in choices:
            if lower.fits(gib):
                return lower
        if choices and choices[-1].need() < choice.need():
            choice = choices[-1]
    return choice


def plan(
    model: str,
    checkpoint: Checkpoint,
    settings: Settings,
    stage: int,
    gib: float | None = None,
) -> JsonObject:
    """The whole plan, ready for JSON (schema lvr-lite/plan); bytes throughout.

    checkpoint: a base for stage 1, a tuned one for stage 2; its weights are not read.
    settings: of stage 2 `lora` is that of the checkpoint.
    gib: of one card; None takes CARDS.
    """
    trace = trace_finetune if stage == 1 else trace_grpo
    whole = trace(checkpoint, settings)
    planned = Plan(checkpoint, stage, whole, {})
    asked = Choice(planned, settings, whole.tokens.visual)
    stays = sum(whole.stays.values())
    pictures = sorted({*VISUAL_TOKENS, asked.visual})
    return {
        "schema": "lvr-lite/plan",
        "version": 1,
        "model": model,
        "settings": settings.to_json(),
        "parameters": whole.parameters,
        "tokens": asdict(whole.tokens) | {"pictures": 1},
        "stays": whole.stays,
        "phases": {name: max(0, peak - stays) for name, peak in whole.phases.items()},
        "peaks": whole.phases,
        "tensors": whole.tensors,
        "phase": whole.phase,
        "paged": whole.paged,
        "workspace": WORKSPACE,
        "context": CONTEXT,
        "slack": SLACK,
        "card": whole.card,
        "pictures": [_with_picture(asked, visual) for visual in pictures],
        "cards": [_on_card(asked, size) for size in (CARDS if gib is None else (gib,))],
        "notes": _notes(asked),
    }


def _with_picture(asked: Choice, visual: int) -> JsonObject:
    """What pictures of so many visual tokens need, with gradient checkpointing and without."""
    row: JsonObject = {"visual_tokens": visual, "max_pixels": asked.plan.pixels(visual)}
    for name, on in (("checkpointing", True), ("plain", False)):
        estimate = asked.plan.estimate(asked.train(gradient_checkpointing=on).settings)
        tensors = estimate.tensors(visual)
        row[name] = {
            "saved": int(np.polyval(estimate.saved, visual)),
            "tensors": tensors,
            "card": card_of(tensors),
        }
    return row


def _on_card(asked: Choice, gib: float) -> JsonObject:
    """What a card makes of it. room: bytes that are left, below 0 where it does not fit; lower:
    `--set` values; lower_card: what it needs with them.
    """
    choice = lowered(asked, gib)
    return {
        "gib": gib,
        "fits": asked.fits(gib),
        "room": int(gib * GIB) - asked.need(),
        "largest_visual_tokens": largest_picture(asked, gib),
        "lower": list(choice.overrides),
        "lower_card": choice.need(),
        "lower_fits": choice.fits(gib),
    }


def _notes(asked: Choice) -> list[str]:
    tokens = asked.plan.whole.tokens
    settings = asked.settings
    notes = [
        f"traced for one picture, {tokens.text} tokens of text and {tokens.answer} of answer "
        "a sample; on one card"
    ]
    if settings.latent.targets == "all" and asked.plan.stage == 1:
        notes.append(
            "latent.targets=all: traced with the most latents that a sample may have, "
            f"{tokens.latents}"
        )
    if asked.plan.stage == 2:
        notes.append(
            f"stage 2: {settings.grpo.rows} answers are drawn, or scored, at once (grpo.rows), "
            "each as long as it may be (grpo.max_tokens)"
        )
    if asked.plan.whole.paged:
        notes.append(
            f"{asked.plan.whole.paged / MIB:,.0f} MiB of optimizer states are paged: they move to "
            "the host where the card is full, and are not counted"
        )
    few, more = SHALLOW
    notes.append(
        f"other pictures and lower settings are traced with {few} and {more} layers, and carried "
        "on to all"
    )
    notes.append(
        f"{CONTEXT / MIB:.0f} MiB of CUDA context and {SLACK:.0%} of allocator slack are "
        "estimates; a desktop on the same card takes its own share"
    )
    return notes
