"""A decoder or head of integer weights as torch reads it, so that gradients pass through. May
import: torch, onnx, numpy and what stands above `quant`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor
from torch.nn import functional

from lvr_lite.errors import BundleError
from lvr_lite.export import onnxfile
from lvr_lite.quant.blocks import storable, unpack

# {name: value} of an ONNX node.
Attributes = dict[str, Any]


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
        matrix = _matrix(integers, scales, x.shape[-1])
        by_x = grad @ matrix
        if not ctx.needs_input_grad[2]:
            return by_x, None, None
        rows = x.flatten(0, -2)
        by_matrix = grad.flatten(0, -2).T @ rows
        padding = integers[0].numel() - by_matrix.shape[1]
        by_integers = functional.pad(by_matrix, (0, padding))
        by_integers = by_integers.reshape(integers.shape)
        by_scales = (by_integers * integers).sum(-1)
        return by_x, None, by_scales


def _matrix(integers: Tensor, scales: Tensor, columns: int) -> Tensor:
    blocks = integers * scales[..., None]
    rows = blocks.flatten(1)
    return rows[:, :columns]


class TorchGraph:
    """One graph over whole sequences: no K/V, activations in float32.

    factors: {initializer of scales: what they are multiplied with, (N, blocks), 1 at first}.
    norms: {initializer: values of a norm}.
    These two are what is trained. Raises BundleError for an operator that has no rule here.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._model = onnxfile.load(file)
        nodes = list(self._model.graph.node)
        self._check_operators(nodes)
        self._stored = {tensor.name: tensor for tensor in self._model.graph.initializer}
        products = [node for node in nodes if node.op_type == "MatMulNBits"]
        widened = self._widened_scales(nodes)
        self._nodes = [node for node in nodes if node.output[0] not in widened]
        # {product: name of its scales as they are stored}; several may share these.
        self._scales: dict[str, str] = {}
        # {product: its integers and scales}
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}
        self.factors: dict[str, Tensor] = {}
        read_by_products: set[str] = set()
        for node in products:
            scales_input = node.input[2]
            name = widened.get(scales_input, scales_input)
            self._scales[node.name] = name
            integers, scales = self._integers(node)
            self._weights[node.name] = (integers, scales)
            self.factors[name] = torch.ones_like(scales, requires_grad=True)
            read_by_products.update(node.input[1:])
        norms = {node.input[1] for node in nodes if node.op_type == "RMSNormalization"}
        self.norms = {name: self._read(name).requires_grad_() for name in norms}
        elsewhere = {*norms, *widened.values(), *read_by_products}
        constants = [name for name in self._stored if name not in elsewhere]
        self._constants = {name: self._read(name) for name in constants}

    def _widened_scales(self, nodes: list[onnx.NodeProto]) -> dict[str, str]:
        """{scales in float32: scales as they are stored}"""
        return {
            node.output[0]: node.input[0]
            for node in nodes
            if node.op_type == "Cast" and node.input[0] in self._stored
        }

    def parameters(self) -> list[Tensor]:
        return [*self.factors.values(), *self.norms.values()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The graph's first output. inputs: all that it has but K/V and lengths."""
        values: dict[str, Tensor] = {**self._constants, **self.norms, **inputs}
        for node in self._nodes:
            outputs = self._run(node, values)
            # Of attention, K and V are left out.
            values.update(zip(node.output, outputs, strict=False))
        return values[self._model.graph.output[0].name]

    def write(self) -> None:
        """Put what was trained where it came from; scales in float16, as they are stored."""
        for node, name in self._scales.items():
            _, scales = self._weights[node]
            factor = self.factors[name].detach()
            stored = storable((scales * factor).numpy())
            shape = tuple(self._stored[name].dims)
            self._put(name, stored.reshape(shape))
        for name, values in self.norms.items():
            self._put(name, values.detach().numpy())
        content = self._model.SerializeToString()
        self._file.write_bytes(content)

    def _check_operators(self, nodes: list[onnx.NodeProto]) -> None:
        known = {*OPERATORS, "MatMulNBits", "Shape"}
        unknown = {node.op_type for node in nodes} - known
        if not unknown:
            return
        names = ", ".join(sorted(unknown))
        raise BundleError(
            f"{self._file}: cannot be trained through {names}; --tune-steps 0 goes without training"
        )

    def _run(self, node: onnx.NodeProto, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if node.op_type == "MatMulNBits":
            integers, scales = self._weights[node.name]
            factor = self.factors[self._scales[node.name]]
            x = values[node.input[0]]
            product = _Product.apply(x, integers, scales * factor)
            return (product,)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Shape":
            # Of the input, or of the cache, which has as many rows.
            shaped = values.get(node.input[0], values["inputs_embeds"])
            start = attributes.get("start", 0)
            end = attributes.get("end")
            return (torch.tensor(shaped.shape[start:end]),)
        operator = OPERATORS[node.op_type]
        inputs = [values.get(name) for name in node.input]
        outputs = operator(attributes, *inputs)
        if isinstance(outputs, tuple):
            return outputs
        return (outputs,)

    def _put(self, name: str, values: np.ndarray) -> None:
        tensor = self._stored[name]
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        stored = np.ascontiguousarray(values, kind)
        onnxfile.overwrite(tensor, self._file.parent, stored)

    def _read(self, name: str) -> Tensor:
        values = onnxfile.read(self._stored[name], self._file.parent)
        return torch.from_numpy(np.array(values))

    def _integers(self, node: onnx.NodeProto) -> tuple[Tensor, Tensor]:
        """(N, blocks, block) less their zero points, int8 or int16; scales (N, blocks) float32."""
        bits = next(a.i for a in node.attribute if a.name == "bits")
        kind = np.int8 if bits == 4 else np.int16
        packed = self._read(node.input[1]).numpy()
        values = unpack(packed, bits).astype(kind)
        rows, blocks = values.shape[:2]
        if len(node.input) > 3 and node.input[3]:
            packed = self._read(node.input[3]).numpy().reshape(rows, -1)
            zero = unpack(packed, bits)[:, :blocks].astype(kind)
        else:
            zero = np.full((rows, blocks), 1 << (bits - 1), kind)
        integers = values - zero[..., None]
        scales = self._read(self._scales[node.name])
        scales = scales.float().reshape(rows, blocks)
        return torch.from_numpy(integers), scales


def _attend(attributes: Attributes, q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> Tensor:
    """GroupQueryAttention over (B, S, heads * D), causal, without a past."""
    groups = attributes["kv_num_heads"]
    attended = functional.scaled_dot_product_attention(
        _heads(q, attributes["num_heads"]),
        _heads(k, groups),
        _heads(v, groups),
        is_causal=True,
        scale=attributes["scale"],
        enable_gqa=True,
    )
    return attended.transpose(1, 2).flatten(2)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, heads * D) -> (B, heads, S, D)."""
    batch, length, _ = x.shape
    split = x.view(batch, length, heads, -1)
    return split.transpose(1, 2)


def _rotate(
    attributes: Attributes,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """RotaryEmbedding of (B, S, heads * D) by cos and sin (B, S, D / 2), whose halves make
    pairs.
    """
    heads = attributes["num_heads"]
    halves = x.unflatten(-1, (heads, 2, -1))
    first, second = halves.unbind(-2)
    # the same for all heads
    cos = cos[:, :, None]
    sin = sin[:, :, None]
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    rotated = torch.stack((rotated_first, rotated_second), -2)
    return rotated.flatten(2)


def _cast(attributes: Attributes, x: Tensor) -> Tensor:
    if attributes["to"] == onnx.TensorProto.FLOAT:
        return x.to(torch.float32)
    return x.to(torch.int64)


def _concatenate(attributes: Attributes, *parts: Tensor) -> Tensor:
    flat = [part.reshape(-1) for part in parts]
    return torch.cat(flat, attributes["axis"])


def _gather(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    return x.index_select(attributes["axis"], indices)


def _split(attributes: Attributes, x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(attributes["num_outputs"], attributes["axis"])


def _normalize(attributes: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, attributes["epsilon"])


# What the decoders of all families are made of (docs/families.md).
OPERATORS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "Add": lambda _, a, b: a + b,
    "Cast": _cast,
    "Concat": _concatenate,
    "Cos": lambda _, x: x.cos(),
    "Gather": _gather,
    "GroupQueryAttention": _attend,
    "MatMul": lambda _, a, b: a @ b,
    "Mul": lambda _, a, b: a * b,
    "Reshape": lambda _, x, shape: x.reshape(shape.tolist()),
    "RMSNormalization": _normalize,
    "RotaryEmbedding": _rotate,
    "Sigmoid": lambda _, x: x.sigmoid(),
    "Sin": lambda _, x: x.sin(),
    "Split": _split,
    "Transpose": lambda a, x: x.permute(a["perm"]),
}
