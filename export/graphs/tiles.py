"""The vision graph of SmolVLM. May import: torch, the families."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lvr_lite.export.graphs.operators import as_linear, attention
from lvr_lite.export.graphs.spec import GraphSpec, axis
from lvr_lite.export.weights import TransformersModule
from lvr_lite.model.families import Family


class TileEncoder(nn.Module):
    """Patches of any number of tiles, all of one size and each seen by itself -> visual tokens.

    pixel_values ── patch_embed ── + places ─┐
            ┌────────────────────────────────┘
            ├─ norm ── attention ── + ── norm ── mlp ── + ── next layer …
            └───────────────────────┘
    … ── norm ── merge x merge patches side by side ── connector ── image_features
    """

    def __init__(self, tower: TransformersModule, connector: TransformersModule) -> None:
        super().__init__()
        # Attributes have transformers' names, because nodes and weights are named after them.
        self.vision_model = tower
        self.connector = connector
        self.patch_embed = as_linear(tower.embeddings.patch_embedding)
        self.merge = connector.scale_factor
        self.patches = tower.embeddings.num_patches
        # The learned position of each patch, in the order in which a family cuts patches: the rows
        # of the model's own parameter that `tile_spec` names.
        learned = tower.embeddings.position_embedding.weight.detach()
        self.places = nn.Parameter(learned, requires_grad=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (tiles * P, 3 * patch**2) -> (tiles * P / merge**2, H)."""
        # (tiles, P, C)
        x = self.patch_embed(pixel_values.reshape(-1, self.patches, pixel_values.shape[1]))
        x = x + self.places
        for layer in self.vision_model.encoder.layers:
            x = x + _self_attention(layer.self_attn, layer.layer_norm1(x))
            x = x + layer.mlp(layer.layer_norm2(x))
        x = self.vision_model.post_layernorm(x)
        merged = x.reshape(-1, self.patches // self.merge**2, x.shape[2] * self.merge**2)
        features = self.connector.modality_projection(merged)
        return torch.as_tensor(features.reshape(-1, features.shape[2]))


def _self_attention(module: TransformersModule, x: Tensor) -> Tensor:
    """x (tiles, P, C) -> (tiles, P, C); every patch attends within its tile."""
    q = module.q_proj(x)
    k = module.k_proj(x)
    v = module.v_proj(x)
    out = attention(q, k, v, module.num_heads, module.scale)
    return torch.as_tensor(module.out_proj(out.reshape(x.shape)))


def tile_spec(
    tower: TransformersModule, connector: TransformersModule, family: Family
) -> GraphSpec:
    """The vision graph, with two tiles as its example."""
    module = TileEncoder(tower, connector)
    side = tower.embeddings.num_patches_per_side
    return GraphSpec(
        module=module,
        arguments=(torch.randn(2 * module.patches, module.patch_embed.in_features),),
        inputs=["pixel_values"],
        outputs=["image_features"],
        varying=({0: module.patches * axis("tiles")},),
        rows={"places": family.learned_places(side, module.merge)},
    )
