"""Which files of weights count, and what is refused before anything is read from them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from lvr_lite.errors import BundleError
from lvr_lite.model.weight_files import INDEX, stored_tensors, weight_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:74dea590\nsize 513028808\n"


def write(path: Path, **tensors: list[float]) -> Path:
    """A safetensors file of float32 vectors."""
    header = {}
    data = b""
    for name, values in tensors.items():
        packed = struct.pack(f"<{len(values)}f", *values)
        offsets = [len(data), len(data) + len(packed)]
        header[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": offsets}
        data += packed
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def index(folder: Path, **places: str) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        stored_tensors(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write(tmp_path / "model-00001-of-00002.safetensors", a=[1.0], b=[2.0, 3.0])
    write(tmp_path / "model-00002-of-00002.safetensors", c=[4.0])
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index(tmp_path, a=one, b=one, c=two)
    return tmp_path


def test_the_index_decides_which_files_count(sharded: Path) -> None:
    for stray in ("model.safetensors", "model_ema.safetensors", "model-00003-of-00003.safetensors"):
        write(sharded / stray, a=[9.0], d=[9.0])
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [file.name for file in weight_files(sharded)] == names
    assert {key: t.file.name for key, t in stored_tensors(sharded).items()} == {
        "a": names[0],
        "b": names[0],
        "c": names[1],
    }


def test_without_an_index_one_file_counts(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", a=[1.0, 2.0])
    write(tmp_path / "consolidated.safetensors", b=[1.0])
    (tensor,) = stored_tensors(tmp_path).values()
    assert (tensor.key, tensor.dtype, tensor.shape) == ("a", "F32", (2,))
    assert tensor.file.read_bytes()[tensor.offset :] == struct.pack("<2f", 1.0, 2.0)


def test_weights_that_nothing_names_are_not_guessed(tmp_path: Path) -> None:
    write(tmp_path / "model-00001-of-00002.safetensors", a=[1.0])
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    path.unlink()
    assert refusal(sharded) == f"{path}: missing, and {INDEX} names it; copy the model again"


def test_a_name_that_its_shard_lacks_is_named(sharded: Path) -> None:
    path = write(sharded / "model-00002-of-00002.safetensors", other=[4.0])
    assert refusal(sharded).startswith(f"{path}: has no c, which {INDEX} places there")


def test_two_shards_with_one_name_are_refused(sharded: Path) -> None:
    path = write(sharded / "model-00002-of-00002.safetensors", a=[1.0], c=[4.0])
    assert refusal(sharded).startswith(f"{path}: holds a, as model-00001-of-00002.safetensors does")


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "sub/w.safetensors", "x"])
def test_an_index_names_files_beside_it_alone(sharded: Path, place: str) -> None:
    index(sharded, a=place)
    assert refusal(sharded).startswith(f"{sharded / INDEX}: {place!r} is not the name of a file")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": null}']
)
def test_a_damaged_index_is_named(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert refusal(sharded).startswith(f"{sharded / INDEX}: ")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", INDEX])
def test_what_git_holds_in_a_files_place_is_said_as_what_it_is(sharded: Path, name: str) -> None:
    (sharded / name).write_text(POINTER)
    said = refusal(sharded)
    assert said == (
        f"{sharded / name}: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    )


def test_an_empty_file_is_said_to_be_empty(sharded: Path) -> None:
    path = sharded / "model-00001-of-00002.safetensors"
    path.write_bytes(b"")
    said = f"{path}: is empty; copy it again (in a Git clone: `git lfs pull`)"
    assert refusal(sharded) == said


def test_a_file_that_ends_too_soon_is_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", a=[1.0] * 100)
    path.write_bytes(path.read_bytes()[:-4])
    assert refusal(tmp_path).startswith(f"{path}: truncated: ")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {"dtype": 7, "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        [],
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, entry: object) -> None:
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    assert str(path) in refusal(tmp_path)


def test_bytes_belong_to_one_tensor(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    other = {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}
    text = json.dumps({"a": entry, "b": other}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    assert "b: its bytes are another's" in refusal(tmp_path)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"{}x"])
def test_a_header_that_no_parser_reads_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert refusal(tmp_path).startswith(f"{path}: ")
