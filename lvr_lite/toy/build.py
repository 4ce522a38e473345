"""The embedded model's tokenizer and untrained network: what `python -m lvr_lite.toy.pretrain`
begins with, and what tests make small models of.

May import: tokenizers, torch and transformers (inside functions) and all that stands above `toy`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lvr_lite.files import JsonObject
from lvr_lite.toy import questions, scenes

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
SPECIALS = (
    END_OF_TEXT,
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
LATENT_TOKENS = ("<|lvr_start|>", "<|lvr|>", "<|lvr_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# Content of preprocessor_config.json.
PREPROCESSOR: JsonObject = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 256,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,
}
# Content of tokenizer_config.json.
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_OF_TURN,
    "pad_token": END_OF_TEXT,
    "additional_special_tokens": [*SPECIALS, *LATENT_TOKENS],
    "model_max_length": 4096,
}


def corpus() -> list[str]:
    """What the tokenizer is trained on: every question, answer and caption that a few hundred
    scenes give, and all words of the scenes.
    """
    texts = [" user", " assistant", " describe", " where is the"] * 300
    for _, scene, question, _ in questions.items(
        seed=1, split="train", count=600, types=questions.PRETRAINED
    ):
        caption = questions.describe(scene)
        for text in (question.text, question.short, question.answer, caption):
            texts.append(f" {text}")
    words = (
        *scenes.SHAPES,
        *scenes.COLOURS,
        *scenes.PATTERNS,
        *scenes.GLYPHS,
        *scenes.NUMBERS,
    )
    return texts + [f" {word}" for word in words] * 20


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE in which each word of the scenes, with the space before it, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([*SPECIALS, *LATENT_TOKENS])
    return tokenizer


def make_config(tokenizer: Tokenizer) -> Qwen2_5_VLConfig:
    """The sizes of the network. Its vocabulary is filled up to a multiple of 64."""
    from transformers import Qwen2_5_VLConfig

    ids = {name: tokenizer.token_to_id(name) for name in SPECIALS}
    text = {
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 6, 6],
        },
        "bos_token_id": ids[END_OF_TEXT],
        "eos_token_id": ids[END_OF_TURN],
        "pad_token_id": ids[END_OF_TEXT],
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 5,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_heads": 6,
        "out_hidden_size": 256,
        "fullatt_block_indexes": [2, 4],
        "window_size": 56,
        "patch_size": 14,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def make_model(tokenizer: Tokenizer, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The network with random weights, float32."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(make_config(tokenizer))


def save(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write a checkpoint folder that loads without network and without torchvision: weights in
    `dtype` as safetensors, all else JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = {
        "tokenizer_config.json": json.dumps(TOKENIZER, indent=1),
        "preprocessor_config.json": json.dumps(PREPROCESSOR, indent=1),
        "chat_template.jinja": TEMPLATE,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
