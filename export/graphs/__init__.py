"""The four graphs of a bundle as torch modules, and their export to ONNX.

May import: torch, onnx, onnx_ir, model/, generate/.

    pixel_values ─ vision_encoder ─ image_features ┐
    input_ids ──── embed_tokens ─── inputs_embeds ─┴─ decoder ─ last_hidden_state ─ lm_head ─ logits
                                          └───────── latent step ◄──────┘

    vision, tiles   the vision graph of the Qwen-VL families, and that of SmolVLM
    decoder         the decoder's graph, the embedding and the head
    structure       a graph as ONNX, and which parameter each of its weights is

Every linear layer leaves as MatMul (+ Add) with its weight as (in, out), never as Gemm: weight
quantizers read MatMul only.
"""

from __future__ import annotations

import torch

from lvr_lite.errors import LvrError
from lvr_lite.export.graphs.decoder import decoder_spec, embed_spec, head_spec
from lvr_lite.export.graphs.spec import GraphSpec
from lvr_lite.export.graphs.tiles import tile_spec
from lvr_lite.export.graphs.vision import vision_spec
from lvr_lite.export.weights import TransformersModule
from lvr_lite.generate.torch import language_model
from lvr_lite.model.processor import Processor


def specs(model: TransformersModule, processor: Processor) -> dict[str, GraphSpec]:
    """The four graphs of a model in float32 on the CPU, by their names. processor: the model's.

    Raises LvrError for another dtype, and for features of the architecture that the graphs do not
    have.
    """
    _refuse_unknown(model)
    family = processor.family
    core = model.model
    text = language_model(model)
    deepstack = family.deepstack(model.config.vision_config.to_dict())
    if family.tiled:
        vision = tile_spec(core.vision_model, core.connector, family)
    else:
        vision = vision_spec(core.visual, processor, deepstack)
    return {
        "vision_encoder": vision,
        "embed_tokens": embed_spec(text.embed_tokens),
        "decoder": decoder_spec(text, family, len(deepstack)),
        "lm_head": head_spec(model.lm_head),
    }


def _refuse_unknown(model: TransformersModule) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise LvrError(
                f"export needs a float32 model; {name} is {parameter.dtype}: "
                "load and merge it in float32"
            )
    config = model.config.text_config
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "mrope"):
        raise LvrError(
            f"the checkpoint scales its positions ({kind!r}), which export cannot write yet; "
            "only 'default' is supported"
        )
    # Not every architecture's configuration names the kinds of its layers.
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise LvrError(
            "the checkpoint uses sliding-window attention, which export cannot write yet; "
            "set use_sliding_window to false"
        )
