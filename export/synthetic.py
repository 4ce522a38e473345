"""Bundles of the shapes that people use, with random weights: latency and memory of a model before
one has it. May import: the core.

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

_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_QWEN = {
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def _smolvlm(text: dict[str, int], vision: dict[str, int], scale: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 100000.0}
    return {
        "model_type": "smolvlm", "scale_factor": scale, "tie_word_embeddings": False,
        "text_config": {"model_type": "llama", "vocab_size": 49280, "head_dim": 64, "rope_parameters": rope, "rms_norm_eps": 1e-5,
                        "max_position_embeddings": 8192, "tie_word_embeddings": False, **text},
        "vision_config": vision,
    }  # fmt: skip


_SIGLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": {
        "model_type": "qwen2_vl", "tie_word_embeddings": True,
        "text_config": {
            **_QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "rope_parameters": _MROPE,
        },
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2,
        },
    },
    "qwen2.5-vl-3b": {
        "model_type": "qwen2_5_vl", "tie_word_embeddings": True,
        "text_config": {
            **_QWEN, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "rope_parameters": _MROPE,
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048, "patch_size": 14,
            "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "qwen3-vl-2b": {
        "model_type": "qwen3_vl", "tie_word_embeddings": True,
        "text_config": {
            **_QWEN, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
        "vision_config": {
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048, "patch_size": 16,
            "spatial_merge_size": 2, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "smolvlm-256m": _smolvlm(
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
        _SIGLIP, 4,
    ),
    "smolvlm-500m": _smolvlm(
        {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5},
        _SIGLIP, 4,
    ),
}  # fmt: skip


def shape_of(name: str) -> Checkpoint:
    """A checkpoint of this shape that exists nowhere. Raises UsageError for a name that is not
    known.
    """
    if name not in SHAPES:
        raise UsageError(f"--synthetic {name}: not known; choose one of {', '.join(SHAPES)}")
    config, tiny = SHAPES[name], read_checkpoint("tiny")
    family = families.get(config["model_type"])
    tokenizer = Tokenizer.from_str(tiny.processor.tokenizer.to_str())
    tokenizer.add_special_tokens([family.image_token, *family.picture_tokens])
    smol = config["model_type"] == "smolvlm"
    preprocessor = {
        **(_HALF if smol or config["model_type"] == "qwen3_vl" else _CLIP),
        "min_pixels": 56 * 56,
        "max_pixels": 1280 * 28 * 28,
    }
    if smol:
        side = config["vision_config"]["image_size"]
        preprocessor |= {
            "size": {"longest_edge": 4 * side},
            "max_image_size": {"longest_edge": side},
            "min_pixels": None,
            "max_pixels": None,
        }
    image = tokenizer.token_to_id(family.image_token)
    assert image is not None  # added above
    processor = Processor(
        family=family,
        image=family.image_spec(config, preprocessor),
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
        self._shapes = {
            name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)
        }
        self._numbers = {name: i for i, name in enumerate(self._shapes)}
        self._seed = seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        generator = torch.Generator().manual_seed(self._seed * 100_003 + self._numbers[name])
        return torch.empty(shape).normal_(0, 0.02, generator=generator)

    def merged(self) -> SyntheticWeights:
        return self
