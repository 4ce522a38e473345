"""Bundles of the shapes that people use, with random weights: latency and memory of a model before
one has it.

May import: torch, tokenizers, model/.

Sizes are those of the models' published config.json. Vocabulary and template are the embedded
model's, whose few hundred ids are among the many; answers mean nothing, and cost what a real
model's cost.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lvr_lite.errors import UsageError
from lvr_lite.export.weights import empty_model
from lvr_lite.model import families
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.processor import Processor
from lvr_lite.model.spec import LatentSpec

# A config.json, or a part of one.
Config = dict[str, Any]

# Mean and standard deviation of a picture's channels, as CLIP has them, and as 0.5 everywhere.
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _qwen(model_type: str, text: Config, vision: Config) -> Config:
    """A Qwen-VL's config.json."""
    shared = {
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
    }
    return {
        "model_type": model_type,
        "tie_word_embeddings": True,
        "text_config": shared | text,
        "vision_config": vision | {"spatial_merge_size": 2},
    }


def _mrope(theta: float, sections: list[int]) -> Config:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}


def _smolvlm(text: Config, vision: Config | None = None) -> Config:
    """A SmolVLM2's config.json; the smaller sizes have one vision tower."""
    shared = {
        "model_type": "llama",
        "vocab_size": 49280,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    return {
        "model_type": "smolvlm",
        "scale_factor": 4 if vision is None else 3,
        "tie_word_embeddings": False,
        "text_config": shared | text,
        "vision_config": vision
        or {
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
    }


SHAPES: dict[str, Config] = {
    "qwen2-vl-2b": _qwen(
        "qwen2_vl",
        {
            "num_hidden_layers": 28,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rope_parameters": _mrope(1e6, [16, 24, 24]),
        },
        {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "hidden_size": 1536,
            "patch_size": 14,
        },
    ),
    "qwen2.5-vl-3b": _qwen(
        "qwen2_5_vl",
        {
            "num_hidden_layers": 36,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "rope_parameters": _mrope(1e6, [16, 24, 24]),
        },
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    ),
    "qwen3-vl-2b": _qwen(
        "qwen3_vl",
        {
            "num_hidden_layers": 28,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": _mrope(5e6, [24, 20, 20]),
        },
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    ),
    "smolvlm-256m": _smolvlm(
        {
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        }
    ),
    "smolvlm-500m": _smolvlm(
        {
            "num_hidden_layers": 32,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
        }
    ),
    "smolvlm-2.2b": _smolvlm(
        {
            "num_hidden_layers": 24,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        {
            "num_hidden_layers": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
    ),
}


def _preprocessor(config: Config) -> Config:
    """The part of preprocessor_config.json that a family reads."""
    if config["model_type"] == "smolvlm":
        side = config["vision_config"]["image_size"]
        return HALF | {
            "size": {"longest_edge": 4 * side},
            "max_image_size": {"longest_edge": side},
        }
    channels = CLIP
    if config["model_type"] == "qwen3_vl":
        channels = HALF
    return channels | {"min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28}


def shape_of(name: str) -> Checkpoint:
    """A checkpoint of this shape that exists nowhere. Raises UsageError for a name that is not
    known.
    """
    if name not in SHAPES:
        raise UsageError(f"--synthetic {name}: not known; choose one of {', '.join(SHAPES)}")
    config = SHAPES[name]
    tiny = read_checkpoint("tiny")
    family = families.get(config["model_type"])
    tokenizer = Tokenizer.from_str(tiny.processor.tokenizer.to_str())
    tokenizer.add_special_tokens([family.image_token, *family.picture_tokens])
    image = tokenizer.token_to_id(family.image_token)
    assert image is not None
    processor = Processor(
        family=family,
        image=family.image_spec(config, _preprocessor(config)),
        template=tiny.processor.template.replace("<|image_pad|>", family.image_token),
        tokenizer=tokenizer,
        tokens=replace(tiny.processor.tokens, image=image),
    )
    return replace(
        tiny,
        folder=Path(name),
        base=Path(name),
        config=config,
        processor=processor,
        latent=LatentSpec(steps=8),
    )


class SyntheticWeights:
    """Random parameters by name, the same each time: normal of standard deviation 0.02, norms 1,
    biases 0.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int = 0) -> None:
        self.model = empty_model(checkpoint.config, checkpoint.processor.family)
        named = self.model.named_parameters(remove_duplicate=False)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in named}
        self._numbers = {name: i for i, name in enumerate(self._shapes)}
        self._seed = seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            if name.endswith("bias"):
                return torch.zeros(shape)
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(self._seed * 100_003 + self._numbers[name])
        return torch.empty(shape).normal_(0, 0.02, generator=generator)

    def merged(self) -> SyntheticWeights:
        return self

    def base(self) -> SyntheticWeights:
        return self
