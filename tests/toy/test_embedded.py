"""The model that ships, and the fast paths that it was pre-trained with, held against transformers
and the prompt it meets later.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from lvr_lite.commands.inspect import read_weights
from lvr_lite.model.checkpoint import read_checkpoint, resolve
from lvr_lite.model.families.qwen2_5_vl import FAMILY
from lvr_lite.toy import build, scenes
from lvr_lite.toy.drawing import draw
from lvr_lite.toy.packing import IMAGE_SPEC, Packer, Pictures, turns
from lvr_lite.toy.pretrain import see
from lvr_lite.train.load import load_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def scenes_of_size(size: tuple[int, int], count: int) -> list[scenes.Scene]:
    planned = (scenes.plan(np.random.default_rng(seed), "train") for seed in range(200))
    chosen = [scene for scene in planned if (scene.width, scene.height) == size][:count]
    assert len(chosen) == count
    return chosen


@pytest.mark.parametrize("size", scenes.SIZES)
def test_the_fast_vision_forward_equals_that_of_transformers(
    small_model: PreTrainedModel, small_checkpoint: Path, size: tuple[int, int]
) -> None:
    pictures = Pictures(scenes_of_size(size, 2))
    pixels = read_checkpoint(small_checkpoint).processor.see([draw(s) for s in pictures.scenes])
    assert pixels.grids == [pictures.grid] * 2
    inputs = {
        name: torch.from_numpy(values)
        for name, values in FAMILY.vision_inputs([pictures.grid], IMAGE_SPEC).items()
    }
    with torch.no_grad():
        tokens = see(small_model, torch.from_numpy(pictures.patches), inputs)
        expected = small_model.model.get_image_features(
            torch.from_numpy(pixels.patches), torch.tensor([[1, *grid] for grid in pixels.grids])
        ).pooler_output
    torch.testing.assert_close(tokens, torch.stack(list(expected)), rtol=1e-3, atol=1e-4)
    assert float((tokens[0] - tokens[1]).abs().max()) > 1e-2, "two pictures look the same"


def test_the_words_of_a_cell_are_those_of_the_figures_in_it() -> None:
    (scene,) = scenes_of_size((112, 168), 1)
    pictures = Pictures([scene])
    (holds,) = pictures.words
    columns = pictures.grid.columns // 2
    for figure in scene.figures:
        x, y = figure.centre()
        words = holds[int(y // 28) * columns + int(x // 28)]
        assert words[scenes.SHAPES.index(figure.shape)]
    assert not holds.all(1).any(), "a cell holds every word"
    assert not holds.any(1).all(), "no cell is empty"


@pytest.fixture(scope="module")
def eager(small_model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """The language model with the attention that pre-training uses, which takes a mask of
    numbers.
    """
    language = small_model.model.language_model
    before = language.config._attn_implementation
    language.set_attn_implementation("eager")
    yield language
    language.set_attn_implementation(before)


def test_a_packed_turn_is_the_single_question_that_the_model_meets_later(
    small_model: PreTrainedModel, eager: torch.nn.Module, small_checkpoint: Path
) -> None:
    checkpoint = read_checkpoint(small_checkpoint)
    tokenizer = checkpoint.processor.tokenizer
    image_id = checkpoint.processor.tokens.image
    (scene,) = scenes_of_size((112, 168), 1)
    pictures = Pictures([scene])
    conversation = turns(np.random.default_rng(1), scene, captions=True, worded=True)
    assert len(conversation) > 5
    packed = Packer(tokenizer).pack(pictures, [conversation])
    (row,) = packed.ids
    (labels,) = packed.labels
    features = torch.randn(int((row == image_id).sum()), small_model.config.text_config.hidden_size)

    def hidden(ids: np.ndarray, positions: np.ndarray, mask: np.ndarray | None) -> torch.Tensor:
        tensor = torch.from_numpy(ids)[None]
        embeds = small_model.get_input_embeddings()(tensor)
        embeds = embeds.masked_scatter((tensor == image_id)[..., None], features)
        with torch.no_grad():
            states: torch.Tensor = eager(
                inputs_embeds=embeds,
                position_ids=torch.from_numpy(positions),
                attention_mask=None if mask is None else torch.from_numpy(mask),
                use_cache=False,
            ).last_hidden_state[0]
        return states

    together = hidden(row, packed.positions, packed.mask)
    # Up to <|vision_end|>.
    prefix = int(np.flatnonzero(row == image_id).max()) + 2
    start = prefix
    for question, answer in conversation:
        prompt = checkpoint.processor.prompt(question, [pictures.grid]).ids
        response = tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False).ids
        ids = np.concatenate([prompt, response])
        turn = slice(start, start + len(ids) - prefix)
        assert row[turn].tolist() == ids[prefix:].tolist()
        assert labels[turn].tolist() == [-100] * (len(prompt) - prefix) + response
        positions = FAMILY.positions(ids, image_id, [pictures.grid], IMAGE_SPEC)
        states = hidden(ids, positions[:, None], None)
        torch.testing.assert_close(together[turn], states[prefix:], rtol=1e-3, atol=1e-3)
        start = turn.stop
    assert start == len(row)


def test_turns_of_one_picture_are_asked_once_each() -> None:
    for seed in range(20):
        scene = scenes.plan(np.random.default_rng(seed), "train")
        rng = np.random.default_rng(seed)
        questions = [question for question, _ in turns(rng, scene, captions=False, worded=False)]
        others = [question for question in questions if not question.startswith("where ")]
        assert len(set(others)) == len(others)


# --------------------------------------------------------------------------------------------------
# the model that ships


def test_the_model_that_ships_is_small_and_in_formats_that_run_no_code() -> None:
    files = [path for path in resolve("tiny").rglob("*") if path.is_file()]
    others = {path for path in files if path.name != "SHA256SUMS"}
    assert {path.suffix for path in others} <= {".safetensors", ".json", ".jinja", ".md"}
    assert sum(path.stat().st_size for path in files) <= 25 * 10**6


def stored_parameters() -> int:
    return sum(read_weights(path).parameters for path in resolve("tiny").glob("*.safetensors"))


def test_the_model_that_ships_has_5_to_15_million_parameters() -> None:
    assert 5e6 <= stored_parameters() <= 15e6


def test_the_model_that_ships_loads_offline_with_every_weight_there() -> None:
    parameters = list(load_plain(read_checkpoint("tiny")).parameters())
    assert sum(parameter.numel() for parameter in parameters) == stored_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in parameters)


def test_the_model_that_ships_is_of_the_making_that_is_in_the_repository() -> None:
    config = build.make_config(build.make_tokenizer()).to_dict()
    shipped = read_checkpoint("tiny").config
    sizes = {
        "text_config": ("hidden_size", "intermediate_size", "num_hidden_layers"),
        "vision_config": ("hidden_size", "intermediate_size", "depth", "fullatt_block_indexes"),
    }
    for section, keys in sizes.items():
        for key in keys:
            assert shipped[section][key] == config[section][key], f"{section}.{key}"
    assert (resolve("tiny") / "chat_template.jinja").read_text() == build.TEMPLATE


def test_every_word_of_the_scenes_is_one_token() -> None:
    tokenizer = read_checkpoint("tiny").processor.tokenizer
    words = [*scenes.SHAPES, *scenes.COLOURS, *scenes.PATTERNS, *scenes.GLYPHS, *scenes.NUMBERS]
    assert [w for w in words if len(tokenizer.encode(w, add_special_tokens=False).ids) != 1] == []


def test_the_markers_have_rows_in_the_model_that_ships() -> None:
    processor = read_checkpoint("tiny").processor
    tokens = processor.tokens
    ids = [processor.tokenizer.token_to_id(token) for token in build.LATENT_TOKENS]
    assert ids == [tokens.lvr_start, tokens.lvr, tokens.lvr_end]
