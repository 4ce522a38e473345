"""The model that ships, and the fast paths that it was pre-trained with, held against transformers
and the prompt it meets later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvr_lite.commands.inspect import read_weights
from lvr_lite.model.checkpoint import read_checkpoint, resolve
from lvr_lite.model.families.qwen2_5_vl import FAMILY as family
from lvr_lite.model.prompt import prompt_ids
from lvr_lite.toy import build, scenes
from lvr_lite.toy.drawing import draw
from lvr_lite.toy.pretrain import IMAGE_SPEC, Packer, Pictures, see, turns
from lvr_lite.train import load as nf4


def scenes_of_size(size: tuple[int, int], count: int) -> list[scenes.Scene]:
    drawn = (scenes.plan(np.random.default_rng(seed), "train") for seed in range(200))
    found = [s for s in drawn if (s.width, s.height) == size][:count]
    assert len(found) == count
    return found


@pytest.mark.parametrize("size", scenes.SIZES)
def test_the_fast_vision_forward_equals_that_of_transformers(
    small_model: Any, small_checkpoint: Path, size: tuple[int, int]
) -> None:
    pictures = Pictures(scenes_of_size(size, 2))
    inputs = {
        k: torch.from_numpy(v) for k, v in family.vision_inputs([pictures.grid], IMAGE_SPEC).items()
    }
    processor = read_checkpoint(small_checkpoint).processor
    pixels = processor.see([draw(s) for s in pictures.scenes])
    assert pixels.grids == [pictures.grid] * 2
    with torch.no_grad():
        got = see(small_model, torch.from_numpy(pictures.patches), inputs)
        want = small_model.model.get_image_features(
            torch.from_numpy(pixels.patches), torch.tensor([[1, *g] for g in pixels.grids])
        ).pooler_output
    torch.testing.assert_close(got, torch.stack(list(want)), rtol=1e-3, atol=1e-4)
    assert float((got[0] - got[1]).abs().max()) > 1e-2, "two pictures look the same"


@pytest.fixture(scope="module")
def eager(small_model: Any) -> Any:
    """The language model with the attention that pre-training uses, which takes a mask of
    numbers.
    """
    language = small_model.model.language_model
    before = language.config._attn_implementation
    language.set_attn_implementation("eager")
    yield language
    language.set_attn_implementation(before)


def test_a_packed_turn_is_the_single_question_that_the_model_meets_later(
    small_model: Any, eager: Any, small_checkpoint: Path
) -> None:
    checkpoint = read_checkpoint(small_checkpoint)
    (scene,) = scenes_of_size((112, 168), 1)
    pictures = Pictures([scene])
    conversation = turns(np.random.default_rng(1), scene, captions=True, worded=0.5)
    assert len(conversation) > 5
    packed = Packer(checkpoint.processor.tokenizer).pack(pictures, [conversation])
    rows, columns = family.token_grid(pictures.grid, IMAGE_SPEC)
    features = torch.randn(rows * columns, small_model.config.text_config.hidden_size)

    def hidden(
        ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        embeds = small_model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == packed["image_id"])[..., None], features)
        with torch.no_grad():
            return eager(
                inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state[0]

    together = hidden(packed["ids"], packed["positions"], packed["mask"])
    prefix = (
        int((packed["ids"][0] == packed["image_id"]).nonzero().max()) + 2
    )  # up to <|vision_end|>
    at = prefix
    for question, answer in conversation:
        asked = prompt_ids(
            checkpoint.processor.tokenizer,
            checkpoint.processor.template,
            question,
            family.image_token,
            [family.image_token * rows * columns],
        )
        said = checkpoint.processor.tokenizer.encode(
            answer + "<|im_end|>", add_special_tokens=False
        ).ids
        ids = np.array(asked + said)
        own = slice(at, at + len(ids) - prefix)
        assert packed["ids"][0, own].tolist() == ids[prefix:].tolist()
        positions = family.positions(ids, int(packed["image_id"]), [pictures.grid], IMAGE_SPEC)
        alone = hidden(torch.from_numpy(ids)[None], torch.from_numpy(positions)[:, None], None)
        torch.testing.assert_close(together[own], alone[prefix:], rtol=1e-3, atol=1e-3)
        labels = packed["labels"][0, own].tolist()
        assert labels == [-100] * (len(asked) - prefix) + said
        at = own.stop
    assert at == packed["ids"].shape[1]


def test_turns_of_one_picture_are_asked_once_each() -> None:
    for seed in range(20):
        scene = scenes.plan(np.random.default_rng(seed), "train")
        questions = [
            q for q, _ in turns(np.random.default_rng(seed), scene, captions=False, worded=0.0)
        ]
        asked = [q for q in questions if not q.startswith("where ")]
        assert len(set(asked)) == len(asked)


# -------------------------------------------------------------------------------------------------
# the model that ships


def test_the_model_that_ships_is_small_and_in_formats_that_run_no_code() -> None:
    files = [p for p in resolve("tiny").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert sum(p.stat().st_size for p in files) <= 25 * 10**6


def test_the_model_that_ships_has_5_to_15_million_parameters() -> None:
    assert (
        5e6
        <= sum(read_weights(p).parameters for p in resolve("tiny").glob("*.safetensors"))
        <= 15e6
    )


def test_the_model_that_ships_loads_offline_with_every_weight_there() -> None:
    checkpoint = read_checkpoint("tiny")
    model = nf4.load_plain(checkpoint)
    stored = sum(read_weights(p).parameters for p in checkpoint.base.glob("*.safetensors"))
    assert sum(p.numel() for p in model.parameters()) == stored
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_model_that_ships_is_of_the_making_that_is_in_the_repository() -> None:
    folder = resolve("tiny")
    config = build.make_config(build.make_tokenizer()).to_dict()
    shipped = read_checkpoint("tiny").config
    for part in ("text_config", "vision_config"):
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "depth",
            "fullatt_block_indexes",
        ):
            assert shipped[part].get(key) == config[part].get(key), f"{part}.{key}"
    assert (folder / "chat_template.jinja").read_text() == build.TEMPLATE


def test_every_word_of_the_scenes_is_one_token() -> None:
    tokenizer = read_checkpoint("tiny").processor.tokenizer
    words = [*scenes.SHAPES, *scenes.COLOURS, *scenes.PATTERNS, *scenes.GLYPHS, *scenes.NUMBERS]
    assert [w for w in words if len(tokenizer.encode(w, add_special_tokens=False).ids) != 1] == []


def test_the_markers_have_rows_in_the_model_that_ships() -> None:
    checkpoint = read_checkpoint("tiny")
    assert [checkpoint.processor.tokenizer.token_to_id(t) for t in build.LATENT_TOKENS] == [
        checkpoint.processor.tokens.lvr_start,
        checkpoint.processor.tokens.lvr,
        checkpoint.processor.tokens.lvr_end,
    ]
