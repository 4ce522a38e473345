"""After rounding: the scales of blocks and the norms of a decoder, trained so that its answers and
latents stay those of fp32.

May import: torch, onnx, numpy, the core.

GPTQ keeps each product close, one by one; what their errors do together shows only at the end. Here
the integers stay as they are, and what multiplies them is moved by the gradient of what matters,
end to end: KL of the distributions over words, and drift of the latents, on the calibration prompts
(scales alone: EfficientQAT, arXiv 2407.11062, section 3.3). Sizes and speed do not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor
from torch.nn import functional

from lvr_lite import terminal
from lvr_lite.errors import BundleError
from lvr_lite.export import onnxfile
from lvr_lite.generate.onnx import OnnxRuntime, open_session
from lvr_lite.model.bundle import Manifest
from lvr_lite.quant.blocks import storable, unpack
from lvr_lite.quant.calibrate import Reading

RATE = 5e-4  # of Adam: of each scale relative to itself, and of a norm's weights
BATCH = 4  # readings a step
WARM_UP = 5  # steps
HELD_OUT = 8  # one prompt of so many is not trained on; those say whether what was trained is kept


class _Product(torch.autograd.Function):
    """x (…, K) times the transpose of a matrix (N, K) of integers (N, blocks, block) and scales (N,
    blocks). The matrix is made anew in each pass and never kept: those of all layers would fill the
    memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, integers, scales)
        return x @ _matrix(integers, scales, x.shape[-1]).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, integers, scales = ctx.saved_tensors
        (grad,) = grads
        by_x = grad @ _matrix(integers, scales, x.shape[-1])
        if not ctx.needs_input_grad[2]:
            return by_x, None, None
        by_matrix = grad.flatten(0, -2).T @ x.flatten(0, -2)
        by_matrix = functional.pad(by_matrix, (0, integers[0].numel() - by_matrix.shape[1]))
        return by_x, None, (by_matrix.reshape(integers.shape) * integers).sum(-1)


def _matrix(integers: Tensor, scales: Tensor, columns: int) -> Tensor:
    return (integers * scales[..., None]).flatten(1)[:, :columns]


class Graph:
    """A decoder or head of integer weights as torch reads it: whole sequences, no K/V, activations
    in float32.

    factors: {initializer of scales: what they are multiplied with, (N, blocks), 1 at first}; norms:
    {initializer: values of a norm}. These are what is trained.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._model = file, onnxfile.load(file)
        self._stored = {tensor.name: tensor for tensor in self._model.graph.initializer}
        products = [node for node in self._model.graph.node if node.op_type == "MatMulNBits"]
        widened = {
            n.output[0]: n.input[0]
            for n in self._model.graph.node
            if n.op_type == "Cast" and n.input[0] in self._stored
        }
        self._scales = {node.name: widened.get(node.input[2], node.input[2]) for node in products}
        self._weights = {node.name: self._integers(node) for node in products}
        norms = {
            node.input[1] for node in self._model.graph.node if node.op_type == "RMSNormalization"
        }
        self.factors = {
            self._scales[name]: torch.ones_like(scales, requires_grad=True)
            for name, (_, scales) in self._weights.items()
        }
        self.norms = {name: self._read(name).requires_grad_() for name in norms}
        taken = {
            *norms,
            *widened,
            *widened.values(),
            *(name for node in products for name in node.input[1:]),
        }
        self._constants = {name: self._read(name) for name in self._stored if name not in taken}
        unknown = {node.op_type for node in self._model.graph.node} - {
            *OPERATORS,
            "MatMulNBits",
            "Shape",
        }
        if unknown:
            raise BundleError(
                f"{file}: cannot be trained through {', '.join(sorted(unknown))}; --tune-steps 0 goes without training"
            )
        self._nodes = [node for node in self._model.graph.node if node.output[0] not in widened]

    def parameters(self) -> list[Tensor]:
        return [*self.factors.values(), *self.norms.values()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The graph's first output. inputs: all that it has but K/V and lengths."""
        values: dict[str, Any] = {**self._constants, **self.norms, **inputs}
        for node in self._nodes:
            of = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "MatMulNBits":
                integers, scales = self._weights[node.name]
                made: Any = _Product.apply(
                    values[node.input[0]], integers, scales * self.factors[self._scales[node.name]]
                )
            elif node.op_type == "Shape":  # of the input or of the cache, which has as many rows
                made = torch.tensor(values.get(node.input[0], values["inputs_embeds"]).shape)
                made = made[of.get("start", 0) : of.get("end")]
            else:
                made = OPERATORS[node.op_type](of, *(values.get(name) for name in node.input))
            values.update(
                zip(node.output, made if isinstance(made, tuple) else (made,), strict=False)
            )  # of attention, not its K/V
        return values[self._model.graph.output[0].name]  # type: ignore[no-any-return]

    def write(self) -> None:
        """Put what was trained where it came from; float16 for scales, as they are stored."""
        for node, name in self._scales.items():  # which several nodes may share
            scales = (self._weights[node][1] * self.factors[name].detach()).numpy()
            self._put(name, storable(scales).reshape(tuple(self._stored[name].dims)))
        for name, values in self.norms.items():
            self._put(name, values.detach().numpy())
        self._file.write_bytes(self._model.SerializeToString())

    def _put(self, name: str, values: np.ndarray) -> None:
        tensor = self._stored[name]
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        onnxfile.overwrite(tensor, self._file.parent, np.ascontiguousarray(values, kind))

    def _read(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(onnxfile.read(self._stored[name], self._file.parent)))

    def _integers(self, node: onnx.NodeProto) -> tuple[Tensor, Tensor]:
        """(N, blocks, block) less their zero points, int8 or int16; scales (N, blocks) float32."""
        of = {a.name: a.i for a in node.attribute}
        values = unpack(self._read(node.input[1]).numpy(), of["bits"])
        rows, blocks = values.shape[:2]
        scales = self._read(self._scales[node.name]).float().reshape(rows, blocks)
        kind = np.int8 if of["bits"] == 4 else np.int16
        zero = np.full((rows, blocks), 1 << (of["bits"] - 1), kind)
        if len(node.input) > 3 and node.input[3]:
            zero = unpack(self._read(node.input[3]).numpy().reshape(rows, -1), of["bits"])[
                :, :blocks
            ].astype(kind)
        return torch.from_numpy(values.astype(kind) - zero[..., None]), scales


def _attend(of: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """GroupQueryAttention over (B, S, heads * D), causal, without a past."""

    def parted(x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    groups = of["kv_num_heads"]
    q, k, v = parted(q, of["num_heads"]), parted(k, groups), parted(v, groups)
    found = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=of["scale"], enable_gqa=True
    )
    return found.transpose(1, 2).flatten(2)


def _rotate(of: dict[str, Any], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RotaryEmbedding of (B, S, heads * D) by cos and sin (B, S, D / 2), whose halves make
    pairs.
    """
    first, second = x.unflatten(-1, (of["num_heads"], 2, -1)).unbind(-2)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -2).flatten(2)


def _split(of: dict[str, Any], x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(of["num_outputs"], of["axis"])


OPERATORS: dict[
    str, Callable[..., Any]
] = {  # what the decoders of all families are made of (docs/families.md)
    "Add": lambda _, a, b: a + b,
    "Cast": lambda of, x: x.to(
        torch.float32 if of["to"] == onnx.TensorProto.FLOAT else torch.int64
    ),
    "Concat": lambda of, *parts: torch.cat([p.reshape(-1) for p in parts], of["axis"]),
    "Cos": lambda _, x: x.cos(),
    "Gather": lambda of, x, at: x.index_select(of["axis"], at),
    "GroupQueryAttention": _attend,
    "MatMul": lambda _, a, b: a @ b,
    "Mul": lambda _, a, b: a * b,
    "Reshape": lambda _, x, shape: x.reshape(shape.tolist()),
    "RMSNormalization": lambda of, x, weight: functional.rms_norm(
        x, weight.shape, weight, of["epsilon"]
    ),
    "RotaryEmbedding": _rotate,
    "Sigmoid": lambda _, x: x.sigmoid(),
    "Sin": lambda _, x: x.sin(),
    "Split": _split,
    "Transpose": lambda of, x: x.permute(of["perm"]),
}


class Tuning:
    """A quantized bundle in `folder` beside what fp32 made of the same readings.

    runtime: has the head that turns fp32's states into the distributions to keep.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, runtime: OnnxRuntime, readings: list[Reading]
    ) -> None:
        self._decoder, self._head = (
            Graph(folder / manifest.graphs[name].path) for name in ("decoder", "lm_head")
        )
        self._embed = open_session(folder / manifest.graphs["embed_tokens"].path)
        self._runtime, self._tokens = runtime, runtime.processor.tokens
        self._held_out = [reading for reading in readings if reading.prompt % HELD_OUT == 0]
        self._taught = [reading for reading in readings if reading.prompt % HELD_OUT]
        self._added = manifest.graphs["decoder"].inputs.get("deepstack_embeds")

    def run(self, steps: int) -> dict[str, Any]:
        """Train for so many steps; what was trained is written only where the readings held out
        came nearer to fp32's.
        """
        before = self._loss_held_out()
        optimizer = torch.optim.Adam(self._decoder.parameters(), RATE, betas=(0.9, 0.95))
        slow = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2,
        )
        rng = np.random.default_rng(0)
        order: list[int] = []
        for _ in terminal.bar(range(steps), "scales and norms"):
            for _ in range(BATCH):
                order = order or list(rng.permutation(len(self._taught)))
                (self._loss(self._taught[order.pop()]) / BATCH).backward()
            optimizer.step()
            optimizer.zero_grad()
            slow.step()
        after = self._loss_held_out()
        if after < before:
            self._decoder.write()
        return {
            "steps": steps,
            "loss_before": before,
            "loss_after": after,
            "kept": after < before,
            "held_out": len(self._held_out),
        }

    def _loss_held_out(self) -> float:
        with torch.no_grad():
            return float(np.mean([float(self._loss(reading)) for reading in self._held_out]))

    def _loss(self, reading: Reading) -> Tensor:
        """KL of the distributions after each word, in nats, and 1 - cosine of the states that are
        latents: means of both, added.
        """
        tokens, ids = self._tokens, reading.ids
        latent = (ids == tokens.lvr) | (ids == tokens.lvr_start)
        word = ~latent & (ids != tokens.image)
        states = self.states(reading)
        wanted = torch.from_numpy(self._runtime.head(reading.states[word])).log_softmax(-1)
        loss = functional.kl_div(
            self._head({"last_hidden_state": states[word]}).log_softmax(-1),
            wanted,
            reduction="batchmean",
            log_target=True,
        )
        if latent.any():
            loss = (
                loss
                + (
                    1
                    - functional.cosine_similarity(
                        states[latent], torch.from_numpy(reading.states[latent])
                    )
                ).mean()
            )
        return loss

    def states(self, reading: Reading) -> Tensor:
        """The quantized decoder's (S, H), the words embedded by its own table, latents as fp32 fed
        them.
        """
        given = ~np.isin(
            reading.ids, (self._tokens.image, self._tokens.lvr)
        )  # words, as the quantized table has them
        embeds = reading.call.hidden.copy()
        embeds[0, given] = self._embed.run(None, {"input_ids": reading.ids[None, given]})[0][0]
        inputs = {"inputs_embeds": embeds, "position_ids": reading.call.positions}
        if self._added is not None:
            none = np.zeros((*embeds.shape[:2], int(self._added.axes[-1])), np.float32)
            inputs["deepstack_embeds"] = none if reading.call.added is None else reading.call.added
        return self._decoder({name: torch.from_numpy(value) for name, value in inputs.items()})[0]
