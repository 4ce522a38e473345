"""What a fine-tuning run will need of a GPU, said before it runs. May import: the core, rich; no
torch, and no weights are read.

    peak = what stays (weights, adapters, optimizer; gradients while accumulating)
         + the largest of: seeing, head, backward, optimizer's step, answering held-out questions

Bytes are counted tensor by tensor as transformers, PEFT and bitsandbytes make them under bf16
autocast; tests/train/test_plan.py holds the parameters against built models and the saved
activations against what autograd saves, docs/results/memory.py the peak against a card.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lvr_lite.config import Settings
from lvr_lite.errors import BundleError
from lvr_lite.model.spec import LatentSpec

MIB, GIB = 2**20, 2**30
CARDS = (8.0, 12.0, 16.0, 24.0)  # GiB
VISUAL_TOKENS = (64, 256, 512, 1024, 2048)
TEXT_TOKENS, ANSWER_TOKENS = (
    64,
    16,
)  # of a question with its template, and of an answer with its end
EVAL_ROWS = 16  # held-out questions answered together (lvr_lite/eval/suite.py)
MARKERS = 3
COUNTED = ("qwen2_5_vl", "qwen2_vl")  # the other families' tensors have not been counted yet
# cuBLAS's workspace, which torch takes from its own allocator: 8 MiB, on Hopper 32
# (CublasHandlePool.cpp).
# bitsandbytes has none that lasts: a linear's weight is dequantized into a tensor, which is counted
# below.
WORKSPACE = 32 * MIB
# What torch does not count, both estimates until docs/results/memory.py has measured them on a
# card: the CUDA context with the kernels of
# torch, cuBLAS and bitsandbytes (CUDA 12, loaded lazily), and what the caching allocator holds
# beside live tensors.
CONTEXT = 512 * MIB
SLACK = 0.05


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, all read from its config.json. vision_gated: Qwen2.5-VL's blocks (RMS
    norms, gated MLP), else Qwen2-VL's.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    vision_depth: int
    vision_hidden: int
    vision_intermediate: int
    vision_gated: bool
    patch: int
    temporal: int
    channels: int
    merge: int

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def pixels_per_token(self) -> int:
        return (self.patch * self.merge) ** 2

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of the linears of one text layer: q, k, v, o, gate, up, down. All are in 4 bits
        and adapted.
        """
        h, i = self.hidden, self.intermediate
        return (
            (self.queries, h),
            (self.keys, h),
            (self.keys, h),
            (h, self.queries),
            (i, h),
            (i, h),
            (h, i),
        )


def shape_of(config: dict[str, Any]) -> Shape:
    """The Shape of a config.json (text sizes at its top or under `text_config`). Raises BundleError
    naming what is missing.
    """
    text, vision = config.get("text_config", config), config.get("vision_config")
    if (kind := config.get("model_type", COUNTED[0])) not in COUNTED:
        raise BundleError(
            f"--plan counts {' and '.join(COUNTED)} so far, not {kind}: tune without it and watch the peak in metrics.json"
        )
    try:
        if vision is None:
            raise KeyError("vision_config")
        gated = (
            "embed_dim" not in vision
        )  # Qwen2-VL calls its width embed_dim, and hidden_size what the projector gives
        width = vision["hidden_size"] if gated else vision["embed_dim"]
        return Shape(
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            vocab=text["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vision_depth=vision["depth"],
            vision_hidden=width,
            vision_intermediate=vision["intermediate_size"]
            if gated
            else int(width * vision["mlp_ratio"]),
            vision_gated=gated,
            patch=vision["patch_size"],
            temporal=vision.get("temporal_patch_size", 2),
            channels=vision.get("in_channels", vision.get("in_chans", 3)),
            merge=vision["spatial_merge_size"],
        )
    except KeyError as error:
        raise BundleError(
            f"config.json: {error} is missing, so the size of the model is not known"
        ) from error


# ------------------------------------------------------------------------------------------------------------
# what stays


def parameters(shape: Shape) -> dict[str, int]:
    """Parameters by part: linears (of the text layers, in 4 bits), embedding, head (0 if tied),
    norms (and biases), vision.
    """
    s, v, i = shape, shape.vision_hidden, shape.vision_intermediate
    mlp = 3 * v * i + 2 * i + v if s.vision_gated else 2 * v * i + i + v
    norm = v if s.vision_gated else 2 * v
    block = 2 * norm + (3 * v * v + 3 * v) + (v * v + v) + mlp
    merged = v * s.merge**2
    merger = norm + merged * merged + merged + merged * s.hidden + s.hidden
    return {
        "linears": s.layers * sum(o * n for o, n in s.linears),
        "embedding": s.vocab * s.hidden,
        "head": 0 if s.tied else s.vocab * s.hidden,
        "norms": s.layers * (2 * s.hidden + s.queries + 2 * s.keys) + s.hidden,
        "vision": s.channels * s.temporal * s.patch**2 * v + s.vision_depth * block + merger,
    }


def nf4_bytes(out: int, into: int) -> int:
    """A linear in NF4 with double quantization: 4 bits a weight, one 8-bit scale a block of 64, one
    fp32 scale a block of 256 scales, and the two code books.
    """
    scales = math.ceil(out * into / 64)
    return math.ceil(out * into / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


def trained(shape: Shape, rank: int) -> list[int]:
    """Sizes of the trained tensors, all fp32: A and B of each adapter, and the rows of the three
    markers.
    """
    return [n for o, i in shape.linears for n in (rank * i, o * rank)] * shape.layers + [
        MARKERS * shape.hidden
    ]


def optimizer_bytes(optimizer: str, sizes: list[int]) -> tuple[int, int]:
    """(bytes that stay on the card, bytes in pages that may move to the host) of the optimizer's
    states for tensors of these sizes.

    bitsandbytes keeps tensors below 4096 elements in 32 bits, and pages states of 100,000 elements
    or more (optim/optimizer.py).
    """
    if optimizer == "sgd":
        return 0, 0
    stay = paged = 0
    for n in sizes:
        short = "8bit" in optimizer and n >= 4096
        states, scales = (2 * n, 8 * math.ceil(n / 256)) if short else (8 * n, 0)
        if optimizer.startswith("paged") and n >= 1e5:
            paged += states
        else:
            stay += states
        stay += scales
    return stay, paged


# ---------------------------------------------------------------------------------------------------------
# what one step makes


@dataclass(frozen=True)
class Tokens:
    """Tokens of one sample: visual (of its one picture), text (question and template), answer (with
    its end).
    """

    visual: int
    text: int = TEXT_TOKENS
    answer: int = ANSWER_TOKENS


@dataclass(frozen=True)
class Pass:
    """One run through the text layers: so many columns a sample, which look at so many keys.
    padded: attention needs a mask.
    """

    columns: int
    keys: int
    padded: bool


@dataclass(frozen=True)
class Stage2(Settings):
    """Settings of `lvr-lite grpo` as they are counted: `train.batch` is the answers that are drawn,
    or scored, at once (`grpo.rows`), whose gradients are added up. mode: the checkpoint's.
    """

    mode: str = "open"


def stage2(settings: Settings, spec: LatentSpec) -> Stage2:
    """What stage 2 on a checkpoint of these latents is counted with."""
    own = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    freely = settings.grpo.latents == "recomputed" and spec.feedback != "token"
    own["latent"] = replace(
        settings.latent, method="lvr", steps=spec.steps, targets="pooled", loss="mse", warmup=0.0
    )
    if freely:
        own["latent"] = replace(
            own["latent"], method="lvr-free" if spec.mode == "open" else "lvr-bottleneck"
        )
    own["train"] = replace(settings.train, batch=settings.grpo.rows, accumulation=2)
    return Stage2(**own, mode=spec.mode)


def sample(settings: Settings, visual: int) -> Tokens:
    """The sample that is counted: one picture of so many visual tokens."""
    return (
        Tokens(visual, answer=settings.grpo.max_tokens)
        if isinstance(settings, Stage2)
        else Tokens(visual)
    )


def width(settings: Settings) -> int:
    """Bytes of an activation: 2 (bf16, as "auto" takes on any recent card) or 4."""
    return 4 if settings.train.precision == "fp32" else 2


def latents(settings: Settings, tokens: Tokens) -> int:
    """Latent places in a response; with targets=all the most that a sample may have."""
    if settings.latent.method == "sft":
        return 0
    return (
        min(settings.latent.max_targets, tokens.visual)
        if settings.latent.targets == "all"
        else settings.latent.steps
    )


def passes(settings: Settings, tokens: Tokens) -> list[Pass]:
    """The runs through the text layers whose activations wait for the backward pass
    (lvr_lite/train/methods.py).
    """
    k, padded = latents(settings, tokens), settings.train.batch > 1
    asked = tokens.visual + tokens.text
    whole = asked + (k + 2 if k else 0) + tokens.answer
    if not settings.latent.runs_freely:
        if (
            isinstance(settings, Stage2) and settings.mode == "bottleneck"
        ):  # read once more, the latents known
            reader = tokens.text + k + tokens.answer
            return [Pass(asked + k, asked + k, padded), Pass(reader, reader, padded)]
        return [Pass(whole, whole, padded)]
    first, bottleneck = asked + 1, settings.latent.method == "lvr-bottleneck"
    steps = k - 1 if bottleneck else k
    if (
        settings.train.gradient_checkpointing
    ):  # no cache: all columns so far again at every step; the last step is part of the rest
        made = [Pass(n, n, padded) for n in range(first, first + k)]
        made += [] if bottleneck else [Pass(whole, whole, padded)]
    else:
        made = [Pass(first, first, padded)] + [
            Pass(1, first + i, padded) for i in range(1, steps + 1)
        ]
        made += [] if bottleneck else [Pass(tokens.answer + 1, whole, True)]
    reader = (
        tokens.text + k + tokens.answer
    )  # the latents stand for the picture; where two are alike, one is masked out
    return made + ([Pass(reader, reader, True)] if bottleneck else [])


def layer_bytes(shape: Shape, settings: Settings, one: Pass) -> int:
    """What autograd saves in one text layer for one pass and one sample."""
    s, w, rank = shape, width(settings), settings.lora.rank
    inputs = [i for _, i in s.linears]
    norms = 2 * (4 * s.hidden + 4)  # in fp32, with the root of the variance
    attention = w * 2 * s.queries + 4 * s.heads  # queries, result, log-sum-exp
    mlp = w * 3 * s.intermediate  # gate, its activation, up
    read = w * (
        2 * s.hidden + s.intermediate
    )  # what adapters read: both norms' results, and down's input; o reads the result above
    if settings.lora.dropout:
        read = (w + 1) * sum(inputs)  # each its own, with the mask
    adapters = w * rank * len(inputs)
    repeated = (
        one.padded and one.columns > 1
    )  # under a mask keys and values are repeated for each query head, and the mask is widened
    keys = 2 * w * (s.queries if repeated else s.keys)
    mask = w * one.columns * one.keys if repeated else 0
    return one.columns * (norms + attention + mlp + read + adapters) + one.keys * keys + mask


def head_bytes(shape: Shape, settings: Settings, tokens: Tokens) -> int:
    """What autograd saves in the head and the losses: states that speak, their log-probabilities,
    PEFT's copy of a tied embedding with the markers' rows in it, and the visual tokens which the
    latents' contrastive loss compares with.
    """
    s, w, batch = shape, width(settings), settings.train.batch
    spoken = batch * (tokens.answer + (2 if latents(settings, tokens) else 0))
    compared = 4 * batch * tokens.visual * s.hidden if settings.latent.loss == "contrastive" else 0
    spoken_bytes = w * s.hidden + 4 * s.vocab
    if isinstance(settings, Stage2):
        spoken_bytes += s.vocab  # which ids may not be chosen
    return spoken * spoken_bytes + (w * s.vocab * s.hidden if s.tied else 0) + compared


def saved_bytes(shape: Shape, settings: Settings, tokens: Tokens) -> int:
    """What autograd keeps of a batch from the forward to the backward pass, parameters apart."""
    s, w, made = shape, width(settings), passes(settings, tokens)
    copies = 0
    if settings.train.gradient_checkpointing:
        layers = s.layers * sum(w * one.columns * s.hidden for one in made)
    else:
        layers = s.layers * sum(layer_bytes(s, settings, one) for one in made)
        copies = (
            w * sum(trained(s, settings.lora.rank)[:-1]) if w < 4 else 0
        )  # autocast's, of the adapters
    ends = sum(
        one.columns
        * (4 * s.hidden + 4 + (0 if settings.train.gradient_checkpointing else 2 * w * s.head_dim))
        for one in made
    )
    return settings.train.batch * (layers + ends) + copies + head_bytes(s, settings, tokens)


def standing_bytes(shape: Shape, settings: Settings) -> dict[str, int]:
    """Bytes of what stays through the run, by part. optimizer: of its states those that are not
    paged.
    """
    counts, sizes = parameters(shape), trained(shape, settings.lora.rank)
    start = (
        {"policy at the start, fp32": 4 * sum(sizes)}
        if isinstance(settings, Stage2) and settings.grpo.beta
        else {}
    )
    return start | {
        "language model's linears, NF4": shape.layers
        * sum(nf4_bytes(*linear) for linear in shape.linears),
        "embedding and head": width(settings) * (counts["embedding"] + counts["head"]),
        "vision tower, norms and biases": width(settings) * (counts["vision"] + counts["norms"]),
        "adapters and marker rows, fp32": 4 * sum(sizes),
        "optimizer": optimizer_bytes(settings.train.optimizer, sizes)[0],
        "gradients, kept while accumulating": 4 * sum(sizes)
        if settings.train.accumulation > 1
        else 0,
    }


def phase_bytes(shape: Shape, settings: Settings, tokens: Tokens) -> dict[str, int]:
    """Bytes that each phase takes at its height, beside what stays."""
    s, w, t = shape, width(settings), settings.train
    sizes = trained(s, settings.lora.rank)
    gradients = 0 if t.accumulation > 1 else 4 * sum(sizes)  # else they stay
    seen_at_once = (
        1 if isinstance(settings, Stage2) else t.batch
    )  # pictures; those of stage 2 are seen while answers are drawn
    patches, pixels = (
        seen_at_once * tokens.visual * s.merge**2,
        s.channels * s.temporal * s.patch**2,
    )
    inputs = 4 * patches * pixels + w * t.batch * tokens.visual * s.hidden
    # Rotary positions are applied in fp32: queries, keys, their halves and products.
    seen = patches * (
        max((5 * w + 22) * s.vision_hidden, 2 * w * s.vision_hidden + 3 * w * s.vision_intermediate)
        + (2 * pixels if w < 4 else 0)
    )
    saved, matrix = saved_bytes(s, settings, tokens), w * s.vocab * s.hidden
    longest = max(passes(settings, tokens), key=lambda one: one.columns)
    layer = t.batch * longest.columns * w * (2 * s.intermediate + s.hidden) + w * max(
        o * i for o, i in s.linears
    )
    if t.gradient_checkpointing:
        layer += t.batch * layer_bytes(s, settings, longest)
    logits = (4 + w) * t.batch * (tokens.answer + 2) * s.vocab
    before_layers = saved - head_bytes(s, settings, tokens)
    return {
        "seeing the pictures": inputs
        + seen
        + matrix,  # PEFT copies the embedding whenever it is asked for its weight
        "head": inputs
        + saved
        + logits
        + (matrix if s.tied else 0),  # the gradient of a tied embedding is a whole matrix
        "backward through a layer": inputs + max(before_layers, gradients) + layer,
        "backward to the marker rows": inputs + gradients + matrix,
        "optimizer's step": inputs
        + gradients
        + (4 * sum(sizes) if t.optimizer == "adamw_torch" else 0),
        "drawing answers"
        if isinstance(settings, Stage2)
        else "answering held-out questions": _answering(s, settings, tokens),
    }


def _answering(s: Shape, settings: Settings, tokens: Tokens) -> int:
    """Evaluation during training: EVAL_ROWS prompts at once, K/V of all layers, and the widest of
    one layer's MLP without autocast, where PEFT runs the adapters in fp32.
    """
    w, asked = width(settings), tokens.visual + tokens.text
    cache = s.layers * 2 * w * s.keys * (asked + latents(settings, tokens) + tokens.answer)
    mlp = asked * ((2 * w + 8) * s.intermediate + (4 * w + (8 if w < 4 else 0)) * s.hidden)
    masks = asked * asked
    rows = settings.train.batch if isinstance(settings, Stage2) else EVAL_ROWS
    return rows * (cache + mlp + masks) + w * max(o * i for o, i in s.linears)


@dataclass(frozen=True)
class Need:
    """What a run needs, in bytes. tensors: the most that is alive at once, in `phase`; card: with
    slack and CUDA context; paged: optimizer states beside it, which move to the host where the card
    is full.
    """

    tensors: int
    phase: str
    paged: int

    @property
    def card(self) -> int:
        return int(self.tensors * (1 + SLACK)) + CONTEXT


def need(shape: Shape, settings: Settings, tokens: Tokens) -> Need:
    made = phase_bytes(shape, settings, tokens)
    phase = max(made, key=made.__getitem__)
    paged = optimizer_bytes(settings.train.optimizer, trained(shape, settings.lora.rank))[1]
    return Need(
        sum(standing_bytes(shape, settings).values()) + made[phase] + WORKSPACE, phase, paged
    )


# ------------------------------------------------------------------------------------------------------
# what fits, what to lower

FEWEST, MOST = (
    64,
    16384,
)  # visual tokens of a picture that are still worth training on, and that the models take
LOWEST_RANK = 4


@dataclass(frozen=True)
class Choice:
    """Settings, the visual tokens of a picture, and the `--set` values that led here."""

    settings: Settings
    visual: int
    said: tuple[str, ...] = ()

    def need(self, shape: Shape) -> int:
        return need(shape, self.settings, sample(self.settings, self.visual)).card

    def train(self, **changed: Any) -> Choice:
        if isinstance(self.settings, Stage2) and "batch" in changed:
            said: tuple[str, ...] = (f"grpo.rows={changed['batch']}",)
        else:
            said = tuple(f"train.{key}={str(value).lower()}" for key, value in changed.items())
        return Choice(
            replace(self.settings, train=replace(self.settings.train, **changed)),
            self.visual,
            self.said + said,
        )


def largest_picture(shape: Shape, settings: Settings, vram: float) -> int:
    """Most visual tokens of a picture with which training fits a card of `vram` GiB; 0 where none
    does.
    """
    low, high = 0, MOST + 1
    while high - low > 1:
        middle = (low + high) // 2
        if need(shape, settings, sample(settings, middle)).card <= vram * GIB:
            low = middle
        else:
            high = middle
    return low


def _checkpointing(shape: Shape, at: Choice, vram: float) -> list[Choice]:
    return (
        [] if at.settings.train.gradient_checkpointing else [at.train(gradient_checkpointing=True)]
    )


def _batch(shape: Shape, at: Choice, vram: float) -> list[Choice]:
    batch, a_step = (
        at.settings.train.batch,
        at.settings.train.batch * at.settings.train.accumulation,
    )
    return [
        at.train(batch=b, accumulation=a_step // b)
        for b in range(batch - 1, 0, -1)
        if a_step % b == 0
    ]


def _max_pixels(shape: Shape, at: Choice, vram: float) -> list[Choice]:
    visual = max(FEWEST, largest_picture(shape, at.settings, vram))
    pixels = visual * shape.pixels_per_token
    return (
        [
            Choice(
                replace(at.settings, max_pixels=pixels), visual, (*at.said, f"max_pixels={pixels}")
            )
        ]
        if visual < at.visual
        else []
    )


def _optimizer(shape: Shape, at: Choice, vram: float) -> list[Choice]:
    return (
        []
        if at.settings.train.optimizer in ("paged_adamw_8bit", "sgd")
        else [at.train(optimizer="paged_adamw_8bit")]
    )


def _rank(shape: Shape, at: Choice, vram: float) -> list[Choice]:
    ranks = [r for r in (at.settings.lora.rank >> n for n in range(1, 13)) if r >= LOWEST_RANK]
    return [
        Choice(
            replace(at.settings, lora=replace(at.settings.lora, rank=r)),
            at.visual,
            (*at.said, f"lora.rank={r}"),
        )
        for r in ranks
    ]


LEVERS = (
    _checkpointing,
    _batch,
    _max_pixels,
    _optimizer,
    _rank,
)  # what costs least first; each gives its lower values, the mildest first


def lowered(shape: Shape, settings: Settings, visual: int, vram: float) -> Choice:
    """What trains pictures of `visual` tokens on `vram` GiB: these settings where they do already,
    else the first change that is enough alone, else the first changes that are together. Where none
    are, all of them, though it does not fit.
    """
    limit, at = vram * GIB, Choice(settings, visual)
    if at.need(shape) <= limit:
        return at
    for choice in (c for lever in LEVERS for c in lever(shape, at, vram)):
        if choice.need(shape) <= limit:
            return choice
    for lever in LEVERS:
        choices = lever(shape, at, vram)
        for choice in choices:
            if choice.need(shape) <= limit:
                return choice
        if choices and choices[-1].need(shape) < at.need(shape):
            at = choices[-1]
    return at


# ------------------------------------------------------------------------------------------------------------------
# said


def plan(
    model: str,
    config: dict[str, Any],
    max_pixels: int,
    settings: Settings,
    vram: float | None = None,
) -> dict[str, Any]:
    """All of it, ready for JSON (schema lvr-lite/plan); bytes throughout. max_pixels: the model's
    own, where the settings name none. vram: GiB of one card; None takes CARDS.
    """
    shape = shape_of(config)
    own = (settings.max_pixels or max_pixels) // shape.pixels_per_token
    counted = sample(settings, own)
    here = need(shape, settings, counted)
    pictures = []
    for visual in sorted({*VISUAL_TOKENS, own}):
        row: dict[str, Any] = {
            "visual_tokens": visual,
            "max_pixels": visual * shape.pixels_per_token,
        }
        for name, on in (("checkpointing", True), ("plain", False)):
            other = Choice(settings, visual).train(gradient_checkpointing=on).settings
            one = sample(other, visual)
            found = need(shape, other, one)
            row[name] = {
                "saved": saved_bytes(shape, other, one),
                "tensors": found.tensors,
                "card": found.card,
            }
        pictures.append(row)
    return {
        "schema": "lvr-lite/plan",
        "version": 1,
        "model": model,
        "settings": settings.to_json(),
        "shape": asdict(shape),
        "parameters": parameters(shape) | {"trained": sum(trained(shape, settings.lora.rank))},
        "tokens": asdict(counted) | {"latents": latents(settings, counted), "pictures": 1},
        "stays": standing_bytes(shape, settings),
        "phases": phase_bytes(shape, settings, counted),
        "tensors": here.tensors,
        "phase": here.phase,
        "paged": here.paged,
        "workspace": WORKSPACE,
        "context": CONTEXT,
        "slack": SLACK,
        "card": here.card,
        "pictures": pictures,
        "cards": [
            _on_card(shape, settings, own, gib) for gib in (CARDS if vram is None else (vram,))
        ],
        "notes": _notes(settings, counted, here),
    }


def _on_card(shape: Shape, settings: Settings, visual: int, gib: float) -> dict[str, Any]:
    """What a card of so many GiB makes of it. lower: `--set` values; lower_card: what it needs with
    them.
    """
    found = lowered(shape, settings, visual, gib)
    return {
        "gib": gib,
        "fits": not found.said and found.need(shape) <= gib * GIB,
        "largest_visual_tokens": largest_picture(shape, settings, gib),
        "lower": list(found.said),
        "lower_card": found.need(shape),
        "lower_fits": found.need(shape) <= gib * GIB,
    }


def _notes(settings: Settings, tokens: Tokens, here: Need) -> list[str]:
    t = settings.train
    notes = [
        f"counted for one picture, {tokens.text} tokens of text and {tokens.answer} of answer a sample; on one card"
    ]
    if settings.latent.runs_freely and t.gradient_checkpointing:
        made = passes(settings, tokens)
        once = tokens.visual + tokens.text + latents(settings, tokens) + 2 + tokens.answer
        times = sum(one.columns for one in made) / once
        notes.append(
            f"time: {settings.latent.method} with gradient checkpointing keeps no K/V cache and reads all again for each latent: "
            f"{len(made)} passes, {times:.1f} times the work and the kept inputs of one; train.gradient_checkpointing=false reads once"
        )
    if settings.latent.targets == "all":
        notes.append(
            f"latent.targets=all: counted with the most latents that a sample may have, {latents(settings, tokens)}"
        )
    if isinstance(settings, Stage2):
        notes.append(
            f"stage 2: {t.batch} answers are drawn, or scored, at once (grpo.rows), each as long as it may be (grpo.max_tokens)"
        )
    elif t.batch > 1:
        notes.append(
            "train.batch above 1 is counted as padded: keys and values are then repeated for every query head"
        )
    if here.paged:
        notes.append(
            f"{_mib(here.paged)} MiB of optimizer states are paged: they move to the host where the card is full, and are not counted"
        )
    notes.append(
        f"{CONTEXT / MIB:.0f} MiB of CUDA context and {SLACK:.0%} of allocator slack are estimates; "
        "a desktop on the same card takes its own share"
    )
    return notes


def _mib(n: float) -> str:
    return f"{n / MIB:,.0f}"


def _gib(n: float) -> str:
    return f"{n / GIB:.2f}"


def show(report: dict[str, Any]) -> None:
    """Print a plan as tables."""
    from rich.console import Console
    from rich.table import Table

    console, t = Console(), report["settings"]["train"]
    table = Table(
        title=f"{report['model']}: {report['tokens']['visual']} visual tokens a picture, {t['batch']} samples at once",
        title_justify="left",
    )
    table.add_column("what")
    table.add_column("MiB", justify="right")
    for name, size in report["stays"].items():
        table.add_row(name, _mib(size))
    table.add_section()
    for name, size in report["phases"].items():
        table.add_row(
            f"{name}{' (the most)' if name == report['phase'] else ''}", f"+ {_mib(size)}"
        )
    table.add_section()
    table.add_row("live tensors at the most, with cuBLAS's workspace", _mib(report["tensors"]))
    table.add_row("on the card, with slack and CUDA context", _mib(report["card"]))
    console.print(table)
    by_picture = Table(
        title="by picture, with gradient checkpointing on / off", title_justify="left"
    )
    for name in ("visual tokens", "max_pixels", "saved MiB", "card GiB"):
        by_picture.add_column(name, justify="right")
    for row in report["pictures"]:
        saving, plain = row["checkpointing"], row["plain"]
        yours = " (yours)" if row["visual_tokens"] == report["tokens"]["visual"] else ""
        saved, card = (
            f"{_mib(saving['saved'])} / {_mib(plain['saved'])}",
            f"{_gib(saving['card'])} / {_gib(plain['card'])}",
        )
        by_picture.add_row(f"{row['visual_tokens']}{yours}", str(row["max_pixels"]), saved, card)
    console.print(by_picture)
    by_card = Table(title="by card", title_justify="left")
    for name in ("GiB", "fits", "largest picture", "lower first"):
        by_card.add_column(name)
    for card in report["cards"]:
        lower = " ".join(f"--set {said}" for said in card["lower"]) or "–"
        if not card["lower_fits"]:
            lower = f"not enough, {_gib(card['lower_card'])} GiB at the least: {lower}"
        largest = (
            f"{card['largest_visual_tokens']} visual tokens"
            if card["largest_visual_tokens"]
            else "none"
        )
        by_card.add_row(f"{card['gib']:g}", "yes" if card["fits"] else "no", largest, lower)
    console.print(by_card)
    for note in report["notes"]:
        console.print(f"· {note}", soft_wrap=True, highlight=False)
