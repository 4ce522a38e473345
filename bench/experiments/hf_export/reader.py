"""Greedy answers of transformers from a folder alone: a process that imports nothing of lvr-lite.

    python reader.py FOLDER QUESTIONS.json ANSWERS.json TOKENS

Where torchvision is missing, most processors of transformers cannot be made; then their two parts
are joined here, as Qwen's processor joins them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)


class Parts:
    """Tokenizer and image processor of a Qwen-VL folder, joined as its processor does it."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def apply_chat_template(self, messages: list[Any], **options: bool) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def __call__(self, text: list[str], images: list[Image.Image], **options: str) -> Any:
        pad = "<|image_pad|>"
        inputs = self.images(images=images, **options)
        visual = int(inputs["image_grid_thw"].prod()) // self.images.merge_size**2
        words = self.tokenizer([text[0].replace(pad, pad * visual)], **options)
        ids = words["input_ids"]
        kinds = (ids == self.tokenizer.convert_tokens_to_ids(pad)).long()
        return {**words, **inputs, "mm_token_type_ids": kinds}


def main() -> None:
    folder, questions, answers, tokens = sys.argv[1:]
    try:
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
    except ImportError:
        processor = Parts(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ends = set(model.generation_config.eos_token_id)
    given = []
    for question in json.loads(Path(questions).read_text(encoding="utf-8")):
        content = [{"type": "image"}, {"type": "text", "text": question["question"]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        picture = Image.open(question["picture"]).convert("RGB")
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=int(tokens))
        prompt = inputs["input_ids"][0].tolist()
        chosen = output[0, len(prompt) :].tolist()
        given.append({"prompt": prompt, "tokens": [token for token in chosen if token not in ends]})
    assert not [name for name in sys.modules if name.startswith("lvr_lite")]
    report = {"processor": type(processor).__name__, "answers": given}
    Path(answers).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
