"""The decoder's graph, and those of its ends: the embedding and the head. May import: torch, the
families.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lvr_lite.export.graphs.operators import normalized, operator, rotary
from lvr_lite.export.graphs.spec import GraphSpec, axis
from lvr_lite.export.weights import TransformersModule
from lvr_lite.model.families import Family


class EmbedTokens(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, S) -> embeddings (B, S, H)."""
        return torch.as_tensor(self.embed_tokens(input_ids))


class Decoder(nn.Module):
    """Embeddings in, final hidden states out; keys and values in one buffer of fixed capacity,
    given in and handed back.

        hidden ─┬─ norm ── attention ── + ─┬─ norm ── mlp ── + ──(+ deepstack)── next layer …
                └───────────────────────┘  └─────────────────┘

    axes (head_dim / 2,): which of the three position ids each rotary frequency follows (a family's
    `rope_axes`).
    """

    axes: Tensor

    def __init__(self, text_model: TransformersModule, axes: Tensor) -> None:
        super().__init__()
        # Attributes have transformers' names, because nodes and weights are named after them.
        self.language_model = text_model
        self.register_buffer("axes", axes, persistent=False)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        past: list[Tensor],
        deepstack: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Returns final hidden states (B, S, H), then `past` with the new keys and values in it.

        inputs_embeds: (B, S, H).
        position_ids: (3, B, S).
        seqlens_k: (B,) int32, the positions of each row so far, with these, less one.
        total_sequence_length: (), int32, the most positions of any row so far, with these.
        past: key and value (B, kv_heads, capacity, head_dim) of layer 0, of layer 1, …
        deepstack: (B, S, D * H), what is added after each of the first D layers, 0 for all but
            visual tokens; None where D is 0.
        """
        hidden = inputs_embeds
        width = inputs_embeds.shape[-1]
        added = []
        if deepstack is not None:
            added = list(deepstack.split(width, -1))
        cos, sin = self._rotation(position_ids)
        present: list[Tensor] = []
        for i, layer in enumerate(self.language_model.layers):
            x, key, value = _self_attention(
                layer.self_attn,
                normalized(layer.input_layernorm, hidden),
                (cos, sin),
                (past[2 * i], past[2 * i + 1]),
                (seqlens_k, total_sequence_length),
            )
            present += [key, value]
            hidden = hidden + x
            hidden = hidden + layer.mlp(normalized(layer.post_attention_layernorm, hidden))
            if i < len(added):
                hidden = hidden + added[i]
        return (normalized(self.language_model.norm, hidden), *present)

    def _rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """mRoPE: position ids (3, B, S) -> cos, sin (B, S, head_dim / 2)."""
        module = self.language_model.rotary_emb
        angles = position_ids.index_select(0, self.axes).permute(1, 2, 0).float() * module.inv_freq
        return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling


def _self_attention(
    module: TransformersModule,
    x: Tensor,
    rotation: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, S, H) -> what attention adds (B, S, H), and the cache with the new keys and values.

        x ─┬─ q_proj ──(q_norm)── rotary ──┐
           ├─ k_proj ──(k_norm)── rotary ──┼─ GroupQueryAttention ─┬─ o_proj
           └─ v_proj ──────────────────────┤                       └─ cache
        cache, lengths ────────────────────┘

    The rotation stands outside GroupQueryAttention, whose own ignores position ids in prefill
    (docs/decisions.md).
    """
    config = module.config
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads
    q = module.q_proj(x)
    k = module.k_proj(x)
    v = module.v_proj(x)
    # Only the attention of Qwen3 normalizes queries and keys.
    if hasattr(module, "q_norm"):
        q = _normalized_heads(module.q_norm, q, heads)
        k = _normalized_heads(module.k_norm, k, kv_heads)
    q = rotary(q, *rotation, heads)
    k = rotary(k, *rotation, kv_heads)
    attributes = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(module.scaling),
        "do_rotary": 0,
    }
    out, key, value = operator(
        "com.microsoft::GroupQueryAttention",
        (q, k, v, *cache, *lengths),
        attributes,
        (q, *cache),
    )
    return module.o_proj(out), key, value


def _normalized_heads(norm: TransformersModule, x: Tensor, heads: int) -> Tensor:
    """x (B, S, heads * head_dim), each head normalized by itself."""
    batch, length, width = x.shape
    by_head = x.reshape(batch, length, heads, width // heads)
    return normalized(norm, by_head).reshape(batch, length, width)


class Head(nn.Module):
    def __init__(self, lm_head: nn.Module) -> None:
        super().__init__()
        self.lm_head = lm_head

    def forward(self, last_hidden_state: Tensor) -> Tensor:
        """Final hidden states (B, S, H) -> logits (B, S, V)."""
        return torch.as_tensor(self.lm_head(last_hidden_state))


def embed_spec(embedding: nn.Module) -> GraphSpec:
    return GraphSpec(
        module=EmbedTokens(embedding),
        arguments=(torch.zeros(2, 3, dtype=torch.long),),
        inputs=["input_ids"],
        outputs=["inputs_embeds"],
        varying=({0: axis("batch"), 1: axis("sequence")},),
    )


def head_spec(lm_head: TransformersModule) -> GraphSpec:
    return GraphSpec(
        module=Head(lm_head),
        arguments=(torch.zeros(2, 3, lm_head.weight.shape[1]),),
        inputs=["last_hidden_state"],
        outputs=["logits"],
        varying=({0: axis("batch"), 1: axis("sequence")},),
    )


def decoder_spec(text_model: TransformersModule, family: Family, deepstack: int) -> GraphSpec:
    """The decoder's graph, with two rows of three positions as its example.

    deepstack: after how many layers features are added.
    """
    config = text_model.config
    layers = len(text_model.layers)
    # B, S, capacity
    b = 2
    s = 3
    cache = (b, config.num_key_value_heads, 16, text_model.layers[0].self_attn.head_dim)
    batch = axis("batch")
    sequence = axis("sequence")
    capacity = axis("capacity")
    past = [torch.zeros(cache) for _ in range(2 * layers)]
    names = [
        "inputs_embeds",
        "position_ids",
        "seqlens_k",
        "total_sequence_length",
        *_cache_names(layers, "past_key_values"),
    ]
    arguments: list[Tensor | list[Tensor]] = [
        torch.randn(b, s, config.hidden_size),
        torch.arange(s).expand(3, b, s).contiguous(),
        torch.full((b,), s - 1, dtype=torch.int32),
        torch.tensor(s, dtype=torch.int32),
        past,
    ]
    varying: list[object] = [
        {0: batch, 1: sequence},
        {1: batch, 2: sequence},
        {0: batch},
        {},
        [{0: batch, 2: capacity}] * len(past),
    ]
    if deepstack:
        names.append("deepstack_embeds")
        arguments.append(torch.randn(b, s, deepstack * config.hidden_size))
        varying.append({0: batch, 1: sequence})
    module = text_model.rotary_emb
    # SmolVLM's language model has no sections: its positions count on.
    sections = getattr(module, "mrope_section", None)
    axes = torch.from_numpy(family.rope_axes(sections, len(module.inv_freq)))
    return GraphSpec(
        module=Decoder(text_model, axes),
        arguments=tuple(arguments),
        inputs=names,
        outputs=["last_hidden_state", *_cache_names(layers, "present")],
        varying=tuple(varying),
    )


def _cache_names(layers: int, prefix: str) -> list[str]:
    """Names in the graph's order: key and value of layer 0, of layer 1, …"""
    return [f"{prefix}.{i}.{part}" for i in range(layers) for part in ("key", "value")]
