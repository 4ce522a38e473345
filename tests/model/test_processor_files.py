"""The small files of folders in the shapes in which models are published: what they declare is read
as transformers reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lvr_lite.errors import BundleError, LvrError
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.model.families import get
from lvr_lite.model.images import normalized
from lvr_lite.model.processor_files import read_template, read_tokenizer, with_markers
from lvr_lite.model.prompt import answer_prefix, render

Copy = Callable[[Path], Path]
PICTURES = (
    "{% for m in messages %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|image_pad|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
TEXT_ONLY = "{% for m in messages %}{{ 'user: ' + m.content }}{% endfor %}"


@pytest.fixture
def folder(small_checkpoint: Path, copied: Copy) -> Path:
    return copied(small_checkpoint)


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


def drop_token(folder: Path, content: str) -> int:
    """Take a token out of tokenizer.json, with those behind it; returns its id."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    dropped = int(ids[content])
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < dropped]
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {w: i for w, i in words.items() if i < dropped}
    path.write_text(json.dumps(tokenizer))
    return dropped


# --------------------------------------------------------------------------------------------------
# tokens


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_declared_outside_of_tokenizer_json_keep_their_ids(folder: Path, file: str) -> None:
    whole = read_tokenizer(folder)
    added = whole.get_added_tokens_decoder().items()
    first, content = max((i, t.content) for i, t in added if "lvr" not in t.content)
    ids = {first: content, first + 1: "<|newer|>"}
    drop_token(folder, content)
    if file == "added_tokens.json":
        (folder / file).write_text(json.dumps({name: i for i, name in ids.items()}))
    else:
        decoder = {str(i): {"content": name, "special": True} for i, name in ids.items()}
        edit(folder / file, added_tokens_decoder=decoder)
    tokenizer = read_tokenizer(folder)
    assert {i: tokenizer.id_to_token(i) for i in ids} == ids
    markers = with_markers(tokenizer, first + 5)
    assert markers.token_to_id("<|lvr_start|>") == first + 2


def test_a_token_whose_declared_id_is_taken_is_refused(folder: Path) -> None:
    decoder = {"3": {"content": "<|image_pad|>", "special": True}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    with pytest.raises(BundleError, match=r"<\|image_pad\|> is declared as token 3"):
        read_tokenizer(folder)


def test_prompts_are_not_cut_or_padded_as_the_tokenizer_was_saved(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    want = tokenizer.encode("what colour is the star").ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder).encode("what colour is the star").ids == want


def test_a_full_vocabulary_gives_markers_the_last_of_its_reserved_tokens() -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="b"))
    reserved = [f"<|reserved_special_token_{n}|>" for n in range(5)]
    tokenizer.add_special_tokens([*reserved, "<|behind|>"])
    ids = [tokenizer.token_to_id(name) for name in reserved]
    marked = with_markers(tokenizer, rows=tokenizer.get_vocab_size())
    names = ("<|lvr_start|>", "<|lvr|>", "<|lvr_end|>")
    assert [marked.token_to_id(name) for name in names] == ids[2:]
    assert marked.token_to_id(reserved[4]) is None
    assert marked.token_to_id(reserved[0]) == ids[0]
    assert marked.encode("a<|lvr|>").ids[-1] == ids[3]


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|lvr_start|>", "<extra>"])
def test_no_special_token_of_the_files_is_let_into_a_question(folder: Path, token: str) -> None:
    edit(folder / "tokenizer_config.json", additional_special_tokens=["<extra>"])
    with pytest.raises(LvrError, match="leave it out"):
        read_checkpoint(folder).processor.prompt(f"what {token} is", [])


# --------------------------------------------------------------------------------------------------
# templates


def test_the_tokenizers_own_template_comes_last(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template=TEXT_ONLY)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(BundleError, match="the chat template cannot be rendered"):
        read_checkpoint(folder)
    edit(folder / "processor_config.json", chat_template="processor")
    assert read_template(folder) == "processor"
    edit(folder / "chat_template.json", chat_template=PICTURES)
    assert read_checkpoint(folder).processor.template == PICTURES
    (folder / "chat_template.jinja").write_text("file")
    assert read_template(folder) == "file"


@pytest.mark.parametrize(
    "several",
    [
        [{"name": "tools", "template": "x"}, {"name": "default", "template": PICTURES}],
        {"tools": "x", "default": PICTURES},
    ],
)
def test_of_several_templates_the_default_is_taken(folder: Path, several: object) -> None:
    (folder / "chat_template.jinja").unlink()
    edit(folder / "chat_template.json", chat_template=several)
    assert read_template(folder) == PICTURES


def test_a_template_that_leaves_the_picture_out_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content[-1].text }}")
    with pytest.raises(BundleError, match="shows 0 of 1 pictures"):
        read_checkpoint(folder)


def test_templates_see_what_transformers_gives_them(folder: Path) -> None:
    template = (
        "{% generation %}{{ eos_token }}{% endgeneration %}\n"
        "{% for part in [1, 2] %}{% if part == 2 %}{% break %}{% endif %}{{ part }}{% endfor %}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}"
        "{% if tools is not none %}tools{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    edit(folder / "tokenizer_config.json", eos_token={"content": "<|im_end|>"})
    once = read_template(folder)
    assert render(once, "q", 0) == '<|im_end|>1{"a": "<é>"}4'
    # A tuned checkpoint keeps the template as it was read.
    (folder / "chat_template.jinja").write_text(once)
    assert read_template(folder) == once


def test_an_answer_begins_as_the_template_lets_it_begin() -> None:
    spaced = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}"
    assert answer_prefix(spaced + "{% if add_generation_prompt %}assistant:{% endif %}") == " "
    assert answer_prefix(spaced + "{% if add_generation_prompt %}assistant: {% endif %}") == ""


# --------------------------------------------------------------------------------------------------
# pictures


def test_processor_config_alone_is_read(folder: Path) -> None:
    want = read_checkpoint(folder).processor.image
    path = folder / "preprocessor_config.json"
    edit(folder / "processor_config.json", image_processor=json.loads(path.read_text()))
    path.unlink()
    assert read_checkpoint(folder).processor.image == want


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("preprocessor_config.json", {"min_pixels": [784]}, "image.min_pixels must be a whole"),
        ("preprocessor_config.json", {"max_pixels": "784"}, "image.max_pixels must be a whole"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "image.mean must be three numbers"),
        ("preprocessor_config.json", {"image_std": [[1], 1, 1]}, "image.std must be a number"),
        ("config.json", {"patch_size": [14]}, "image.patch must be a whole number"),
        ("config.json", {"spatial_merge_size": 0}, "image.merge must be a whole number"),
    ],
)
def test_a_size_of_pictures_of_another_kind_is_refused(
    folder: Path, file: str, fields: dict[str, Any], said: str
) -> None:
    if file == "config.json":
        vision = json.loads((folder / file).read_text(encoding="utf-8"))["vision_config"]
        fields = {"vision_config": vision | fields}
    edit(folder / file, **fields)
    with pytest.raises(BundleError, match=said):
        read_checkpoint(folder)


def test_tiles_lose_what_lies_beyond_their_last_whole_patch() -> None:
    """SmolVLM2-2.2B: tiles of 384 pixels, 27 patches of 14 along a side, 3 x 3 a visual token."""
    family = get("smolvlm")
    config = {"vision_config": {"patch_size": 14}, "scale_factor": 3}
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    sizes = {"size": {"longest_edge": 768}, "max_image_size": {"longest_edge": 384}}
    image = family.image_spec(config, numbers | sizes)
    pixels = np.random.default_rng(0).integers(0, 256, (384, 384, 3), np.uint8)
    patches = family.patches(pixels, normalized(image), image)
    assert patches.shape == (27 * 27, 3 * 14 * 14)
    last = (pixels[364:378, 364:378].transpose(2, 0, 1) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(patches[-1], last.ravel(), atol=1e-6)
    assert family.token_grid(family.grid_of(384, 384, image), image).rows == 18
