"""How much memory a training step needs, in bytes, by formulas.

May import: the standard library and all that stands above `train`; no torch, and no weights are
read.

    peak = what stays (weights, adapters, optimizer; gradients while accumulating)
         + the largest of: seeing, head, backward, optimizer's step, answering held-out questions

Bytes are counted tensor by tensor as transformers, PEFT and bitsandbytes make them under bf16
autocast. tests/train/test_memory.py holds the parameters against built models, and the saved
activations against what autograd saves. bench/experiments/memory.py holds the peak against a card.
What fits on a card, `memory_plan` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from lvr_lite.config import Settings
from lvr_lite.errors import BundleError
from lvr_lite.files import JsonObject
from lvr_lite.model.spec import LatentSpec

MIB = 2**20
GIB = 2**30
# Of a question with its template.
TEXT_TOKENS = 64
# Of an answer with its end.
ANSWER_TOKENS = 16
# Held-out questions that are answered together (lvr_lite/eval/suite.py).
EVAL_ROWS = 16
MARKERS = 3
# The other families' tensors have not been counted yet.
COUNTED = ("qwen2_5_vl", "qwen2_vl")
# Of cuBLAS, which torch takes from its own allocator: 8 MiB, on Hopper 32 (CublasHandlePool.cpp).
# bitsandbytes has none that lasts: it dequantizes a weight into a tensor, which is counted below.
WORKSPACE = 32 * MIB
# What torch does not count. Both are estimates until bench/experiments/memory.py has measured them
# on a card: the CUDA context with the kernels of torch, cuBLAS and bitsandbytes (CUDA 12, loaded
# lazily), and what the caching allocator holds beside live tensors.
CONTEXT = 512 * MIB
SLACK = 0.05


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, as its config.json has them.

    hidden to tied: of the language model; tied says whether head and embedding are one matrix.
    vision_depth to vision_intermediate: of the vision tower.
    vision_gated: whether its blocks are those of Qwen2.5-VL (RMS norms, gated MLP), else Qwen2-VL.
    patch, temporal, channels: of a patch, in pixels, frames and colours.
    merge: patches along the side of a visual token.
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
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    @property
    def pixels_per_token(self) -> int:
        return (self.patch * self.merge) ** 2

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of the linear layers of one text layer: q, k, v, o, gate, up, down. All are in
        4 bits and adapted.
        """
        h = self.hidden
        i = self.intermediate
        return (
            (self.queries, h),
            (self.keys, h),
            (self.keys, h),
            (h, self.queries),
            (i, h),
            (i, h),
            (h, i),
        )


def shape_of(config: JsonObject) -> Shape:
    """The Shape of a config.json (text sizes at its top or under `text_config`). Raises BundleError
    naming what is missing.
    """
    kind = config.get("model_type", COUNTED[0])
    if kind not in COUNTED:
        raise BundleError(
            f"--plan counts {' and '.join(COUNTED)} so far, not {kind}: "
            "tune without it and watch the peak in metrics.json"
        )
    text = config.get("text_config", config)
    vision = config.get("vision_config")
    try:
        if vision is None:
            raise KeyError("vision_config")
        # Qwen2-VL calls its width embed_dim, and hidden_size what the projector gives.
        gated = "embed_dim" not in vision
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


# ----------------------------------------------------------------------------------------------
# what stays


def parameters(shape: Shape) -> dict[str, int]:
    """Parameters by part: linears (of the text layers, in 4 bits), embedding, head (0 if tied),
    norms (and biases), vision.
    """
    s = shape
    v = s.vision_hidden
    i = s.vision_intermediate
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
    """A linear layer in NF4 with double quantization: 4 bits a weight, one 8-bit scale a block of
    64, one fp32 scale a block of 256 scales, and the two code books.
    """
    scales = math.ceil(out * into / 64)
    return math.ceil(out * into / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


def trained(shape: Shape, rank: int) -> list[int]:
    """Sizes of the trained tensors, all fp32: A and B of each adapter, and the rows of the three
    markers, in the head too where it is a matrix of its own.
    """
    a_layer = [n for o, i in shape.linears for n in (rank * i, o * rank)]
    tables = 1 if shape.tied else 2
    return a_layer * shape.layers + [MARKERS * shape.hidden] * tables


def optimizer_bytes(optimizer: str, sizes: list[int]) -> tuple[int, int]:
    """Of the optimizer's states for tensors of these sizes, the bytes that stay on the card, and
    the bytes in pages, which may move to the host.

    bitsandbytes keeps tensors below 4096 elements in 32 bits, and pages states of 100,000 elements
    or more (optim/optimizer.py).
    """
    if optimizer == "sgd":
        return 0, 0
    stay = 0
    paged = 0
    for n in sizes:
        short = "8bit" in optimizer and n >= 4096
        states = 2 * n if short else 8 * n
        if optimizer.startswith("paged") and n >= 1e5:
            paged += states
        else:
            stay += states
        stay += 8 * math.ceil(n / 256) if short else 0
    return stay, paged


# ----------------------------------------------------------------------------------------------
# what one step makes


@dataclass(frozen=True)
class Tokens:
    """Tokens of one sample.

    visual: of its one picture.
    text: of the question and the template.
    answer: with its end.
    """

    visual: int
    text: int = TEXT_TOKENS
    answer: int = ANSWER_TOKENS


@dataclass(frozen=True)
class Pass:
    """One run through the text layers.

    columns: that a sample has in it.
    keys: that each column attends to.
    padded: whether attention needs a mask.
    """

    columns: int
    keys: int
    padded: bool


@dataclass(frozen=True)
class Stage2(Settings):
    """Settings of `lvr-lite grpo` as they are counted: `train.batch` is the answers that are drawn,
    or scored, at once (`grpo.rows`), whose gradients are added up.

    mode: the checkpoint's, as in LatentSpec.
    """

    mode: str = "open"


def stage2(settings: Settings, spec: LatentSpec) -> Stage2:
    """What stage 2 on a checkpoint of these latents is counted with."""
    own: dict[str, Any] = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    freely = settings.grpo.latents == "recomputed" and spec.feedback != "token"
    latent = replace(
        settings.latent, method="lvr", steps=spec.steps, targets="pooled", loss="mse", warmup=0.0
    )
    if freely:
        latent = replace(latent, method="lvr-free" if spec.mode == "open" else "lvr-bottleneck")
    own["latent"] = latent
    own["train"] = replace(settings.train, batch=settings.grpo.rows, accumulation=2)
    return Stage2(**own, mode=spec.mode)


def sample(settings: Settings, visual: int) -> Tokens:
    """The sample that is counted: one picture of so many visual tokens."""
    if isinstance(settings, Stage2):
        return Tokens(visual, answer=settings.grpo.max_tokens)
    return Tokens(visual)


def width(settings: Settings) -> int:
    """Bytes of an activation: 2 (bf16, as "auto" takes on any recent card) or 4."""
    return 4 if settings.train.precision == "fp32" else 2


def latents(settings: Settings, tokens: Tokens) -> int:
    """Latent places in a response; with targets=all the most that a sample may have."""
    if settings.latent.method == "sft":
        return 0
    if settings.latent.targets == "all":
        return min(settings.latent.max_targets, tokens.visual)
    return settings.latent.steps


def passes(settings: Settings, tokens: Tokens) -> list[Pass]:
    """The runs through the text layers whose activations wait for the backward pass
    (lvr_lite/train/methods.py).
    """
    k = latents(settings, tokens)
    padded = settings.train.batch > 1
    prompt = tokens.visual + tokens.text
    whole = prompt + (k + 2 if k else 0) + tokens.answer
    # The second reading: the latents stand for the picture.
    reader = tokens.text + k + tokens.answer
    if not settings.latent.runs_freely:
        if isinstance(settings, Stage2) and settings.mode == "bottleneck":
            return [Pass(prompt + k, prompt + k, padded), Pass(reader, reader, padded)]
        return [Pass(whole, whole, padded)]
    first = prompt + 1
    bottleneck = settings.latent.method == "lvr-bottleneck"
    steps = k - 1 if bottleneck else k
    runs = [Pass(first, first, padded)]
    runs += [Pass(1, first + i, padded) for i in range(1, steps + 1)]
    runs += [] if bottleneck else [Pass(tokens.answer + 1, whole, True)]
    # Where two latents are alike, one is masked out.
    return runs + ([Pass(reader, reader, True)] if bottleneck else [])


def layer_bytes(shape: Shape, settings: Settings, one: Pass) -> int:
    """What autograd saves in one text layer for one pass and one sample."""
    s = shape
    w = width(settings)
    inputs = [i for _, i in s.linears]
    # In fp32, with the root of the variance.
    norms = 2 * (4 * s.hidden + 4)
    # Queries, result, log-sum-exp.
    attention = w * 2 * s.queries + 4 * s.heads
    # Gate, its activation, up.
    mlp = w * 3 * s.intermediate
    # What adapters read: the results of both norms, and the input of down; o reads the result that
    # is counted above.
    read = w * (2 * s.hidden + s.intermediate)
    if settings.lora.dropout:
        # Each its own, with the mask.
        read = (w + 1) * sum(inputs)
    adapters = w * settings.lora.rank * len(inputs)
    # Under a mask keys and values are repeated for each query head, and the mask is widened.
    repeated = one.padded and one.columns > 1
    keys = 2 * w * (s.queries if repeated else s.keys)
    mask = w * one.columns * one.keys if repeated else 0
    return one.columns * (norms + attention + mlp + read + adapters) + one.keys * keys + mask


def head_bytes(shape: Shape, settings: Settings, tokens: Tokens) -> int:
    """What autograd saves in the head and the losses: the states that speak, their
    log-probabilities, and the visual tokens with which the contrastive loss compares latents.
    """
    s = shape
    w = width(settings)
    batch = settings.train.batch
    spoken = batch * (tokens.answer + (2 if latents(settings, tokens) else 0))
    compared = 4 * batch * tokens.visual * s.hidden if settings.latent.loss == "contrastive" else 0
    spoken_bytes = w * s.hidden + 4 * s.vocab
    if isinstance(settings, Stage2):
        # Which ids may not be chosen.
        spoken_bytes += s.vocab
    return spoken * spoken_bytes + compared


def saved_bytes(shape: Shape, settings: Settings, tokens: Tokens) -> int:
    """What autograd keeps of a batch from the forward to the backward pass, parameters apart."""
    s = shape
    w = width(settings)
    runs = passes(settings, tokens)
    checkpointing = settings.train.gradient_checkpointing
    copies = 0
    if checkpointing:
        layers = s.layers * sum(w * one.columns * s.hidden for one in runs)
        if settings.latent.runs_freely:
            # The keys and values of a pass in parts (lvr_lite/train/recompute.py).
            parts = runs[:-1] if settings.latent.method == "lvr-bottleneck" else runs
            layers += s.layers * sum(w * 2 * one.columns * s.keys for one in parts)
    else:
        layers = s.layers * sum(layer_bytes(s, settings, one) for one in runs)
        # Autocast's copies of the adapters.
        copies = w * sum(trained(s, settings.lora.rank)[:-1]) if w < 4 else 0
    rotary = 0 if checkpointing else 2 * w * s.head_dim
    ends = sum(one.columns * (4 * s.hidden + 4 + rotary) for one in runs)
    return settings.train.batch * (layers + ends) + copies + head_bytes(s, settings, tokens)


def standing_bytes(shape: Shape, settings: Settings) -> dict[str, int]:
    """Bytes of what stays through the run, by part. optimizer: of its states those that are not
    paged.
    """
    counts = parameters(shape)
    sizes = trained(shape, settings.lora.rank)
    w = width(settings)
    stays = {}
    if isinstance(settings, Stage2) and settings.grpo.beta:
        stays["policy at the start, fp32"] = 4 * sum(sizes)
    linears = sum(nf4_bytes(*linear) for linear in shape.linears)
    accumulating = settings.train.accumulation > 1
    return stays | {
        "language model's linears, NF4": shape.layers * linears,
        "embedding and head": w * (counts["embedding"] + counts["head"]),
        "vision tower, norms and biases": w * (counts["vision"] + counts["norms"]),
        "adapters and marker rows, fp32": 4 * sum(sizes),
        "optimizer": optimizer_bytes(settings.train.optimizer, sizes)[0],
        "gradients, kept while accumulating": 4 * sum(sizes) if accumulating else 0,
    }


def phase_bytes(shape: Shape, settings: Settings, tokens: Tokens) -> dict[str, int]:
    """Bytes that each phase takes at its height, beside what stays."""
    s = shape
    w = width(settings)
    t = settings.train
    sizes = trained(s, settings.lora.rank)
    # While accumulating they stay.
    gradients = 0 if t.accumulation > 1 else 4 * sum(sizes)
    # Stage 2 sees its pictures while answers are drawn.
    seen_at_once = 1 if isinstance(settings, Stage2) else t.batch
    patches = seen_at_once * tokens.visual * s.merge**2
    pixels = s.channels * s.temporal * s.patch**2
    inputs = 4 * patches * pixels + w * t.batch * tokens.visual * s.hidden
    # Rotary positions are applied in fp32: queries, keys, their halves and products.
    rotary = (5 * w + 22) * s.vision_hidden
    vision_mlp = 2 * w * s.vision_hidden + 3 * w * s.vision_intermediate
    seen = patches * (max(rotary, vision_mlp) + (2 * pixels if w < 4 else 0))
    saved = saved_bytes(s, settings, tokens)
    longest = max(passes(settings, tokens), key=lambda one: one.columns)
    layer = t.batch * longest.columns * w * (2 * s.intermediate + s.hidden)
    layer += w * max(o * i for o, i in s.linears)
    if t.gradient_checkpointing:
        layer += t.batch * layer_bytes(s, settings, longest)
    logits = (4 + w) * t.batch * (tokens.answer + 2) * s.vocab
    before_layers = saved - head_bytes(s, settings, tokens)
    answering = (
        "drawing answers" if isinstance(settings, Stage2) else "answering held-out questions"
    )
    return {
        "seeing the pictures": inputs + seen,
        "head": inputs + saved + logits,
        "backward through a layer": inputs + max(before_layers, gradients) + layer,
        "optimizer's step": inputs
        + gradients
        + (4 * sum(sizes) if t.optimizer == "adamw_torch" else 0),
        answering: _answering(s, settings, tokens),
    }


def _answering(s: Shape, settings: Settings, tokens: Tokens) -> int:
    """Evaluation during training: EVAL_ROWS prompts at once, K/V of all layers, and the widest of
    one layer's MLP without autocast, where PEFT runs the adapters in fp32.
    """
    w = width(settings)
    prompt = tokens.visual + tokens.text
    cache = s.layers * 2 * w * s.keys * (prompt + latents(settings, tokens) + tokens.answer)
    mlp = prompt * ((2 * w + 8) * s.intermediate + (4 * w + (8 if w < 4 else 0)) * s.hidden)
    masks = prompt * prompt
    rows = settings.train.batch if isinstance(settings, Stage2) else EVAL_ROWS
    return rows * (cache + mlp + masks) + w * max(o * i for o, i in s.linears)


@dataclass(frozen=True)
class Need:
    """What a run needs, in bytes.

    tensors: the most that is alive at once.
    phase: of the step, when that is.
    paged: states of the optimizer beside it, which move to the host where the card is full.
    """

    tensors: int
    phase: str
    paged: int

    @property
    def card(self) -> int:
        """What a card must have: `tensors`, slack and the CUDA context."""
        return int(self.tensors * (1 + SLACK)) + CONTEXT


def need(shape: Shape, settings: Settings, tokens: Tokens) -> Need:
    """What training on such samples needs."""
    phases = phase_bytes(shape, settings, tokens)
    phase = max(phases, key=phases.__getitem__)
    stays = sum(standing_bytes(shape, settings).values())
    _, paged = optimizer_bytes(settings.train.optimizer, trained(shape, settings.lora.rank))
    return Need(stays + phases[phase] + WORKSPACE, phase, paged)
