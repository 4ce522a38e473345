"""The vision graph of the Qwen-VL families. May import: torch, the families.

Linear layers must leave as MatMul, so the tower, which transformers runs on (N, C), runs here on
(1, N, C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lvr_lite.export.graphs.operators import as_linear, attention, normalized, rotary
from lvr_lite.export.graphs.spec import GraphSpec, axis
from lvr_lite.export.weights import TransformersModule
from lvr_lite.model.families import Grid
from lvr_lite.model.processor import Processor

# Added to scores of patches that must not see each other; finite, so that no row is all -inf.
MASKED = -1e9


class VisionEncoder(nn.Module):
    """Patches of any number of pictures -> visual tokens.

        pixel_values ── patch_embed ──(+ learned positions)──(reorder by window)─┐
                ┌────────────────────────────────────────────────────────────────┘
                ├─ norm ── attention ── + ── norm ── mlp ── + ──┬── next block …
                └───────────────────────┘                       └── merger (deepstack)
        … ── merger ──(beside it: deepstack)──(back into reading order)── image_features

    What depends on the pictures' sizes comes in by name (a family's `vision_inputs`), and not all
    families have all of it: windows where there is a `window_index` (Qwen2.5-VL); learned positions
    where there are `near_ids`, and deepstack, features of inner blocks (Qwen3-VL).
    """

    def __init__(
        self, tower: TransformersModule, names: Sequence[str], deepstack: Sequence[int]
    ) -> None:
        """names: of the inputs beside pixels, in their order.
        deepstack: the blocks whose output is handed on too."""
        super().__init__()
        self.names = names
        self.deepstack = deepstack
        # Attributes have transformers' names, because nodes and weights are named after them.
        self.visual = tower
        self.patch_embed = as_linear(tower.patch_embed.proj)

    def forward(self, pixel_values: Tensor, others: list[Tensor]) -> Tensor:
        """pixel_values (N, 3 * temporal * patch**2) -> (N / merge**2, (1 + D) * H)."""
        inputs = dict(zip(self.names, others, strict=True))
        tower = self.visual
        unit = tower.spatial_merge_size**2
        x = self.patch_embed(pixel_values[None])
        # The one name of this size in the graph; that of another tensor would be a second one.
        n = x.shape[1]
        positions = inputs["position_ids"]
        if "near_ids" in inputs:
            near = tower.pos_embed(inputs["near_ids"])
            weights = inputs["near_weights"][..., None]
            x = x + (near * weights).sum(1)
        within_image = _attention_bias(inputs["image_id"])
        within_window = None
        if "window_index" in inputs:
            order = inputs["window_index"]
            x = _reordered(x, order, n, unit).reshape(1, n, x.shape[2])
            positions = _reordered(positions, order, n, unit).reshape(n, 2)
            within_window = _attention_bias(inputs["window_id"])
        cos, sin = self._rotation(positions, n)
        deep = []
        for i, block in enumerate(tower.blocks):
            bias = within_window
            if within_window is None or i in tower.fullatt_block_indexes:
                bias = within_image
            y = normalized(block.norm1, x)
            x = x + _self_attention(block.attn, y, cos, sin, bias)
            y = normalized(block.norm2, x)
            x = x + block.mlp(y)
            if i in self.deepstack:
                place = self.deepstack.index(i)
                merger = tower.deepstack_merger_list[place]
                deep.append(_merged(merger, x, unit))
        merged = _merged(tower.merger, x, unit)
        tokens = torch.cat([merged, *deep], -1)[0]
        if "reverse_index" in inputs:
            tokens = tokens.index_select(0, inputs["reverse_index"])
        return tokens

    def _rotation(self, positions: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Positions (N, 2), row and column, of n patches -> cos, sin (1, N, head_dim / 2)."""
        angles = positions[..., None].float() * self.visual.rotary_pos_emb.inv_freq
        angles = angles.reshape(1, n, -1)
        return angles.cos(), angles.sin()


def _reordered(
    x: Tensor,
    order: Tensor,
    n: int,
    unit: int,
) -> Tensor:
    """x (…, N, C), whose runs of `unit` patches are visual tokens -> its tokens in this order,
    (N / unit, unit * C).
    """
    return x.reshape(n // unit, unit * x.shape[-1]).index_select(0, order)


def _attention_bias(ids: Tensor) -> Tensor:
    """(N, N): 0 where two patches have the same id, else MASKED."""
    same = ids[:, None] == ids[None]
    return torch.where(same, 0.0, MASKED)


def _self_attention(
    module: TransformersModule,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """x (1, N, C) -> (1, N, C).

    x ── qkv ─┬─ q ── rotary ─┐
              ├─ k ── rotary ─┼─ attention ── proj
              └─ v ───────────┘
    """
    heads = module.num_heads
    q, k, v = module.qkv(x).chunk(3, -1)
    q = rotary(q, cos, sin, heads)
    k = rotary(k, cos, sin, heads)
    out = attention(q, k, v, heads, module.scaling, bias)
    out = out.reshape(1, x.shape[1], -1)
    return torch.as_tensor(module.proj(out))


def _merged(merger: TransformersModule, x: Tensor, unit: int) -> Tensor:
    """Patches (1, N, C) -> visual tokens (1, N / unit, H)."""
    blocks = (1, x.shape[1] // unit, unit * x.shape[2])
    # transformers' merger of Qwen2-VL and Qwen2.5-VL has other modules than that of Qwen3-VL.
    if hasattr(merger, "ln_q"):
        x = normalized(merger.ln_q, x).reshape(blocks)
        return torch.as_tensor(merger.mlp(x))
    if merger.use_postshuffle_norm:
        x = merger.norm(x.reshape(blocks))
    else:
        x = merger.norm(x).reshape(blocks)
    x = merger.act_fn(merger.linear_fc1(x))
    return torch.as_tensor(merger.linear_fc2(x))


def vision_spec(
    tower: TransformersModule, processor: Processor, deepstack: Sequence[int]
) -> GraphSpec:
    """The vision graph, with three pictures of two visual tokens each as its example."""
    merge = tower.spatial_merge_size
    grids = [
        Grid(2 * merge, merge),
        Grid(merge, 2 * merge),
        Grid(merge, 2 * merge),
    ]
    channels = tower.patch_embed.proj.weight[0].numel()
    arrays = processor.vision_inputs(grids)
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    module = VisionEncoder(tower, list(inputs), deepstack)
    patches = torch.randn(6 * merge**2, channels)
    tokens = axis("tokens")
    first = {
        "patches": {0: merge**2 * tokens},
        "tokens": {0: tokens},
    }
    axes = processor.family.vision_axes
    varying = [first[axes[name]] for name in inputs]
    return GraphSpec(
        module=module,
        arguments=(patches, list(inputs.values())),
        inputs=["pixel_values", *inputs],
        outputs=["image_features"],
        varying=(first["patches"], varying),
    )
