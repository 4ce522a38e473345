"""Folders that the experiment makes: a published shape with random weights, and the embedded model
in the terms of llama.cpp.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from lvr_lite.bench.experiments.runner import is_whole
from lvr_lite.model import families

TEXT_LAYERS = 2
# llama.cpp's converter finds the projector's second product, "mlp.2", among the numbers of blocks.
VISION_LAYERS = 4
# Random weights are drawn so small that a mistake would hardly show.
LOUDER = 3.0
SMALL_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def random_checkpoint(published: Path, folder: Path) -> None:
    """The configuration of a published model with few layers and random weights (float32), and its
    small files as they are.
    """
    if is_whole(folder / "config.json"):
        return
    folder.mkdir(parents=True)
    config = json.loads((published / "config.json").read_text(encoding="utf-8"))
    config.get("text_config", config)["num_hidden_layers"] = TEXT_LAYERS
    vision = config["vision_config"]
    vision["depth"] = VISION_LAYERS
    if "fullatt_block_indexes" in vision:
        vision["fullatt_block_indexes"] = [1, 3]
    family = families.get(config["model_type"])
    architecture = getattr(transformers, family.architecture)
    values = {name: value for name, value in config.items() if name != "model_type"}
    torch.manual_seed(0)
    model = architecture(architecture.config_class(**values)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(LOUDER)
    model.save_pretrained(folder)
    for name in SMALL_FILES:
        if (published / name).is_file():
            shutil.copyfile(published / name, folder / name)
    # What transformers 4 wrote and 5 would write otherwise: the published form is what is tried.
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def doubled(folder: Path, target: Path) -> None:
    """An exported embedded model as one for pictures of twice the size that answers the same.

    llama.cpp's Qwen2.5-VL has windows of 112 px and full attention in every n-th block; the
    embedded model has windows of 56 px and full attention in blocks 2 and 4. So a patch becomes
    28 px, its kernel spread over every second pixel, and a block that adds nothing comes in
    between.
    """
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision = config["vision_config"]
    assert vision["fullatt_block_indexes"] == [2, 4]
    vision |= {"depth": 6, "fullatt_block_indexes": [2, 5], "patch_size": 28, "window_size": 112}
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    file = target / "preprocessor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings |= {"patch_size": 28}
    for name in ("min_pixels", "max_pixels"):
        settings[name] *= 4
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    with safe_open(str(folder / "model.safetensors"), "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
    save_file(_doubled(tensors), target / "model.safetensors", {"format": "pt"})


def _doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    blocks = "visual.blocks."
    result: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not name.startswith(blocks):
            result[name] = tensor
            continue
        number, rest = name.removeprefix(blocks).split(".", 1)
        later = int(number) + (int(number) > 2)
        result[f"{blocks}{later}.{rest}"] = tensor
        if number == "3":
            adds = rest.startswith(("attn.proj.", "mlp.down_proj."))
            result[f"{blocks}3.{rest}"] = torch.zeros_like(tensor) if adds else tensor.clone()
    kernel = result["visual.patch_embed.proj.weight"]
    wide = kernel.new_zeros(*kernel.shape[:3], 28, 28)
    wide[..., ::2, ::2] = kernel
    result["visual.patch_embed.proj.weight"] = wide
    return result
