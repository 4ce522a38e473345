"""Pictures are read and cut into patches exactly as transformers does; what cannot be read is
refused in one line.
"""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvr_lite.errors import DataError
from lvr_lite.model import images
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.model.families import ImageSpec
from lvr_lite.model.images import FORMATS, open_for_model, open_picture, picture_size
from lvr_lite.model.processor import Pixels

SPEC = ImageSpec(
    patch=14,
    merge=2,
    temporal_patch=2,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    min_pixels=56 * 56,
    max_pixels=28 * 28 * 256,
    resample="bicubic",
)
SIZES = [
    (140, 140),
    (33, 100),
    (400, 700),
    (1000, 50),
    (28, 28),
    (57, 56),
    (1, 1),
    (10, 1000),
    (5, 500),
    (1, 150),
    (2000, 1500),
    (41, 43),
]
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def with_transparency(mode: str) -> Image.Image:
    picture = noise(90, 70)
    if mode in ("LA", "PA", "RGBA"):
        picture.putalpha(
            Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 90), dtype=np.uint8))
        )
    return picture.convert(mode)


def transformers_patches(pictures: list[Image.Image]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(
        image_mean=SPEC.mean,
        image_std=SPEC.std,
        min_pixels=SPEC.min_pixels,
        max_pixels=SPEC.max_pixels,
    )
    out = processor(images=pictures, return_tensors="np")
    return out["pixel_values"], [(int(h), int(w)) for _, h, w in out["image_grid_thw"]]


def see(pictures: list[Image.Image]) -> Pixels:
    return replace(read_checkpoint("tiny").processor, image=SPEC).see(pictures)


def assert_as_transformers(opened: list[Image.Image], given: list[Image.Image]) -> None:
    pixels = see(opened)
    expected, expected_grids = transformers_patches(given)
    assert pixels.grids == expected_grids
    assert pixels.patches.dtype == np.float32
    assert pixels.patches.shape == expected.shape
    largest = float(np.abs(pixels.patches - expected).max())
    assert largest <= 1e-6, f"largest difference from transformers: {largest}"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_of_every_size_are_those_of_transformers(size: tuple[int, int]) -> None:
    assert_as_transformers([noise(*size)], [noise(*size)])


def test_several_pictures_follow_one_another_as_in_transformers() -> None:
    pictures = [noise(140, 112, 1), noise(60, 200, 2), noise(300, 300, 3)]
    assert_as_transformers(pictures, pictures)


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode_become_what_transformers_makes_of_them(
    mode: str, tmp_path: Path
) -> None:
    name = tmp_path / ("p.png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA") else "p.tif")
    picture = with_transparency(mode)
    if mode in ("HSV", "PA"):  # no file format holds them
        picture = picture.convert("RGB" if mode == "HSV" else "RGBA")
    picture.save(name)
    assert_as_transformers([open_picture(name)], [Image.open(name)])


def test_a_palette_with_transparency_is_laid_on_white_as_in_transformers(tmp_path: Path) -> None:
    picture = noise(60, 60).quantize(16)
    picture.save(tmp_path / "p.png", transparency=bytes(range(0, 256, 16)))
    assert_as_transformers([open_picture(tmp_path / "p.png")], [Image.open(tmp_path / "p.png")])


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpg", "png", "tif", "webp"])
def test_a_size_is_told_as_the_picture_will_be(form: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(60, 100).save(tmp_path / f"p.{form}", exif=exif)
    opened = open_picture(tmp_path / f"p.{form}")
    assert picture_size(tmp_path / f"p.{form}") == (opened.height, opened.width)
    (tmp_path / "none.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"none\.jpg is not a picture"):
        picture_size(tmp_path / "none.jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    image_utils = pytest.importorskip("transformers.image_utils")
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(60, 100).save(tmp_path / "p.jpg", exif=exif)
    opened = open_picture(tmp_path / "p.jpg")
    assert opened.size == ((100, 60) if orientation > 4 else (60, 100))
    assert_as_transformers([opened], [image_utils.load_image(str(tmp_path / "p.jpg"))])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_grey_pictures_of_16_bits_keep_their_range(dtype: type[np.generic], tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]] * 4, dtype)
    Image.fromarray(values).save(tmp_path / "deep.tif")
    assert [open_picture(tmp_path / "deep.tif").getpixel((x, 0)) for x in range(4)] == [
        (v,) * 3 for v in (0, 1, 128, 255)
    ]


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "a.gif").getpixel((3, 3)) == (255, 0, 0)


def damaged_files(folder: Path) -> dict[str, str]:
    """{file name: a word of its message}"""
    noise(64, 64).save(folder / "whole.png")
    noise(64, 64).save(folder / "whole.jpg")
    for kind in ("png", "jpg"):
        data = (folder / f"whole.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "folder.png").mkdir()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(folder / "wide.tif")
    return {
        "cut.png": "damaged",
        "cut.jpg": "damaged",
        "empty.png": "empty",
        "text.png": "not a picture",
        "folder.png": "folder",
        "missing.png": "no such picture",
        "float.tif": "floating-point",
        "wide.tif": "16 bits",
    }


def test_what_is_no_whole_picture_is_refused_in_one_line_with_its_name(tmp_path: Path) -> None:
    for name, word in damaged_files(tmp_path).items():
        with pytest.raises(DataError, match=word) as caught:
            open_picture(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "tif", "bmp", "webp"])
def test_bytes_changed_at_random_give_a_picture_or_a_data_error(kind: str, tmp_path: Path) -> None:
    whole = io.BytesIO()
    noise(24, 24).save(whole, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind.upper()))
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = np.frombuffer(whole.getvalue(), np.uint8).copy()
        data[rng.integers(0, len(data) if rng.random() < 0.5 else 64, size=4)] = rng.integers(
            0, 256, 4
        )
        (tmp_path / "p").write_bytes(data.tobytes())
        try:
            assert open_picture(tmp_path / "p").mode == "RGB"
        except DataError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("side", [8_192, 8_200])
def test_a_picture_of_too_many_pixels_is_refused_and_a_large_one_gives_no_warning(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Above the size at which Pillow warns.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000_000)
    path = tmp_path / "huge.png"
    Image.new("1", (side, side)).save(path)
    if side == 8_192:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert open_picture(path).size == (side, side)
            assert picture_size(path) == (side, side)
        return
    for read in (open_picture, picture_size):
        with pytest.raises(DataError, match=r"huge\.png: .*67 million"):
            read(path)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def test_formats_that_are_not_named_are_never_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr("subprocess.check_call", lambda *command, **_: ran.append(command))
    (tmp_path / "p.png").write_bytes(POSTSCRIPT)
    noise(8, 8).save(tmp_path / "rare.png", "TGA")
    for name in ("p.png", "rare.png"):
        for read in (open_picture, picture_size):
            with pytest.raises(DataError, match=r"not a picture that Pillow can read"):
                read(tmp_path / name)
    assert ran == []


@pytest.mark.parametrize("form", FORMATS)
def test_every_named_format_is_read(form: str, tmp_path: Path) -> None:
    noise(30, 20).save(tmp_path / "p", form)
    assert open_picture(tmp_path / "p").size == (30, 20)
    assert picture_size(tmp_path / "p") == (20, 30)


def test_a_phones_picture_with_a_second_one_in_it_is_read(tmp_path: Path) -> None:
    noise(30, 20).save(tmp_path / "p.jpg", "MPO", save_all=True, append_images=[noise(30, 20, 1)])
    assert open_picture(tmp_path / "p.jpg").size == (30, 20)


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png(*chunks: bytes, width: int = 8, height: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks)


@cache
def hostile_files() -> dict[str, bytes]:
    bomb = zlib.compress(bytes(100 << 20), 9)
    pixels = chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
    gif = io.BytesIO()
    Image.new("P", (8, 8)).save(gif, "GIF")
    canvas = bytearray(gif.getvalue())
    canvas[6:10] = struct.pack("<HH", 65_535, 65_535)
    tags = b"".join(struct.pack("<HHII", 256 + i, 4, 0xFFFFFFF, 8) for i in range(9))
    return {
        "text.png": png(chunk(b"zTXt", b"a\0\0" + bomb), pixels, chunk(b"IEND", b"")),
        "profile.png": png(chunk(b"iCCP", b"a\0\0" + bomb), pixels, chunk(b"IEND", b"")),
        "ratio.png": png(chunk(b"IDAT", bomb), width=60_000, height=60_000),
        "broken.png": png(chunk(b"IDAT", b"\0" * 64)),
        "short.png": png(b"\0\0\0\xffIDAT"),
        "canvas.gif": bytes(canvas),
        "tags.tif": b"II*\0" + struct.pack("<IH", 8, 0xFFFF) + tags,
        "size.bmp": b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, 1 << 30, 1 << 30, 1, 24, *[0] * 6),
    }


@pytest.mark.parametrize("name", hostile_files())
def test_a_hostile_picture_costs_little_memory(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(hostile_files()[name])
    tracemalloc.start()
    try:
        opened = open_picture(tmp_path / name)
        # What is no part of the picture may be skipped.
        assert opened.size == (8, 8)
    except DataError as error:
        assert str(error).startswith(str(tmp_path / name))
        assert "\n" not in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 50 << 20


def test_a_line_of_pixels_and_an_animation_of_many_frames_are_read_once(tmp_path: Path) -> None:
    noise(1, 65_000).save(tmp_path / "line.png")
    assert open_picture(tmp_path / "line.png").size == (1, 65_000)
    with pytest.raises(DataError, match=r"line\.png: 1 x 65000 pixels"):
        open_for_model(tmp_path / "line.png")
    frames = [noise(8, 8, seed) for seed in range(40)]
    frames[0].save(tmp_path / "film.png", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "film.png").size == (8, 8)


def test_strips_of_a_large_picture_are_what_the_whole_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "STRIP", 90 * 7)
    for mode in ("LA", "RGBA"):
        with_transparency(mode).save(tmp_path / "p.png")
        assert_as_transformers([open_picture(tmp_path / "p.png")], [Image.open(tmp_path / "p.png")])
    deep = np.random.default_rng(0).integers(0, 65_536, (70, 90), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = np.asarray(open_picture(tmp_path / "deep.png"))[..., 0]
    assert np.array_equal(grey, (deep.astype(int) + 128) // 257)


def test_a_file_of_too_many_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    (tmp_path / "p.png").write_bytes(png() + bytes(2 << 20))
    with pytest.raises(DataError, match="more than 1 MiB"):
        open_picture(tmp_path / "p.png")


def test_a_picture_200_times_as_long_as_wide_passes_and_a_longer_one_is_refused() -> None:
    assert see([noise(400, 2)]).grids == transformers_patches([noise(400, 2)])[1]
    with pytest.raises(DataError, match="picture 2: 3 x 601 pixels"):
        see([noise(28, 28), noise(3, 601)])
