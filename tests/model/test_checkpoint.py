"""Checkpoints: what is there is read without weights, what is missing or foreign is refused in one
line that names it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvr_lite.commands.train import plan_finetune
from lvr_lite.errors import BundleError, LvrError
from lvr_lite.model import spec as latent
from lvr_lite.model.checkpoint import (
    LVR_CONFIG,
    base_fields,
    processor_of,
    read_checkpoint,
    resolve,
)
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
    (base / "model.safetensors").write_bytes(b"other weights of the base")
    digests.append(read_checkpoint(folder).digest())
    assert len(set(digests)) == 4
    # A stale shard, an EMA copy: no part of the model.
    (base / "model_ema.safetensors").write_bytes(b"more")
    (folder / "old.safetensors").write_bytes(b"more")
    assert read_checkpoint(folder).digest() == digests[-1]


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


def test_a_tokenizer_of_another_model_is_refused(small_checkpoint: Path, copied: Copy) -> None:
    folder = copied(small_checkpoint)
    text = (folder / "tokenizer.json").read_text().replace("<|image_pad|>", "<|other_pad|>")
    (folder / "tokenizer.json").write_text(text)
    # tokenizer_config.json names the token still, so that it is added at the end.
    assert "<|image_pad|> is token" in refusal(folder)
    assert "this is not the tokenizer of such a model" in refusal(folder)


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


def test_a_checkpoint_of_a_later_version_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    folder = tuned(tmp_path / "tuned", small_checkpoint, version=2)
    assert refusal(folder) == f"{folder / LVR_CONFIG}: is of version 2, not 1: update lvr-lite"


# --------------------------------------------------------------------------------------------------
# the base is found again

REVISION = "a" * 40


def snapshot(cache: Path, base: Path, weights: bool = True) -> Path:
    """A model in a hub's cache, as huggingface_hub lays it out."""
    model = cache / "models--me--tiny-vl"
    folder = model / "snapshots" / REVISION
    leave_out = None if weights else shutil.ignore_patterns("*.safetensors")
    shutil.copytree(base, folder, ignore=leave_out)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(REVISION)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    folder = tmp_path / "this-machine" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def portable(folder: Path, base: Path, **fields: Any) -> Path:
    """A tuned checkpoint that names `base` in every way that holds."""
    own = base_fields(base, folder, folder.parent)
    assert own.pop("base") == str(base)
    return tuned(folder, base, **own, base_sha256=read_checkpoint(base).base_sha256, **fields)


def test_a_base_from_the_hub_is_named_by_id_and_revision(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    base = snapshot(tmp_path / "cache", small_checkpoint)
    assert base_fields(base, tmp_path / "runs" / "tuned", tmp_path / "runs") == {
        "base": str(base),
        "base_id": "me/tiny-vl",
        "base_revision": REVISION,
    }


def test_a_base_beside_the_run_has_a_relative_path_too(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    fields = base_fields(tmp_path / "base", tmp_path / "tuned" / "checkpoint-2", tmp_path)
    assert fields == {"base": str(tmp_path / "base"), "base_relative": "../../base"}
    assert base_fields(resolve("tiny"), tmp_path / "tuned", tmp_path) == {"base": "tiny"}


def test_base_and_run_are_moved_together(small_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    base = Path(shutil.copytree(small_checkpoint, tmp_path / "here" / "base"))
    portable(tmp_path / "here" / "tuned", base)
    (tmp_path / "here").rename(tmp_path / "there")
    assert read_checkpoint(tmp_path / "there" / "tuned").base == tmp_path / "there" / "base"


def test_a_run_alone_is_moved(small_checkpoint: Path, copied: Copy, tmp_path: Path) -> None:
    base = copied(small_checkpoint)
    portable(tmp_path / "tuned", base)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tuned").rename(tmp_path / "elsewhere" / "tuned")
    assert read_checkpoint(tmp_path / "elsewhere" / "tuned").base == base


def test_another_model_in_the_relative_place_is_not_the_base(
    small_checkpoint: Path, copied: Copy, tmp_path: Path
) -> None:
    base = copied(small_checkpoint)
    portable(tmp_path / "tuned", base)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tuned").rename(tmp_path / "elsewhere" / "tuned")
    other = Path(shutil.copytree(base, tmp_path / "elsewhere" / base.name))
    (other / "model.safetensors").write_bytes(b"other weights")
    assert read_checkpoint(tmp_path / "elsewhere" / "tuned").base == base


@pytest.mark.parametrize("older", [False, True])
def test_a_base_from_the_hub_is_found_in_another_cache(
    small_checkpoint: Path, tmp_path: Path, cache: Path, older: bool
) -> None:
    folder = portable(tmp_path / "tuned", snapshot(tmp_path / "trained-on", small_checkpoint))
    if older:
        # Runs of earlier versions recorded the place in the cache alone.
        edit(folder / LVR_CONFIG, lambda data: [data.pop(k) for k in ("base_id", "base_revision")])
    shutil.rmtree(tmp_path / "trained-on")
    there = snapshot(cache, small_checkpoint)
    assert read_checkpoint(folder).base == there


def test_a_base_that_is_nowhere_is_named_by_file_field_id_and_revision(
    small_checkpoint: Path, tmp_path: Path, cache: Path
) -> None:
    folder = portable(tmp_path / "tuned", snapshot(tmp_path / "trained-on", small_checkpoint))
    shutil.rmtree(tmp_path / "trained-on")
    said = refusal(folder)
    assert said.startswith(f"{folder / LVR_CONFIG}: base ")
    assert f"me/tiny-vl at revision {REVISION} is not to be had from the hub" in said
    assert "and write its folder into the field `base`" in said
    assert said.endswith("(and remove SHA256SUMS beside it)")


def test_another_revision_in_the_bases_place_is_passed_over(
    small_checkpoint: Path, tmp_path: Path, cache: Path
) -> None:
    base = snapshot(tmp_path / "trained-on", small_checkpoint)
    folder = portable(tmp_path / "tuned", base)
    (base / "model.safetensors").write_bytes(b"other weights")
    there = snapshot(cache, small_checkpoint)
    assert read_checkpoint(folder).base == there


def test_without_weights_none_are_needed_nor_fetched(
    small_checkpoint: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    there = snapshot(cache, small_checkpoint, weights=False)
    asked: list[list[str]] = []
    download = huggingface_hub.snapshot_download

    def watched(*model: Any, **how: Any) -> str:
        asked.append(how["allow_patterns"])
        return str(download(*model, **how))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watched)
    monkeypatch.chdir(tmp_path)
    assert read_checkpoint("me/tiny-vl", weights=False).base == there
    assert processor_of("me/tiny-vl").tokens == read_checkpoint(small_checkpoint).processor.tokens
    assert plan_finetune("me/tiny-vl")["schema"] == "lvr-lite/plan"
    assert asked
    assert not [patterns for patterns in asked if "*.safetensors" in patterns]
    assert "no *.safetensors weights" in refusal("me/tiny-vl")
    assert asked.pop()[-1] == "*.safetensors"


@pytest.mark.parametrize("part", ["text_config", None])
def test_a_base_that_is_quantized_already_is_refused(
    small_checkpoint: Path, copied: Copy, part: str | None
) -> None:
    folder = copied(small_checkpoint)
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    edit(folder / "config.json", lambda data: (data[part] if part else data).update(settings))
    assert refusal(folder) == (
        f"{folder / 'config.json'}: quantization_config says bitsandbytes: the weights are "
        "quantized already; give the model in 16 or 32 bits"
    )


def test_an_adapter_over_the_given_model_is_refused(small_checkpoint: Path, copied: Copy) -> None:
    folder = copied(small_checkpoint)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert refusal(folder).startswith(f"{folder / 'adapter_config.json'}: an adapter lies over")


def test_an_adapter_that_git_holds_elsewhere_is_refused(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tuned(tmp_path / "tuned", small_checkpoint)
    path = folder / "adapter_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert refusal(folder).startswith(f"{path}: is a Git LFS pointer")


EVIL: tuple[object, ...] = (
    None,
    "",
    -1,
    1e308,
    float("nan"),
    10**12,
    10**400,
    "\ud800",
    [],
    {},
    [[]],
    True,
    "9" * 5000,
)


@pytest.mark.parametrize(
    "name",
    ["config.json", "preprocessor_config.json", "tokenizer_config.json", "generation_config.json"],
)
def test_any_value_in_any_field_gives_a_checkpoint_or_one_line(copied: Copy, name: str) -> None:
    folder = copied(resolve("tiny"))
    whole = json.loads((folder / name).read_text("utf-8"))
    fields = [(whole, key) for key in whole]
    fields += [(part, key) for part in whole.values() if isinstance(part, dict) for key in part]
    for parent, key in fields:
        kept = parent[key]
        for value in EVIL:
            parent[key] = value
            (folder / name).write_text(json.dumps(whole), "utf-8")
            try:
                read_checkpoint(folder)
            except LvrError as error:
                assert "\n" not in str(error)
                str(error).encode()
        parent[key] = kept


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_size_that_no_model_has_is_refused_by_its_name(copied: Copy, field: str) -> None:
    folder = copied(resolve("tiny"))
    edit(folder / "config.json", lambda config: config["text_config"].update({field: 10**12}))
    assert f"text_config.{field} is 1000000000000, which no model has" in refusal(folder)


@pytest.mark.parametrize(
    "latent", [{"steps": "4"}, {"steps": 10**9}, {"steps": 4, "norm": "x"}, [], 3]
)
def test_a_loop_that_is_none_is_refused(
    small_checkpoint: Path, tmp_path: Path, latent: object
) -> None:
    folder = tuned(tmp_path / "tuned", small_checkpoint, latent=latent)
    assert refusal(folder).startswith(f"{folder / LVR_CONFIG}: latent")


def test_a_template_without_end_is_refused_by_its_folder(copied: Copy) -> None:
    folder = copied(resolve("tiny"))
    (folder / "chat_template.jinja").write_text("{{ 'a' * 10**9 }}", "utf-8")
    assert refusal(folder).startswith(f"{folder}: the chat template cannot be rendered")
