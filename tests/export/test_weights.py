"""Weights read one by one: what is missing, damaged or of another kind is one line that names it;
an empty model takes no memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvr_lite.errors import BundleError
from lvr_lite.export.synthetic import SHAPES, shape_of
from lvr_lite.export.weights import StoredWeights, code_of, empty_model, origins
from lvr_lite.model.checkpoint import read_checkpoint

NAME = "model.language_model.layers.1.mlp.up_proj.weight"


def read(folder: Path) -> StoredWeights:
    checkpoint = read_checkpoint(folder)
    return StoredWeights(checkpoint, empty_model(checkpoint.config, checkpoint.processor.family))


def key_of(tensors: dict[str, Any], name: str) -> str:
    return next(key for key in tensors if key.endswith(name.removeprefix("model.language_model.")))


@pytest.fixture
def changed(
    small_checkpoint: Path, copied: Callable[[Path], Path]
) -> Callable[[Callable[[torch.Tensor], torch.Tensor | None]], Path]:
    """A copy of the small checkpoint in which one weight is another, or gone."""

    def change(how: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
        folder = copied(small_checkpoint)
        tensors = load_file(folder / "model.safetensors")
        key = key_of(tensors, NAME)
        weight = how(tensors.pop(key))
        if weight is not None:
            tensors[key] = weight
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return change


def test_a_missing_weight_is_named(changed: Any) -> None:
    folder = changed(lambda _: None)
    message = f"{folder}: 1 weights are missing (first: {NAME}); give the weights of this"
    with pytest.raises(BundleError, match=f"^{re.escape(message)}"):
        read(folder)


def test_a_weight_of_another_shape_is_named_with_its_file(changed: Any) -> None:
    folder = changed(lambda weight: weight[:5].clone())
    message = r"weight .*up_proj\.weight is \[5, 256\], config\.json asks for \[768, 256\]$"
    with pytest.raises(BundleError, match=rf"model\.safetensors: {message}"):
        read(folder)


def test_an_integer_weight_is_said_to_be_quantized_already(changed: Any) -> None:
    folder = changed(lambda weight: weight.to(torch.int8))
    message = r"weight .*up_proj\.weight is stored as I8; the weights are quantized already"
    with pytest.raises(BundleError, match=rf"model\.safetensors: {message}"):
        read(folder)


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_truncated_file_is_one_line_with_its_name(
    small_checkpoint: Path, copied: Callable[[Path], Path], share: float
) -> None:
    file = copied(small_checkpoint) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(BundleError, match=r"model\.safetensors: .*") as caught:
        read(file.parent)[NAME]
    assert "\n" not in str(caught.value)


def test_a_file_that_is_damaged_later_is_one_line_with_its_name(
    small_checkpoint: Path, copied: Callable[[Path], Path]
) -> None:
    file = copied(small_checkpoint) / "model.safetensors"
    weights = read(file.parent)
    file.write_bytes(b"")
    message = r"model\.safetensors: weight .*up_proj\.weight cannot be read"
    with pytest.raises(BundleError, match=message):
        weights[NAME]


def test_weights_in_16_bits_come_as_float32(changed: Any, small_checkpoint: Path) -> None:
    stored = load_file(small_checkpoint / "model.safetensors")
    weight = read(changed(lambda weight: weight.bfloat16()))[NAME]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, stored[key_of(stored, NAME)].bfloat16().float())


def test_what_is_read_may_be_written_to(small_checkpoint: Path) -> None:
    weights = read(small_checkpoint)
    before = weights[NAME].clone()
    weights[NAME].zero_()
    assert torch.equal(weights[NAME], before)


@pytest.mark.parametrize("name", SHAPES)
def test_an_empty_model_takes_no_memory_and_ties_what_is_tied(name: str) -> None:
    checkpoint = shape_of(name)
    model = empty_model(checkpoint.config, checkpoint.processor.family)
    assert sum(parameter.numel() for parameter in model.parameters()) > 2e8
    assert sum(parameter.untyped_storage().nbytes() for parameter in model.parameters()) < 10_000
    tied = checkpoint.config["tie_word_embeddings"]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    codes = origins(model)
    named = dict(model.named_parameters())
    assert sorted(codes.values()) == sorted(named)
    for parameter in named.values():
        assert torch.isnan(parameter[..., -1:]).all()
    weight = model.lm_head.weight
    name_of_head = codes[code_of(weight)]
    assert tied or name_of_head == "lm_head.weight"
    # A view and a transposition still tell.
    assert codes[code_of(weight.t())] == codes[code_of(weight.view(-1))] == name_of_head
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_a_config_that_transformers_cannot_read_is_one_line(small_checkpoint: Path) -> None:
    checkpoint = read_checkpoint(small_checkpoint)
    text = checkpoint.config["text_config"] | {"hidden_act": "nosuch"}
    wrong = checkpoint.config | {"text_config": text}
    message = r"^config\.json: transformers cannot make a qwen2_5_vl of it"
    with pytest.raises(BundleError, match=message):
        empty_model(wrong, checkpoint.processor.family)
