"""How much memory a run of training needs: its real code, on a card that does not exist.

May import: torch, transformers, peft, bitsandbytes and what stands above `train`; this folder.

A trace builds the model of a config.json without weights, adapts it, and goes through what
`finetune` or `grpo` does with the largest sample that the settings allow:

    loading       weights come one by one, and are packed in 4 bits
    rollout       stage 2: answers are drawn
    forward       of one batch, up to the loss (`scoring` in stage 2)
    backward
    optimizer     gradients are clipped, weights updated
    evaluation    held-out questions are answered

It counts the bytes of live tensors. What a card needs beyond them is estimated: CONTEXT, SLACK,
WORKSPACE. bench/experiments/memory.py measures both on a card.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from lvr_lite.config import Settings
from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item
from lvr_lite.errors import LvrError
from lvr_lite.eval.suite import accuracy_on
from lvr_lite.export.weights import model_on_meta
from lvr_lite.generate.torch import SharedColumns, TorchRuntime, distinct
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.model.families import Grid
from lvr_lite.model.processor import Processor
from lvr_lite.model.processor_files import read_json
from lvr_lite.train.batches import Collator
from lvr_lite.train.grpo import Roller, learn_from, readings_of
from lvr_lite.train.load import adapted, check_quantized, to_reinforce
from lvr_lite.train.methods import METHODS
from lvr_lite.train.policy import Policy, batches_of
from lvr_lite.train.rewards import read_rewards
from lvr_lite.train.sft import LatentSFT
from lvr_lite.train.simulated import FLASH, GRAIN, SimulatedCard

MIB = 2**20
GIB = 2**30
# Of a question with its template, and of an answer with its end.
TEXT_TOKENS = 64
ANSWER_TOKENS = 16
# Held-out questions that are answered together (lvr_lite/eval/suite.py).
EVAL_ROWS = 16
# Of cuBLAS, which torch takes from its own allocator: 8 MiB, on Hopper 32
# (aten/src/ATen/cuda/CublasHandlePool.cpp).
WORKSPACE = 32 * MIB
# What torch does not count. Both are estimates until bench/experiments/memory.py has measured them
# on a card: the CUDA context with the kernels of torch, cuBLAS and bitsandbytes (CUDA 12, loaded
# lazily), and what the caching allocator holds beside live tensors, fragments among them.
CONTEXT = 512 * MIB
SLACK = 0.05
# Widths of a picture over its height, of which the one with the most visual tokens is traced.
PROPORTIONS = (1.0, 4 / 3, 3 / 2, 16 / 9, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Tokens:
    """Tokens of one sample, as it is traced.

    visual: of its one picture.
    text: of the question and the template.
    answer: with its end.
    latents: latent places.
    """

    visual: int
    text: int
    answer: int
    latents: int


@dataclass(frozen=True)
class Trace:
    """What a run needs, in bytes.

    stays: what is there between two steps, by part.
    phases: the most live tensors in each phase, all of `stays` included that was there.
    parameters: numbers of the model, by part, and of what is trained.
    saved: what waits for the backward pass when the forward pass has ended.
    paged: states of the optimizer beside these, which move to the host where the card is full.
    """

    tokens: Tokens
    stays: dict[str, int]
    phases: dict[str, int]
    parameters: dict[str, int]
    saved: int
    paged: int

    @property
    def phase(self) -> str:
        """Of the peak."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def tensors(self) -> int:
        """The most that is alive at once, with cuBLAS's workspace."""
        return self.phases[self.phase] + WORKSPACE

    @property
    def card(self) -> int:
        """What a card must have: `tensors`, slack and the CUDA context."""
        return card_of(self.tensors)


def card_of(tensors: int) -> int:
    """Bytes of a card on which so many bytes of live tensors fit."""
    return int(tensors * (1 + SLACK)) + CONTEXT


# ------------------------------------------------------------------------------------- the samples


def largest_size(processor: Processor) -> tuple[int, int]:
    """Height and width in pixels of a picture of as many visual tokens as this processor lets one
    have.
    """
    area = processor.image.max_pixels
    sizes = [(round((area / p) ** 0.5), round((area * p) ** 0.5)) for p in PROPORTIONS]
    return max(sizes, key=lambda size: processor.visual_tokens(processor.grid_of(*size)))


def most_visual_tokens(processor: Processor) -> int:
    """Visual tokens of that picture."""
    return processor.visual_tokens(processor.grid_of(*largest_size(processor)))


def largest_picture(processor: Processor) -> Image.Image:
    """Noise of that size."""
    shape = (*largest_size(processor), 3)
    noise = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    return Image.fromarray(noise)


def largest_samples(processor: Processor, count: int, answer: int = ANSWER_TOKENS) -> list[Item]:
    """Questions about the largest picture, which differ a little in length, as real ones do.

    answer: tokens of each answer, with its end.
    """
    picture = largest_picture(processor)
    grid = processor.grid_of(picture.height, picture.width)
    visual = processor.visual_tokens(grid)
    question = "what colour is the star"
    while len(processor.prompt(question, [grid]).ids) - visual < TEXT_TOKENS:
        question += " left"
    items: list[Item] = []
    for number in range(count):
        asked = f"{question} {'left ' * (number % 2)}{number}"
        sample = Sample(
            id=str(number),
            images=(Path("picture.png"),),
            question=asked,
            answer=_words(processor, answer - 1),
            boxes=((0.0, 0.0, 1.0, 1.0),),
        )
        items.append((sample, (picture,)))
    return items


def _words(processor: Processor, tokens: int) -> str:
    """Text of so many tokens, or a few more."""
    text = "red"
    while len(processor.tokenizer.encode(text, add_special_tokens=False).ids) < tokens:
        text += " red"
    return text


class LooksAndGoesOn(TorchRuntime):
    """A model that always looks, and whose answers are as long as they may be: its head's numbers
    are noise.

    What would only repeat itself is left out: of pictures the first one is seen, of the steps after
    a prompt the first one is taken, at once with the K/V of as many columns as the longest answer
    has. What the others would give is noise, too.
    """

    _seen: np.ndarray | None = None
    _room = 0
    _stepped: np.ndarray | None = None

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        super().__init__(model, checkpoint)
        self._random = np.random.default_rng(0)

    def encode(self, pixel_values: np.ndarray, grids: list[Grid]) -> np.ndarray:
        if self._seen is None:
            self._seen = super().encode(pixel_values, grids)
            return self._seen
        return np.asarray(self._seen * np.float32(self._random.uniform(0.5, 1.0)))

    def start(self, batch: int, capacity: int) -> None:
        super().start(batch, capacity)
        self._room = capacity
        self._stepped = None

    @torch.inference_mode()
    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        if self._stepped is None:
            self._fill()
            self._stepped = super().step(embeds, positions)
        # Rows that are fed the same give the same, as real ones do.
        _, same = distinct(row.tobytes() for row in embeds)
        return np.asarray(self._stepped[same] * np.float32(self._random.uniform(0.5, 1.0)))

    def _fill(self) -> None:
        """The K/V of all columns but the last that there is room for."""
        batch, columns = self._mask.shape
        more = self._room - 1 - columns
        if more <= 0:
            return
        self._mask = torch.cat([self._mask, self._mask.new_ones(batch, more)], 1)
        for number, layer in enumerate(self._cache.layers):
            keys = layer.shared[0] if isinstance(layer, SharedColumns) else layer.keys
            _, heads, _, size = keys.shape
            columns_more = keys.new_empty(batch, heads, more, size)
            self._cache.update(columns_more, columns_more, number)

    def choose(
        self,
        hidden: np.ndarray,
        closed: Sequence[Sequence[int]],
        at: Sequence[float],
        temperature: float,
        top_p: float,
    ) -> list[int]:
        super().choose(hidden, closed, at, temperature, top_p)
        tokens = self.processor.tokens
        chosen = []
        for never in closed:
            looks = self.latent.steps and tokens.lvr_start not in never
            allowed = set(range(self.processor.tokenizer.get_vocab_size()))
            words = sorted(allowed - {*never, *tokens.end, tokens.lvr_start})
            word = words[int(self._random.integers(len(words)))]
            chosen.append(tokens.lvr_start if looks else word)
        return chosen


# --------------------------------------------------------------------------------------- the model


def placed(checkpoint: Checkpoint, dtype: torch.dtype, card: SimulatedCard) -> Any:
    """The base model of a checkpoint on the card as `load_nf4` leaves it there, of its config.json
    alone. Raises BundleError where transformers cannot make it, and where something else is in 4
    bits than should be.
    """
    family = checkpoint.processor.family
    model = model_on_meta(checkpoint.config, family)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and re.fullmatch(family.lora_targets, path):
            model.set_submodule(path, _in_4_bits(module, dtype, card))
    # By the identity of what they replace, so that tied ones stay tied.
    parameters: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old.is_meta:
                if id(old) not in parameters:
                    parameters[id(old)] = _weight(old, dtype, card)
                setattr(module, name, parameters[id(old)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(card.device))
    model.is_loaded_in_4bit = True
    check_quantized(model, checkpoint)
    return model.eval()


def _weight(like: torch.Tensor, dtype: torch.dtype, card: SimulatedCard) -> torch.nn.Parameter:
    weight = torch.empty(like.shape, dtype=dtype, device=card.device)
    return torch.nn.Parameter(weight, requires_grad=False)


def _in_4_bits(linear: torch.nn.Linear, dtype: torch.dtype, card: SimulatedCard) -> Any:
    """A linear as bitsandbytes packs it: it comes in `dtype` first."""
    import bitsandbytes as bnb

    packed: Any = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight, state = bnb.functional.quantize_4bit(
        _weight(linear.weight, dtype, card).data,
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
    )
    # bitsandbytes' own parameter cannot hold a tensor that has no numbers.
    packed.weight = torch.nn.Parameter(weight, requires_grad=False)
    packed.weight.quant_state = state
    packed.weight.compress_statistics = True
    packed.weight.quant_type = "nf4"
    if linear.bias is not None:
        packed.bias = _weight(linear.bias, dtype, card)
    return packed


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors take, each storage once; of the card's, what stands for them counts."""
    storages = [getattr(tensor, "meta", tensor).untyped_storage() for tensor in tensors]
    sizes = {storage._cdata: storage.nbytes() for storage in storages}
    return sum(-(-size // GRAIN) * GRAIN for size in sizes.values())


def parts_of(model: Any, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, int]:
    """Bytes of what stays between two steps, by part; pages of the optimizer apart."""
    import bitsandbytes as bnb

    packed: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            scales = state.state2
            packed += [module.weight, state.absmax, state.code, state.offset]
            packed += [scales.absmax, scales.code]
    counted = {id(tensor) for tensor in packed}
    tables: list[torch.Tensor] = []
    others: list[torch.Tensor] = list(model.buffers())
    trained: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        if id(parameter) in counted:
            continue
        part = tables if re.search(r"embed_tokens|lm_head", name) else others
        part = trained if parameter.requires_grad else part
        part.append(parameter)
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and not getattr(value, "is_paged", False)
    ]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    return {
        "language model's linears, NF4": bytes_of(packed),
        "embedding and head": bytes_of(tables),
        "vision tower, norms and biases": bytes_of(others),
        "adapters and marker rows, fp32": bytes_of(trained),
        "optimizer": bytes_of(value for value in states if value.device == device),
        "gradients, kept while accumulating": bytes_of(gradients),
    }


def make_optimizer(settings: Settings, model: Any) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names, as transformers makes it."""
    import bitsandbytes as bnb

    t = settings.train
    name = t.optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=t.lr)
    if name.startswith("adamw_torch"):
        return torch.optim.AdamW(parameters, lr=t.lr, fused=name.endswith("fused"))
    bits = 8 if "8bit" in name else 32
    paged = name.startswith("paged")
    optimizer: torch.optim.Optimizer = bnb.optim.AdamW(
        parameters, lr=t.lr, optim_bits=bits, is_paged=paged
    )
    return optimizer


# ---------------------------------------------------------------------------------- a step, metered


class Meter(Protocol):
    """What counts the bytes of live tensors, on a real device or a simulated one.

    device: that the tensors are on.
    now: bytes that are live.
    peaks: the most in each phase.
    """

    device: torch.device
    peaks: dict[str, int]

    @property
    def now(self) -> int: ...
    def phase(self, name: str) -> contextlib.AbstractContextManager[None]: ...
    def autocast(self, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]: ...


@dataclass
class Stepper:
    """Steps of training on a device, real or simulated, that a meter watches.

    model: adapted.
    checkpoint: with the picture size and the latent loop that are trained.
    dtype: what the base computes in.
    saved: bytes that waited for the last backward pass.
    """

    model: Any
    checkpoint: Checkpoint
    settings: Settings
    dtype: torch.dtype
    meter: Meter
    saved: int = 0

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.settings, self.model)
        # From the second step on the optimizer has its states.
        with self.meter.phase("optimizer"):
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
        # Gradients of the batches before stay where some are added up.
        if self.settings.train.accumulation == 1:
            self.optimizer.zero_grad()

    def stays(self) -> dict[str, int]:
        """Bytes of what is there before a batch, by part."""
        return parts_of(self.model, self.optimizer, self.meter.device)

    def finetune(self) -> None:
        """One batch of stage 1."""
        settings = self.settings
        processor = self.checkpoint.processor
        items = largest_samples(processor, settings.train.batch)
        batch = Collator(self.checkpoint, settings.latent)(items)
        # Of norm-matched feedback; any number will do.
        sft = LatentSFT(self.model, processor.tokens, settings.latent, norm=1.0).train()
        with self.meter.phase("forward"), self.meter.autocast(self.dtype):
            moved = on_device(batch, self.meter.device)
            before = self.meter.now
            loss = sft(**moved)["loss"]
        self._learn(loss, before)

    def grpo(self) -> None:
        """Stage 2: answers to one batch of questions, and what the first of them teach."""
        settings = self.settings
        grpo = settings.grpo
        checkpoint = self.checkpoint
        spec = checkpoint.latent
        scoring = read_rewards("accuracy=1")
        roller = Roller(LooksAndGoesOn(self.model, checkpoint), settings, scoring, donors=None)
        policy = Policy(
            self.model,
            checkpoint.processor.tokens,
            spec,
            grpo.temperature,
            grpo.latents,
            keep_start=grpo.beta > 0,
        )
        items = largest_samples(checkpoint.processor, settings.train.batch)
        self.model.eval()
        with self.meter.phase("rollout"), self.meter.autocast(self.dtype):
            rollouts = roller(items, 0)
        policy.train()
        part = rollouts[: grpo.rows]
        for number, rollout in enumerate(part):
            rollout.advantage = (-1.0) ** number
        with self.meter.phase("scoring"), self.meter.autocast(self.dtype):
            batches = batches_of(readings_of(policy, part))
            moved = on_device(batches, self.meter.device)
            before = self.meter.now
            loss = learn_from(policy, policy, part, moved, grpo, None).loss
        self._learn(loss, before)

    def _learn(self, loss: torch.Tensor, before: int) -> None:
        """From a loss to new weights. before: live bytes, when its forward pass began."""
        self.saved = self.meter.now - before
        with self.meter.phase("backward"):
            _backward(loss)
        with self.meter.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.trained, self.settings.train.max_grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self) -> None:
        """Held-out questions are answered, as often as they are together."""
        count = min(EVAL_ROWS, self.settings.data.eval_count)
        items = largest_samples(self.checkpoint.processor, count)
        runtime = LooksAndGoesOn(self.model.eval(), self.checkpoint)
        with self.meter.phase("evaluation"):
            accuracy_on(runtime, items, [sample.answer for sample, _ in items])


# What torch says where its threads were made before the card was known (`simulated.register`).
WITHOUT_THREAD = "device_ready_queues_"


def _backward(loss: torch.Tensor) -> None:
    """Raises LvrError in a process that has trained before it knew the card."""
    try:
        loss.backward()
    except RuntimeError as error:
        if WITHOUT_THREAD not in str(error):
            raise
        raise LvrError(
            "a plan cannot be made in a process that has trained already: torch knows no new "
            "device then; make it first, or run --plan on the command line"
        ) from error


def on_device(batch: Any, device: torch.device) -> Any:
    """Tensors of a batch, as transformers' Trainer moves them."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: on_device(value, device) for name, value in batch.items()}
    if isinstance(batch, list):
        return [on_device(value, device) for value in batch]
    return batch


# --------------------------------------------------------------------------------------- the trace


def trace_finetune(
    checkpoint: Checkpoint, settings: Settings, flash: Sequence[torch.dtype] | None = None
) -> Trace:
    """What `finetune` needs over a base. Raises BundleError for a config.json that transformers
    cannot make a model of.

    flash: as of SimulatedCard; a card's by default.
    """
    checkpoint = with_latents(with_pictures(checkpoint, settings), settings)
    dtype = computed_in(settings)
    with SimulatedCard(flash or FLASH) as card:
        base = placed(checkpoint, dtype, card)
        model = adapted(base, checkpoint, settings)
        stepper = Stepper(model, checkpoint, settings, dtype, card)
        stays = stepper.stays()
        stepper.finetune()
        stepper.evaluate()
        return _traced(stepper, card, stays)


def trace_grpo(checkpoint: Checkpoint, settings: Settings) -> Trace:
    """What `grpo` needs of a tuned checkpoint, whose adapter is as `settings.lora` says; errors as
    of `trace_finetune`.
    """
    checkpoint = with_pictures(checkpoint, settings)
    dtype = computed_in(settings)
    with SimulatedCard() as card:
        base = placed(checkpoint, dtype, card)
        model = to_reinforce(adapted(base, checkpoint, settings), settings)
        stepper = Stepper(model, checkpoint, settings, dtype, card)
        stays = stepper.stays()
        stepper.grpo()
        stepper.evaluate()
        return _traced(stepper, card, stays)


def with_pictures(checkpoint: Checkpoint, settings: Settings) -> Checkpoint:
    """A checkpoint with pictures of the size that the settings ask for."""
    processor = checkpoint.processor
    usual = processor.image.max_pixels if checkpoint.adapter else processor.default_max_pixels
    size = settings.max_pixels or usual
    return replace(checkpoint, processor=processor.with_max_pixels(size))


def with_latents(checkpoint: Checkpoint, settings: Settings) -> Checkpoint:
    """A checkpoint with the latent loop that stage 1 trains."""
    method = METHODS[settings.latent.method]
    return replace(checkpoint, latent=method.spec(settings.latent, norm=1.0))


def with_adapter_of(checkpoint: Checkpoint, settings: Settings) -> Settings:
    """Settings with the rank of a tuned checkpoint's adapter, which stage 2 goes on with."""
    adapter = read_json(checkpoint.folder / "adapter_config.json")
    rank = adapter.get("r", settings.lora.rank)
    return replace(settings, lora=replace(settings.lora, rank=rank, dropout=0.0))


def computed_in(settings: Settings) -> torch.dtype:
    """What a card computes in: bf16, unless something else is asked for."""
    types = {"fp16": torch.float16, "fp32": torch.float32}
    return types.get(settings.train.precision, torch.bfloat16)


def _traced(stepper: Stepper, card: SimulatedCard, stays: dict[str, int]) -> Trace:
    processor = stepper.checkpoint.processor
    stage2 = "rollout" in card.peaks
    (item,) = largest_samples(processor, 1)
    sample, (picture,) = item
    grid = processor.grid_of(picture.height, picture.width)
    visual = processor.visual_tokens(grid)
    latent = stepper.settings.latent
    latents = stepper.checkpoint.latent.steps
    if latent.targets == "all" and not stage2:
        latents = min(latent.max_targets, visual)
    tokens = Tokens(
        visual=visual,
        text=len(processor.prompt(sample.question, [grid]).ids) - visual,
        answer=stepper.settings.grpo.max_tokens if stage2 else ANSWER_TOKENS,
        latents=latents,
    )
    return Trace(
        tokens=tokens,
        stays=stays,
        phases=dict(card.peaks),
        parameters=parameters_of(stepper.model),
        saved=stepper.saved,
        paged=card.paged,
    )


def parameters_of(model: Any) -> dict[str, int]:
    """Parameters by part: linears (in 4 bits), embedding, head (0 if it is the embedding), norms
    (and biases), vision, and those that are trained.
    """
    import bitsandbytes as bnb

    parts = dict.fromkeys(("linears", "embedding", "head", "norms", "vision", "trained"), 0)
    packed = set()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            packed.add(id(module.weight))
            parts["linears"] += module.in_features * module.out_features
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts["trained"] += parameter.numel()
        elif id(parameter) not in packed:
            parts[_part_of(name)] += parameter.numel()
    return parts


def _part_of(name: str) -> str:
    if "lm_head" in name:
        return "head"
    if "embed_tokens" in name:
        return "embedding"
    return "vision" if re.search(r"visual|vision_model|connector", name) else "norms"
