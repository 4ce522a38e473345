"""`--plan`: what a training run will need of a GPU, what fits on which card, and what to lower.

May import: the standard library and all that stands above `train`, and of it `memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from lvr_lite.config import Settings
from lvr_lite.files import JsonObject
from lvr_lite.train.memory import (
    CONTEXT,
    GIB,
    MIB,
    SLACK,
    WORKSPACE,
    Need,
    Shape,
    Stage2,
    Tokens,
    latents,
    need,
    parameters,
    passes,
    phase_bytes,
    sample,
    saved_bytes,
    shape_of,
    standing_bytes,
    trained,
)

# GiB.
CARDS = (8.0, 12.0, 16.0, 24.0)
VISUAL_TOKENS = (64, 256, 512, 1024, 2048)
# Visual tokens of a picture that are still worth training on, and that the models take.
FEWEST = 64
MOST = 16384
LOWEST_RANK = 4


@dataclass(frozen=True)
class Choice:
    """Settings, and how they were reached.

    visual: visual tokens of a picture.
    overrides: the `--set` values that lead here from the settings that were asked for.
    """

    settings: Settings
    visual: int
    overrides: tuple[str, ...] = ()

    def need(self, shape: Shape) -> int:
        """Bytes of a card."""
        return need(shape, self.settings, sample(self.settings, self.visual)).card

    def fits(self, shape: Shape, gib: float) -> bool:
        return self.need(shape) <= gib * GIB

    def train(self, **changes: Any) -> Choice:
        """The same with other `train` settings."""
        settings = replace(self.settings, train=replace(self.settings.train, **changes))
        if isinstance(settings, Stage2) and "batch" in changes:
            return self._to(settings, f"grpo.rows={changes['batch']}")
        named = (f"train.{key}={str(value).lower()}" for key, value in changes.items())
        return self._to(settings, *named)

    def picture(self, visual: int, pixels: int) -> Choice:
        """The same with pictures of so many visual tokens, or pixels."""
        settings = replace(self.settings, max_pixels=pixels)
        return replace(self._to(settings, f"max_pixels={pixels}"), visual=visual)

    def rank(self, rank: int) -> Choice:
        """The same with adapters of this rank."""
        settings = replace(self.settings, lora=replace(self.settings.lora, rank=rank))
        return self._to(settings, f"lora.rank={rank}")

    def _to(self, settings: Settings, *overrides: str) -> Choice:
        return Choice(settings, self.visual, self.overrides + overrides)


def largest_picture(shape: Shape, settings: Settings, gib: float) -> int:
    """Most visual tokens of a picture with which training fits a card; 0 where none does."""
    low = 0
    high = MOST + 1
    while high - low > 1:
        middle = (low + high) // 2
        if Choice(settings, middle).fits(shape, gib):
            low = middle
        else:
            high = middle
    return low


# A lever lowers one setting: it gives the lower values, the mildest first.
Lever = Callable[[Shape, Choice, float], list[Choice]]


def _checkpointing(_: Shape, choice: Choice, __: float) -> list[Choice]:
    if choice.settings.train.gradient_checkpointing:
        return []
    return [choice.train(gradient_checkpointing=True)]


def _batch(_: Shape, choice: Choice, __: float) -> list[Choice]:
    """Smaller batches, and more of them: as many samples a step."""
    batch = choice.settings.train.batch
    samples = batch * choice.settings.train.accumulation
    smaller = [b for b in range(batch - 1, 0, -1) if samples % b == 0]
    return [choice.train(batch=b, accumulation=samples // b) for b in smaller]


def _max_pixels(shape: Shape, choice: Choice, gib: float) -> list[Choice]:
    visual = max(FEWEST, largest_picture(shape, choice.settings, gib))
    if visual >= choice.visual:
        return []
    return [choice.picture(visual, visual * shape.pixels_per_token)]


def _optimizer(_: Shape, choice: Choice, __: float) -> list[Choice]:
    if choice.settings.train.optimizer in ("paged_adamw_8bit", "sgd"):
        return []
    return [choice.train(optimizer="paged_adamw_8bit")]


def _rank(_: Shape, choice: Choice, __: float) -> list[Choice]:
    halves = (choice.settings.lora.rank >> n for n in range(1, 13))
    return [choice.rank(rank) for rank in halves if rank >= LOWEST_RANK]


# What costs least first.
LEVERS: tuple[Lever, ...] = (_checkpointing, _batch, _max_pixels, _optimizer, _rank)


def lowered(shape: Shape, settings: Settings, visual: int, gib: float) -> Choice:
    """What trains pictures of `visual` tokens on a card of so many GiB.

    These settings where they fit already; else the first change that is enough alone; else the
    first changes that are enough together. Where none are: all of them, though it does not fit.
    """
    choice = Choice(settings, visual)
    if choice.fits(shape, gib):
        return choice
    for lever in LEVERS:
        for lower in lever(shape, choice, gib):
            if lower.fits(shape, gib):
                return lower
    for lever in LEVERS:
        choices = lever(shape, choice, gib)
        for lower in choices:
            if lower.fits(shape, gib):
                return lower
        if choices and choices[-1].need(shape) < choice.need(shape):
            choice = choices[-1]
    return choice


def plan(
    model: str,
    config: JsonObject,
    max_pixels: int,
    settings: Settings,
    gib: float | None = None,
) -> JsonObject:
    """The whole plan, ready for JSON (schema lvr-lite/plan); bytes throughout.

    max_pixels: the model's own, where the settings name none.
    gib: of one card; None takes CARDS.
    """
    shape = shape_of(config)
    visual = (settings.max_pixels or max_pixels) // shape.pixels_per_token
    tokens = sample(settings, visual)
    needed = need(shape, settings, tokens)
    return {
        "schema": "lvr-lite/plan",
        "version": 1,
        "model": model,
        "settings": settings.to_json(),
        "shape": asdict(shape),
        "parameters": parameters(shape) | {"trained": sum(trained(shape, settings.lora.rank))},
        "tokens": asdict(tokens) | {"latents": latents(settings, tokens), "pictures": 1},
        "stays": standing_bytes(shape, settings),
        "phases": phase_bytes(shape, settings, tokens),
        "tensors": needed.tensors,
        "phase": needed.phase,
        "paged": needed.paged,
        "workspace": WORKSPACE,
        "context": CONTEXT,
        "slack": SLACK,
        "card": needed.card,
        "pictures": [_with_picture(shape, settings, v) for v in sorted({*VISUAL_TOKENS, visual})],
        "cards": [_on_card(shape, settings, visual, g) for g in (CARDS if gib is None else (gib,))],
        "notes": _notes(settings, tokens, needed),
    }


def _with_picture(shape: Shape, settings: Settings, visual: int) -> JsonObject:
    """What pictures of so many visual tokens need, with gradient checkpointing and without."""
    row: JsonObject = {
        "visual_tokens": visual,
        "max_pixels": visual * shape.pixels_per_token,
    }
    for name, on in (("checkpointing", True), ("plain", False)):
        other = Choice(settings, visual).train(gradient_checkpointing=on).settings
        tokens = sample(other, visual)
        needed = need(shape, other, tokens)
        row[name] = {
            "saved": saved_bytes(shape, other, tokens),
            "tensors": needed.tensors,
            "card": needed.card,
        }
    return row


def _on_card(shape: Shape, settings: Settings, visual: int, gib: float) -> JsonObject:
    """What a card makes of it. lower: `--set` values; lower_card: what it needs with them."""
    choice = lowered(shape, settings, visual, gib)
    fits = choice.fits(shape, gib)
    return {
        "gib": gib,
        "fits": not choice.overrides and fits,
        "largest_visual_tokens": largest_picture(shape, settings, gib),
        "lower": list(choice.overrides),
        "lower_card": choice.need(shape),
        "lower_fits": fits,
    }


def _notes(settings: Settings, tokens: Tokens, needed: Need) -> list[str]:
    train = settings.train
    latent = settings.latent
    notes = [
        f"counted for one picture, {tokens.text} tokens of text and {tokens.answer} of answer "
        "a sample; on one card"
    ]
    if latent.runs_freely and train.gradient_checkpointing:
        runs = passes(settings, tokens)
        once = tokens.visual + tokens.text + latents(settings, tokens) + 2 + tokens.answer
        times = sum(one.columns for one in runs) / once
        notes.append(
            f"time: {latent.method} with gradient checkpointing keeps no K/V cache and reads all "
            f"again for each latent: {len(runs)} passes, {times:.1f} times the work and the kept "
            "inputs of one; train.gradient_checkpointing=false reads once"
        )
    if latent.targets == "all":
        notes.append(
            "latent.targets=all: counted with the most latents that a sample may have, "
            f"{latents(settings, tokens)}"
        )
    if isinstance(settings, Stage2):
        notes.append(
            f"stage 2: {train.batch} answers are drawn, or scored, at once (grpo.rows), "
            "each as long as it may be (grpo.max_tokens)"
        )
    elif train.batch > 1:
        notes.append(
            "train.batch above 1 is counted as padded: "
            "keys and values are then repeated for every query head"
        )
    if needed.paged:
        notes.append(
            f"{needed.paged / MIB:,.0f} MiB of optimizer states are paged: they move to the host "
            "where the card is full, and are not counted"
        )
    notes.append(
        f"{CONTEXT / MIB:.0f} MiB of CUDA context and {SLACK:.0%} of allocator slack are "
        "estimates; a desktop on the same card takes its own share"
    )
    return notes
