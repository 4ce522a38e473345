"""Checkpoints: what is there is read without weights, what is missing or foreign is refused in one
line that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvr_lite.errors import BundleError
from lvr_lite.model import spec as latent
from lvr_lite.model.checkpoint import LVR_CONFIG, read_checkpoint, resolve
from lvr_lite.model.spec import LatentSpec

Copy = Callable[[Path], Path]


def refusal(model: str | Path) -> str:
    with pytest.raises(BundleError) as caught:
        read_checkpoint(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def tuned(folder: Path, base: Path | str, **fields: Any) -> Path:
    """What finetune leaves over `base`, with an adapter that nothing here opens."""
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        (folder / name).write_bytes((Path(resolve(str(base))) / name).read_bytes())
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / LVR_CONFIG).write_text(
        json.dumps({"version": 1, "base": str(base), "latent": {"steps": 4}, "image": {}} | fields)
    )
    return folder


def test_tiny_is_the_model_that_ships() -> None:
    checkpoint = read_checkpoint("tiny")
    assert checkpoint.folder == checkpoint.base == resolve("tiny")
    assert not checkpoint.adapter
    assert checkpoint.latent == LatentSpec()


def test_the_markers_take_rows_that_the_embedding_has(small_checkpoint: Path) -> None:
    checkpoint = read_checkpoint(small_checkpoint)
    markers = (
        checkpoint.processor.tokens.lvr_start,
        checkpoint.processor.tokens.lvr,
        checkpoint.processor.tokens.lvr_end,
    )
    assert [checkpoint.processor.tokenizer.id_to_token(i) for i in markers] == [
        latent.START,
        latent.LATENT,
        latent.END,
    ]
    assert max(markers) < checkpoint.config["text_config"]["vocab_size"]
    assert [
        checkpoint.processor.tokenizer.id_to_token(i) for i in checkpoint.processor.tokens.end
    ] == ["<|im_end|>"]


def test_markers_that_a_tokenizer_lacks_are_added(small_checkpoint: Path, copied: Copy) -> None:
    folder = copied(small_checkpoint)
    edit(folder / "tokenizer.json", lambda data: data["added_tokens"].__delitem__(slice(-3, None)))
    assert (
        read_checkpoint(folder).processor.tokens
        == read_checkpoint(small_checkpoint).processor.tokens
    )


@pytest.mark.parametrize("marker", [latent.START, latent.LATENT, latent.END])
def test_a_tuned_checkpoint_whose_tokenizer_lost_a_marker_is_refused(
    small_checkpoint: Path, tmp_path: Path, marker: str
) -> None:
    folder = tuned(tmp_path / "tuned", small_checkpoint)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != marker]
    path.write_text(json.dumps(data))
    assert refusal(folder).startswith(f"{path}: its vocabulary has no {marker}; ")


def test_a_tuned_checkpoint_brings_its_loop_its_picture_size_and_its_base(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(
        tuned(tmp_path / "tuned", small_checkpoint, image={"max_pixels": 50176})
    )
    assert checkpoint.adapter
    assert checkpoint.base == small_checkpoint
    assert checkpoint.latent == LatentSpec(steps=4)
    base = read_checkpoint(small_checkpoint).processor
    assert checkpoint.processor.image == base.with_max_pixels(50176).image


def test_the_digest_changes_with_the_adapter_and_with_the_base(
    small_checkpoint: Path, copied: Copy, tmp_path: Path
) -> None:
    base = copied(small_checkpoint)
    folder = tuned(tmp_path / "tuned", base)
    digests = [read_checkpoint(base).digest(), read_checkpoint(folder).digest()]
    (folder / "adapter_model.safetensors").write_bytes(b"other weights")
    digests.append(read_checkpoint(folder).digest())
    (base / "more.safetensors").write_bytes(b"more")
    digests.append(read_checkpoint(folder).digest())
    assert len(set(digests)) == 4


@pytest.mark.parametrize("name", ["nosuch", "./a/b", "/nowhere/at/all", "a/b/c", "~/model"])
def test_a_folder_that_is_not_there_is_refused_with_what_may_be_given(name: str) -> None:
    assert refusal(name) == (
        f"{name}: no such folder; give `tiny`, a checkpoint's folder, or a hub id such as "
        "Qwen/Qwen2.5-VL-3B-Instruct"
    )


def test_a_hub_id_that_is_not_on_this_machine_is_refused_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("nobody/nothing").startswith(
        "nobody/nothing: neither a folder here nor to be had from the hub ("
    )


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    assert "no such folder" in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"]
)
def test_a_missing_file_is_named(small_checkpoint: Path, copied: Copy, name: str) -> None:
    folder = copied(small_checkpoint)
    (folder / name).unlink()
    said = refusal(folder)
    assert str(folder) in said
    assert name in said


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_file_that_is_not_what_its_name_says_is_named(
    small_checkpoint: Path, copied: Copy, name: str, content: str
) -> None:
    folder = copied(small_checkpoint)
    (folder / name).write_bytes(content.encode("latin-1"))
    assert refusal(folder).startswith(f"{folder / name}: ")


def test_pickled_weights_are_not_read(small_checkpoint: Path, copied: Copy) -> None:
    folder = copied(small_checkpoint)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert (
        refusal(folder)
        == f"{folder}: no *.safetensors weights (pickled weights are not read: convert them first)"
    )


def test_another_architecture_is_named_with_what_is_supported(
    small_checkpoint: Path, copied: Copy
) -> None:
    folder = copied(small_checkpoint)
    edit(folder / "config.json", lambda data: data.update(model_type="llava"))
    said = refusal(folder)
    assert "llava" in said
    assert "qwen2_5_vl" in said


@pytest.mark.parametrize("field", ["text_config", "vision_config"])
def test_a_configuration_without_a_part_is_refused(
    small_checkpoint: Path, copied: Copy, field: str
) -> None:
    folder = copied(small_checkpoint)
    edit(folder / "config.json", lambda data: data.__delitem__(field))
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("field", ["image_mean", "image_std", "max_pixels"])
def test_a_preprocessor_without_its_numbers_is_refused(
    small_checkpoint: Path, copied: Copy, field: str
) -> None:
    folder = copied(small_checkpoint)
    edit(folder / "preprocessor_config.json", lambda data: data.__delitem__(field))
    assert str(folder) in refusal(folder)


def test_a_vocabulary_without_spare_rows_is_refused(small_checkpoint: Path, copied: Copy) -> None:
    folder = copied(small_checkpoint)
    rows = read_checkpoint(folder).processor.tokens.lvr_end  # one too few for the last marker
    edit(folder / "config.json", lambda data: data["text_config"].update(vocab_size=rows))
    assert refusal(folder) == (
        f"{folder}: its embedding has {rows} rows, none spare and none reserved for the three "
        "latent tokens: resize it first (transformers' resize_token_embeddings)"
    )


def test_a_tokenizer_of_another_model_is_refused(small_checkpoint: Path, copied: Copy) -> None:
    folder = copied(small_checkpoint)
    text = (folder / "tokenizer.json").read_text().replace("<|image_pad|>", "<|other_pad|>")
    (folder / "tokenizer.json").write_text(text)
    assert "its vocabulary has no <|image_pad|>" in refusal(folder)


def test_a_tuned_checkpoint_without_its_adapter_is_refused(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tuned(tmp_path / "tuned", small_checkpoint)
    (folder / "adapter_model.safetensors").unlink()
    assert refusal(folder).startswith(f"{folder / 'adapter_model.safetensors'}: missing")


def test_a_tuned_checkpoint_whose_base_is_gone_is_refused(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tuned(tmp_path / "tuned", small_checkpoint)
    edit(folder / LVR_CONFIG, lambda data: data.update(base=str(tmp_path / "moved")))
    assert str(tmp_path / "moved") in refusal(folder)


@pytest.mark.parametrize("field", ["base", "latent"])
def test_a_tuned_checkpoint_without_a_field_is_refused(
    small_checkpoint: Path, tmp_path: Path, field: str
) -> None:
    folder = tuned(tmp_path / "tuned", small_checkpoint)
    edit(folder / LVR_CONFIG, lambda data: data.__delitem__(field))
    said = refusal(folder)
    assert str(folder / LVR_CONFIG) in said
    assert field in said


@pytest.mark.parametrize("loop", [{"steps": 4, "feedback": "norm"}, {"steps": 4, "mode": "sealed"}])
def test_a_loop_of_a_later_version_is_refused(
    small_checkpoint: Path, tmp_path: Path, loop: dict[str, Any]
) -> None:
    assert "update lvr-lite" in refusal(tuned(tmp_path / "tuned", small_checkpoint, latent=loop))
