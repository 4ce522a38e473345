"""The four graphs of a bundle as torch modules, and their export to ONNX. May import: torch, onnx,
onnx_ir and the core.

    pixel_values ─ vision_encoder ─ image_features ┐
    input_ids ──── embed_tokens ─── inputs_embeds ─┴─ decoder ─ last_hidden_state ─ lm_head ─ logits
                                          └───────── latent step ◄──────┘

Every linear layer leaves as MatMul (+ Add) with its weight as (in, out), never as Gemm: weight
quantizers read MatMul only. So the vision tower, which transformers runs on (N, C), runs here on
(1, N, C).
"""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from lvr_lite.errors import LvrError
from lvr_lite.export.onnxfile import declared
from lvr_lite.generate.torch import language_model
from lvr_lite.model.families import Family, Grid
from lvr_lite.model.processor import Processor

OPSET = 23  # the first with RMSNormalization and RotaryEmbedding
MASKED = -1e9  # added to attention scores; finite, so that no softmax row is ever all -inf


def _operator(
    name: str,
    inputs: Sequence[Tensor],
    attributes: dict[str, Any],
    like: Sequence[Tensor],
    version: int = 1,
) -> Sequence[Tensor]:
    """An ONNX operator by its name, whose outputs have the types and shapes of the tensors
    `like`.
    """
    return torch.onnx.ops.symbolic_multi_out(
        name,
        inputs,
        attrs=attributes,
        dtypes=[t.dtype for t in like],
        shapes=[t.shape for t in like],
        version=version,
    )


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """x (B, S, heads * head_dim) turned by cos, sin (B, S, head_dim / 2)."""
    return _operator("RotaryEmbedding", (x, cos, sin), {"num_heads": heads}, (x,), version=OPSET)[0]


def _norm(norm: Any, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return torch.as_tensor(norm(x))
    return _operator(
        "RMSNormalization",
        (x, norm.weight),
        {"axis": -1, "epsilon": float(norm.variance_epsilon)},
        (x,),
        version=OPSET,
    )[0]


class VisionEncoder(nn.Module):
    """Patches of any number of pictures -> visual tokens. What depends on sizes comes in by name (a
    family's `vision_inputs`).

    Of the parts that not all towers have: attention in windows (Qwen2.5-VL) where a window_index is
    given; learned positions of patches, and features of inner layers side by side with the last
    ones (Qwen3-VL, deepstack).
    """

    def __init__(self, tower: Any, names: list[str]) -> None:
        super().__init__()
        self.names = names  # of the inputs beside pixels, in their order
        self.visual = tower  # attributes have transformers' names, and so have nodes and weights
        self.patch_embed = _as_linear(tower.patch_embed.proj)
        self.deepstack = [int(i) for i in getattr(tower, "deepstack_visual_indexes", ())]
        self.unit = tower.spatial_merge_size**2

    def forward(self, pixel_values: Tensor, others: list[Tensor]) -> Tensor:
        tower, unit, inputs = self.visual, self.unit, dict(zip(self.names, others, strict=True))
        x, positions = (
            self.patch_embed(pixel_values[None]),
            inputs["position_ids"],
        )  # (1, N, C), (N, 2)
        if "near_ids" in inputs:
            x = x + (tower.pos_embed(inputs["near_ids"]) * inputs["near_weights"][..., None]).sum(1)
        n, width = x.shape[1], x.shape[2]
        within_image = within_window = _attention_bias(inputs["image_id"])
        order = inputs.get("window_index")
        if order is not None:
            x = x.reshape(n // unit, unit * width).index_select(0, order).reshape(1, n, width)
            positions = positions.reshape(n // unit, unit * 2).index_select(0, order).reshape(n, 2)
            within_window = _attention_bias(inputs["window_id"])
        angles = (positions[..., None].float() * tower.rotary_pos_emb.inv_freq).reshape(
            1, n, -1
        )  # (1, N, head_dim / 2): rows, columns
        cos, sin = angles.cos(), angles.sin()
        stacked = []
        for i, block in enumerate(tower.blocks):
            bias = (
                within_window
                if order is not None and i not in tower.fullatt_block_indexes
                else within_image
            )
            x = x + _vision_attention(block.attn, _norm(block.norm1, x), cos, sin, bias)
            x = x + block.mlp(_norm(block.norm2, x))
            if i in self.deepstack:
                stacked.append(
                    _merged(tower.deepstack_merger_list[self.deepstack.index(i)], x, unit)
                )
        features = torch.cat([_merged(tower.merger, x, unit), *stacked], -1)[0]
        return features if order is None else features.index_select(0, inputs["reverse_index"])


def _merged(merger: Any, x: Tensor, unit: int) -> Tensor:
    """Patches (1, N, C) -> visual tokens (1, N / unit, H)."""
    blocks = (1, x.shape[1] // unit, unit * x.shape[2])
    if hasattr(merger, "ln_q"):
        return torch.as_tensor(merger.mlp(_norm(merger.ln_q, x).reshape(blocks)))
    x = (
        merger.norm(x.reshape(blocks))
        if merger.use_postshuffle_norm
        else merger.norm(x).reshape(blocks)
    )
    return torch.as_tensor(merger.linear_fc2(merger.act_fn(merger.linear_fc1(x))))


def _attention_bias(ids: Tensor) -> Tensor:
    """(N, N): 0 where two patches have the same id, else MASKED."""
    same = ids[:, None] == ids[None]
    return torch.where(same, 0.0, MASKED)


def _vision_attention(attention: Any, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
    """x (1, N, C) -> (1, N, C); every head attends where bias (N, N) is 0."""
    n, heads = x.shape[1], attention.num_heads
    q, k, v = attention.qkv(x).chunk(3, -1)
    q, k = _rotary(q, cos, sin, heads), _rotary(k, cos, sin, heads)
    q, k, v = (
        t.reshape(1, n, heads, -1).transpose(1, 2) for t in (q, k, v)
    )  # (1, heads, N, head_dim)
    weights = torch.softmax(q @ k.transpose(-1, -2) * attention.scaling + bias, -1)
    out: Tensor = attention.proj((weights @ v).transpose(1, 2).reshape(1, n, -1))
    return out


class TileEncoder(nn.Module):
    """Patches of any number of tiles, all of one size and each seen by itself -> visual tokens
    (SmolVLM).
    """

    def __init__(self, tower: Any, connector: Any) -> None:
        super().__init__()
        self.vision_model, self.connector = tower, connector
        embeddings = tower.embeddings
        self.patch_embed = _as_linear(embeddings.patch_embedding)
        self.merge, self.patches = connector.scale_factor, embeddings.num_patches
        self.places = nn.Parameter(
            embeddings.position_embedding.weight.detach(), requires_grad=False
        )  # of each patch; rows: see `_tiles`

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(
            pixel_values.reshape(-1, self.patches, pixel_values.shape[1])
        )  # (tiles, P, C)
        x = x + self.places
        for layer in self.vision_model.encoder.layers:
            x = x + _tile_attention(layer.self_attn, layer.layer_norm1(x))
            x = x + layer.mlp(layer.layer_norm2(x))
        x = self.vision_model.post_layernorm(x)
        merged = x.reshape(-1, self.patches // self.merge**2, x.shape[2] * self.merge**2)
        features = self.connector.modality_projection(merged)
        return torch.as_tensor(features.reshape(-1, features.shape[2]))


def _tile_attention(attention: Any, x: Tensor) -> Tensor:
    """x (tiles, P, C) -> (tiles, P, C); every patch attends in its tile."""
    tiles, patches, width = x.shape
    parts = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
    q, k, v = (t.reshape(tiles, patches, attention.num_heads, -1).transpose(1, 2) for t in parts)
    weights = torch.softmax(q @ k.transpose(-1, -2) * attention.scale, -1)
    return torch.as_tensor(
        attention.out_proj((weights @ v).transpose(1, 2).reshape(tiles, patches, width))
    )


def _as_linear(convolution: Any) -> nn.Linear:
    """A convolution whose kernel is its stride as the matrix product that it is."""
    kernel, bias = convolution.weight.detach(), convolution.bias
    linear = nn.Linear(kernel[0].numel(), kernel.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(kernel.reshape(kernel.shape[0], -1), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


class EmbedTokens(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.embed_tokens(input_ids)
        return embeds


class Decoder(nn.Module):
    """Embeddings in, final hidden states out; keys and values in one buffer of fixed capacity,
    given in and handed back.

    mRoPE is applied outside GroupQueryAttention: its own rotation ignores position ids in prefill
    (docs/decisions.md). axes (head_dim / 2,): which of the three position ids each rotary frequency
    follows (a family's `rope_axes`). deepstack (B, S, D * H): what is added after each of the first
    D layers, 0 for all but visual tokens; None where D is 0.
    """

    axes: Tensor

    def __init__(self, text_model: Any, axes: Tensor) -> None:
        super().__init__()
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
        hidden = inputs_embeds
        width = inputs_embeds.shape[-1]
        added = [] if deepstack is None else list(deepstack.split(width, -1))
        cos, sin = self._mrope(position_ids)
        present: list[Tensor] = []
        for i, layer in enumerate(self.language_model.layers):
            attention, (key, value) = layer.self_attn, past[2 * i : 2 * i + 2]
            config = attention.config
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            x = _norm(layer.input_layernorm, hidden)
            q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
            if hasattr(attention, "q_norm"):  # of each head
                q, k = (
                    _norm_heads(attention.q_norm, q, heads),
                    _norm_heads(attention.k_norm, k, kv_heads),
                )
            q, k = _rotary(q, cos, sin, heads), _rotary(k, cos, sin, kv_heads)
            x, key, value = _operator(
                "com.microsoft::GroupQueryAttention",
                (q, k, v, key, value, seqlens_k, total_sequence_length),
                {
                    "num_heads": heads,
                    "kv_num_heads": kv_heads,
                    "scale": float(attention.scaling),
                    "do_rotary": 0,
                },
                (q, key, value),
            )
            present += [key, value]
            hidden = hidden + attention.o_proj(x)
            hidden = hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))
            if i < len(added):
                hidden = hidden + added[i]
        return (_norm(self.language_model.norm, hidden), *present)

    def _mrope(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Position ids (3, B, S) -> cos, sin (B, S, head_dim / 2)."""
        rotary = self.language_model.rotary_emb
        angles = position_ids.index_select(0, self.axes).permute(1, 2, 0).float() * rotary.inv_freq
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling


def _norm_heads(norm: Any, x: Tensor, heads: int) -> Tensor:
    """x (B, S, heads * head_dim), each head normalized by itself."""
    batch, length, width = x.shape
    return _norm(norm, x.reshape(batch, length, heads, width // heads)).reshape(
        batch, length, width
    )


class Head(nn.Module):
    def __init__(self, lm_head: nn.Module) -> None:
        super().__init__()
        self.lm_head = lm_head

    def forward(self, last_hidden_state: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(last_hidden_state)
        return logits


@dataclass(frozen=True)
class Spec:
    """One graph to export: a module with example arguments, the names of its inputs and outputs,
    and which axes may vary.

    rows: {parameter of the module: which rows of what it was made of it has}.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    inputs: list[str]
    outputs: list[str]
    dynamic: tuple[Any, ...]
    rows: dict[str, np.ndarray] = field(default_factory=dict)


def specs(model: Any, processor: Processor) -> dict[str, Spec]:
    """Name -> Spec of the four graphs of a model in float32 on the CPU. processor: the
    model's.

    Raises LvrError for another dtype, and for features of the architecture that the graphs do not
    have.
    """
    _refuse_unknown(model)
    family = processor.family
    core, text = model.model, language_model(model)
    deepstack = len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())
    return {
        "vision_encoder": _tiles(core, family) if family.tiled else _vision(core.visual, processor),
        "embed_tokens": _embed(text.embed_tokens),
        "decoder": _decoder(text, family, deepstack),
        "lm_head": _head(model.lm_head),
    }


def _refuse_unknown(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise LvrError(
                f"export needs a float32 model; {name} is {parameter.dtype}: load and merge it in float32"
            )
    config = model.config.text_config
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "mrope"):
        raise LvrError(
            f"the checkpoint scales its positions ({kind!r}), which export cannot write yet; only 'default' is supported"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise LvrError(
            "the checkpoint uses sliding-window attention, which export cannot write yet; set use_sliding_window to false"
        )


def _axis(name: str) -> Any:
    return torch.export.Dim(name, min=1, max=1 << 20)


def _vision(tower: Any, processor: Processor) -> Spec:
    tokens, merge = _axis("tokens"), tower.spatial_merge_size
    grids = [
        Grid(2 * merge, merge),
        Grid(merge, 2 * merge),
        Grid(merge, 2 * merge),
    ]  # of two visual tokens each
    inputs = {
        name: torch.from_numpy(array) for name, array in processor.vision_inputs(grids).items()
    }
    patches, visual = {0: merge**2 * tokens}, {0: tokens}
    axes = [
        {"patches": patches, "tokens": visual}[processor.family.vision_axes[name]]
        for name in inputs
    ]
    arguments = (
        torch.randn(6 * merge**2, tower.patch_embed.proj.weight[0].numel()),
        list(inputs.values()),
    )
    return Spec(
        VisionEncoder(tower, list(inputs)),
        arguments,
        ["pixel_values", *inputs],
        ["image_features"],
        (patches, axes),
    )


def _tiles(core: Any, family: Family) -> Spec:
    module = TileEncoder(core.vision_model, core.connector)
    rows = {
        "places": family.learned_places(
            core.vision_model.embeddings.num_patches_per_side, module.merge
        )
    }
    patches, channels = 2 * module.patches, module.patch_embed.in_features
    return Spec(
        module,
        (torch.randn(patches, channels),),
        ["pixel_values"],
        ["image_features"],
        ({0: module.patches * _axis("tiles")},),
        rows,
    )


def _embed(embedding: nn.Module) -> Spec:
    ids = torch.zeros(2, 3, dtype=torch.long)
    return Spec(
        EmbedTokens(embedding),
        (ids,),
        ["input_ids"],
        ["inputs_embeds"],
        ({0: _axis("batch"), 1: _axis("sequence")},),
    )


def _head(lm_head: Any) -> Spec:
    hidden = torch.zeros(2, 3, lm_head.weight.shape[1])
    return Spec(
        Head(lm_head),
        (hidden,),
        ["last_hidden_state"],
        ["logits"],
        ({0: _axis("batch"), 1: _axis("sequence")},),
    )


def cache_names(layers: int, prefix: str) -> list[str]:
    """`past_key_values` or `present` names in the graph's order: key and value of layer 0, of layer
    1, …
    """
    return [f"{prefix}.{i}.{part}" for i in range(layers) for part in ("key", "value")]


def _decoder(text_model: Any, family: Family, deepstack: int) -> Spec:
    config, head_dim = text_model.config, text_model.layers[0].self_attn.head_dim
    layers, width = len(text_model.layers), config.hidden_size
    b, s, capacity = 2, 3, 16
    batch, sequence, room = _axis("batch"), _axis("sequence"), _axis("capacity")
    past = [
        torch.zeros(b, config.num_key_value_heads, capacity, head_dim) for _ in range(2 * layers)
    ]
    arguments: tuple[Any, ...] = (
        torch.randn(b, s, width),
        torch.arange(s).expand(3, b, s).contiguous(),
        torch.full((b,), s - 1, dtype=torch.int32),
        torch.tensor(s, dtype=torch.int32),
        past,
    )
    inputs = [
        "inputs_embeds",
        "position_ids",
        "seqlens_k",
        "total_sequence_length",
        *cache_names(layers, "past_key_values"),
    ]
    dynamic: tuple[Any, ...] = (
        {0: batch, 1: sequence},
        {1: batch, 2: sequence},
        {0: batch},
        {},
        [{0: batch, 2: room}] * len(past),
    )
    if deepstack:
        arguments += (torch.randn(b, s, deepstack * width),)
        inputs.append("deepstack_embeds")
        dynamic += ({0: batch, 1: sequence},)
    rotary = text_model.rotary_emb
    axes = torch.from_numpy(
        family.rope_axes(getattr(rotary, "mrope_section", None), len(rotary.inv_freq))
    )
    return Spec(
        Decoder(text_model, axes),
        arguments,
        inputs,
        ["last_hidden_state", *cache_names(layers, "present")],
        dynamic,
    )


class _Product(nn.Module):
    """A linear layer with its weight as (in, out), so that it leaves as MatMul without a
    transposition; an adapter stays beside it.
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t(), requires_grad=False)
        self.bias = linear.bias
        self.adapted = hasattr(linear, "lora_A")
        if self.adapted:
            self.lora_A, self.lora_B = (
                nn.Parameter(p.detach().t(), requires_grad=False)
                for p in (linear.lora_A, linear.lora_B)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        if self.adapted:
            y = y + (x @ self.lora_A) @ self.lora_B
        return y if self.bias is None else y + self.bias


def _as_products(module: nn.Module) -> list[str]:
    """Turns all linear layers below `module` into products; returns the names of the weights that
    they hold transposed.
    """
    transposed = []
    for path, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, product := _Product(child))
                held = [n for n, p in product.named_parameters() if p.dim() == 2]
                transposed += [".".join(filter(None, (path, name, n))) for n in held]
    return transposed


@dataclass(frozen=True)
class Origin:
    """Where an initializer's values come from: a parameter of the model, reshaped, or some of its
    rows, or transposed.
    """

    parameter: str
    transposed: bool
    rows: np.ndarray | None = None


def structure(spec: Spec, codes: dict[int, str]) -> tuple[onnx.ModelProto, dict[str, Origin]]:
    """The graph of an empty model's part, its weights declared and not there, and where each comes
    from. The part can be used once.

    codes: `lvr_lite.export.weights.origins` of the model. Raises LvrError where a linear layer did
    not become a MatMul with a constant weight (it would stay unquantized unnoticed), and where a
    constant was computed from weights, which are not there.
    """
    assert not any(isinstance(m, _Product) for m in spec.module.modules()), (
        "this empty model was exported before; make another"
    )
    transposed = set(_as_products(spec.module))
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            spec.module.eval(), spec.arguments, dynamo=True, input_names=spec.inputs, output_names=spec.outputs,
            dynamic_shapes=spec.dynamic, opset_version=OPSET, optimize=True, verbose=False,
        )  # fmt: skip
    assert program is not None  # with dynamo=True and no file name, the program is what comes back
    _name_nodes(program.model)
    name = type(spec.module).__name__
    _check_linears(transposed, program.model, name)
    found: dict[str, Origin] = {}
    weights: list[onnx.TensorProto] = []
    named = dict(spec.module.named_parameters())
    for key, value in list(program.model.graph.initializers.items()):
        array = value.const_value.numpy()
        code = (
            int(array.reshape(-1)[:1].view(np.int32)[0])
            if array.dtype == np.float32 and array.size
            else 0
        )
        if code in codes and key in named:
            found[key] = Origin(codes[code], key in transposed, spec.rows.get(key))
            weights.append(declared(key, np.float32, array.shape))
        elif array.dtype.kind == "f" and np.isnan(array).any():
            raise LvrError(
                f"{name}: the exporter computed {key} from weights, which it must not; nothing was written"
            )
        else:
            weights.append(onnx.numpy_helper.from_array(array, key))
        # the exporter's own record of it is not needed any more; a graph of any size passes through
        # memory without its weights
        value.const_value = ir.tensor(np.zeros(0, np.float32), name=key)
    model = ir.to_proto(program.model)
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    return model, found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the exporter says that is not about our graphs; everything else still shows."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch.export pickles its own tree specifications through a class that it deprecates
            # itself.
            warnings.filterwarnings(
                "ignore",
                message=r"`isinstance\(treespec, LeafSpec\)` is deprecated",
                category=FutureWarning,
            )
            # numpy, of the NaNs that stand for weights
            warnings.filterwarnings(
                "ignore", message="invalid value encountered", category=RuntimeWarning
            )
            # One Dim serves several inputs on purpose; the exporter says so once an axis.
            warnings.filterwarnings(
                "ignore", message="# The axis name: .* will not be used", category=UserWarning
            )
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _module_path(node: ir.Node) -> str:
    """The module that a node comes from, e.g. "language_model.layers.0.mlp.up_proj"; empty for the
    wrapper itself.
    """
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _name_nodes(model: ir.Model) -> None:
    """Names nodes after their modules ("….up_proj/MatMul"), and drops the exporter's traces, which
    hold this machine's paths.
    """
    seen: Counter[str] = Counter()
    for node in model.graph:
        path = _module_path(node)
        name = f"{path}/{node.op_type}" if path else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        node.metadata_props.clear()
    for value in (
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(o for node in model.graph for o in node.outputs),
    ):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _check_linears(wanted: set[str], model: ir.Model, name: str) -> None:
    found = {
        node.inputs[1].name
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None
    }
    lost = sorted(wanted - found)
    if lost:
        raise LvrError(
            f"{name}: {len(lost)} of {len(wanted)} linear layers are not MatMul nodes (first: {lost[0]}); nothing was written"
        )
