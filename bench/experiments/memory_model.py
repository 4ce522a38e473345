"""Models of real sizes with random weights, for `memory`: linears of the text layers in NF4, one at
a time, so that the whole never is in bf16. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import torch

from lvr_lite.export.synthetic import SHAPES
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.train import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIGS: dict[str, dict[str, Any]] = {
    "3b": SHAPES["qwen2.5-vl-3b"],
    # A quarter of the 3B's widths and vocabulary, for CPUs: there too the embedding outweighs a
    # layer.
    "quarter": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 512,
            "intermediate_size": 2752,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "vocab_size": 37984,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [8, 12, 12],
            },
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 320,
            "intermediate_size": 856,
            "num_heads": 4,
            "out_hidden_size": 512,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        "tie_word_embeddings": True,
    },
    "2b": SHAPES["qwen2-vl-2b"],
}
# Of transformers, by model type.
ARCHITECTURES = {"qwen2_5_vl": "Qwen2_5_VL", "qwen2_vl": "Qwen2VL"}


def config_of(shape: str, layers: int | None) -> dict[str, Any]:
    """The config.json of a shape, with fewer layers in both towers where `layers` says so."""
    config = read_checkpoint("tiny").config if shape == "tiny" else copy.deepcopy(CONFIGS[shape])
    if layers is not None:
        kinds = ["full_attention"] * layers
        config["text_config"] |= {"num_hidden_layers": layers, "layer_types": kinds}
        config["vision_config"] |= {"depth": layers, "fullatt_block_indexes": [layers - 1]}
    return config


def build(
    config: dict[str, Any], checkpoint: Checkpoint, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """A model of this config with random weights, ready to be adapted as `checkpoint` is."""
    model = _empty(config)
    for path, module in list(model.named_modules()):
        target = re.fullmatch(checkpoint.processor.family.lora_targets, path)
        if target and isinstance(module, torch.nn.Linear):
            model.set_submodule(path, _quantized(module, dtype, device))
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, name = path.rpartition(".")
            if "norm" in path or "ln_q" in path:
                value = torch.ones(parameter.shape, dtype=dtype, device=device)
            else:
                value = 0.02 * torch.randn(parameter.shape, dtype=dtype, device=device)
            filled = torch.nn.Parameter(value, requires_grad=False)
            setattr(model.get_submodule(parent), name, filled)
    if config["tie_word_embeddings"]:
        model.lm_head.weight = model.get_input_embeddings().weight
    model.to(device)
    model.is_loaded_in_4bit = True
    load.check_quantized(model, checkpoint)
    return model


def _empty(config: dict[str, Any]) -> PreTrainedModel:
    """On the meta device."""
    import transformers
    from accelerate import init_empty_weights

    name = ARCHITECTURES[config["model_type"]]
    sizes = {key: value for key, value in config.items() if key != "model_type"}
    made = getattr(transformers, f"{name}Config")(**sizes)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = getattr(transformers, f"{name}ForConditionalGeneration")(made)
    return model


def _quantized(linear: torch.nn.Linear, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A linear of the same sizes with random weights in NF4."""
    import bitsandbytes as bnb

    quantized: torch.nn.Module = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    shape = (linear.out_features, linear.in_features)
    weight = 0.02 * torch.randn(shape, dtype=dtype, device=device)
    quantized.weight = bnb.nn.Params4bit(
        weight.cpu(), False, compress_statistics=True, quant_type="nf4", module=quantized
    ).to(device)
    return quantized


def make_optimizer(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names."""
    import bitsandbytes as bnb

    if "8bit" in name or name.startswith("paged"):
        bits = 8 if "8bit" in name else 32
        paged = name.startswith("paged")
        optimizer: torch.optim.Optimizer = bnb.optim.AdamW(
            parameters, lr=1e-4, optim_bits=bits, is_paged=paged
        )
        return optimizer
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-4)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=name.endswith("fused"))
