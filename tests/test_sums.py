"""SHA256SUMS: what is changed, missing or damaged is refused by its name."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lvr_lite.errors import BundleError
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import read_checkpoint, resolve
from lvr_lite.sums import SUMS, check_sums, files_below, write_sums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "onnx").mkdir()
    for name in ("a.json", "b c.txt", "onnx/decoder.onnx"):
        (tmp_path / name).write_text(f"content of {name}", encoding="utf-8")
    write_sums(tmp_path, files_below(tmp_path))
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        check_sums(folder, required=("a.json",))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_whole_files_pass_here_and_with_sha256sum(folder: Path) -> None:
    check_sums(folder)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=folder, check=True)


def test_a_folder_without_sums_is_one_of_an_earlier_version(folder: Path) -> None:
    (folder / SUMS).unlink()
    check_sums(folder, required=("a.json",))


def test_a_changed_file_is_named_with_what_to_do(folder: Path) -> None:
    (folder / "a.json").write_text("edited by hand", encoding="utf-8")
    message = refusal(folder)
    assert message.startswith(f"{folder / 'a.json'}: changed or truncated")
    assert "if you changed it yourself, remove its SHA256SUMS" in message


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "b c.txt").unlink()
    assert refusal(folder).startswith(f"{folder / 'b c.txt'}: missing")


def test_what_is_skipped_may_be_anything(folder: Path) -> None:
    (folder / "b c.txt").unlink()
    check_sums(folder, skip=("*.txt",))


def test_a_hash_that_is_known_is_compared_without_reading_the_file(folder: Path) -> None:
    (folder / "b c.txt").unlink()
    (folder / "b c.txt").write_text("other", encoding="utf-8")
    right = (folder / SUMS).read_text(encoding="utf-8").splitlines()[1].split()[0]
    check_sums(folder, known={"b c.txt": right})


def test_a_file_that_must_be_listed_is(folder: Path) -> None:
    write_sums(folder, ["b c.txt"])
    assert refusal(folder).startswith(f"{folder / SUMS}: has no line for a.json")


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "onnx/../a.json", "./a.json", "C:x"])
def test_a_path_that_is_not_plain_is_refused(folder: Path, name: str) -> None:
    (folder / SUMS).write_text(f"{'0' * 64}  {name}\n", encoding="utf-8")
    assert refusal(folder).startswith(f"{folder / SUMS}: ")
    with pytest.raises(BundleError, match="line 1: damaged"):
        check_sums(folder)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path) -> None:
    outside = folder.parent / "outside.txt"
    outside.write_text("content of a.json", encoding="utf-8")
    (folder / "a.json").unlink()
    (folder / "a.json").symlink_to(outside)
    assert refusal(folder).startswith(f"{folder / 'a.json'}: leads out of its folder")


def test_every_byte_of_the_list_itself_counts(folder: Path) -> None:
    path = folder / SUMS
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(flipped(whole, place, place % 8))
        # " *" and "  " are two spellings of one thing.
        if path.read_bytes().replace(b" *", b"  ") != whole:
            assert SUMS in refusal(folder)


def test_a_cut_list_is_refused(folder: Path) -> None:
    whole = (folder / SUMS).read_bytes()
    (folder / SUMS).write_bytes(whole[:-1])
    assert "cut off after line 2" in refusal(folder)
    (folder / SUMS).write_bytes(b"")
    assert "cut off after line 0" in refusal(folder)


# --------------------------------------------------------------------------------------------------
# regions of a bundle and of a checkpoint


def flipped(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def flip_regions(folder: Path, name: str, regions: int, refused: Callable[[], str]) -> None:
    """Flip a bit in each of so many regions of a file; each time `refused` must name the file."""
    path = folder / name
    whole = path.read_bytes()
    for region in range(regions):
        place = min(len(whole) - 1, region * len(whole) // regions)
        path.write_bytes(flipped(whole, place, region % 8))
        assert name in refused(), f"{name}: byte {place}"
    path.write_bytes(whole)


@pytest.fixture
def copied_whole(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a folder with its SHA256SUMS."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy


def test_a_flipped_byte_in_any_region_of_a_bundle_is_refused_by_the_files_name(
    small_int8: Path, copied_whole: Callable[[Path], Path]
) -> None:
    bundle = copied_whole(small_int8)

    def refused() -> str:
        with pytest.raises(BundleError) as caught:
            Bundle.open(bundle)
        return str(caught.value)

    names = files_below(bundle)
    assert {"lvr.json", "tokenizer.json", "report.json", "drift.png"} <= set(names)
    for name in (*names, SUMS):
        flip_regions(bundle, name, 16, refused)
    Bundle.open(bundle)


def test_a_flipped_byte_in_any_region_of_a_tuned_checkpoint_is_refused_by_the_files_name(
    small_tuned: Path, copied_whole: Callable[[Path], Path]
) -> None:
    checkpoint = copied_whole(small_tuned)
    names = [p.name for p in checkpoint.iterdir() if p.suffix in (".json", ".jinja", ".yaml")]
    write_sums(checkpoint, ["adapter_model.safetensors", *names])

    def refused() -> str:
        with pytest.raises(BundleError) as caught:
            read_checkpoint(checkpoint)
        return str(caught.value)

    for name in ("adapter_model.safetensors", *names, SUMS):
        flip_regions(checkpoint, name, 16, refused)
    read_checkpoint(checkpoint)


def test_a_flipped_byte_in_any_region_of_the_embedded_model_is_refused_by_the_files_name(
    copied_whole: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copied_whole(resolve("tiny"))
    monkeypatch.setattr("lvr_lite.model.checkpoint.resolve", lambda model, weights=True: folder)
    folder = model

    def refused() -> str:
        with pytest.raises(BundleError) as caught:
            read_checkpoint("tiny")
        return str(caught.value)

    for name in (path.name for path in model.iterdir() if path.name != "README.md"):
        flip_regions(model, name, 8, refused)
    read_checkpoint("tiny")
