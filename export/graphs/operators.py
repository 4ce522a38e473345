"""Operators of ONNX that torch has none for, and the attention of the vision towers.

May import: torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lvr_lite.export.weights import TransformersModule

# The first version with RMSNormalization and RotaryEmbedding.
OPSET = 23


def operator(
    name: str,
    inputs: Sequence[Tensor],
    attributes: Mapping[str, int | float],
    like: Sequence[Tensor],
    version: int = 1,
) -> Sequence[Tensor]:
    """An ONNX operator by its name; its outputs have the types and shapes of the tensors `like`."""
    return torch.onnx.ops.symbolic_multi_out(
        name,
        inputs,
        attrs=dict(attributes),
        dtypes=[t.dtype for t in like],
        shapes=[t.shape for t in like],
        version=version,
    )


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
) -> Tensor:
    """x (B, S, heads * head_dim) turned by cos, sin (B, S, head_dim / 2)."""
    return operator(
        name="RotaryEmbedding",
        inputs=(x, cos, sin),
        attributes={"num_heads": heads},
        like=(x,),
        version=OPSET,
    )[0]


def normalized(norm: TransformersModule, x: Tensor) -> Tensor:
    """x (…, C) through a LayerNorm, or through an RMSNorm of transformers."""
    if isinstance(norm, nn.LayerNorm):
        return torch.as_tensor(norm(x))
    attributes = {"axis": -1, "epsilon": float(norm.variance_epsilon)}
    return operator(
        name="RMSNormalization",
        inputs=(x, norm.weight),
        attributes=attributes,
        like=(x,),
        version=OPSET,
    )[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of patches to patches (B, N, heads, head_dim).

    q, k, v (B, N, heads * head_dim).
    scale: of the scores.
    bias (N, N): what is added to the scores, if anything.

        q ─┐
        k ─┴─ q kᵀ · scale + bias ── softmax ─┐
        v ────────────────────────────────────┴─ @
    """
    batch, patches, _ = q.shape
    # (B, heads, N, head_dim)
    q, k, v = (t.reshape(batch, patches, heads, -1).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    weights = torch.softmax(scores if bias is None else scores + bias, -1)
    return (weights @ v).transpose(1, 2)


def as_linear(convolution: TransformersModule) -> nn.Linear:
    """A convolution whose kernel is as large as its stride, as the matrix product that it is."""
    kernel = convolution.weight.detach()
    bias = convolution.bias
    linear = nn.Linear(kernel[0].numel(), kernel.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(kernel.reshape(kernel.shape[0], -1), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
