"""From a picture file to RGB, and the numbers that its pixels become.

May import: numpy, Pillow, the families' ImageSpec. The numbers equal those of transformers'
processors: tests/model/test_images.py compares them over sizes, modes and orientations,
tests/model/test_families.py by family.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from os import SEEK_END
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from lvr_lite.errors import DataError
from lvr_lite.model.families.base import ImageSpec

# Width times height, 67 million. A phone's 50 megapixels fit; its 200 do not, and no model is shown
# more than a few (`max_pixels`). A hostile picture of this size costs at most some 1.1 GB: WebP's
# decoder keeps three of them.
MAX_PIXELS = 1 << 26
# Bytes of a file; this many pixels of 16 bits and four channels, stored plainly, have as many.
MAX_BYTES = 1 << 29
# Pixels that are converted at once where a conversion needs copies.
STRIP = 1 << 22
# What Pillow may try, by its names: EPS starts Ghostscript, and few people look at rare ones. A
# phone's MPO, a JPEG with a second picture in it, is read as JPEG. Of AVIF Pillow may lack the
# library.
FORMATS = tuple(
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
    if name != "AVIF" or features.check("avif")
)
# Endings, in small letters, of names that stand for pictures.
SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# transformers refuses longer pictures (smart_resize).
MAX_ASPECT = 200


def open_picture(path: Path | str) -> Image.Image:
    """The picture in a file as RGB, upright: the EXIF orientation is applied. See `read_picture`
    for the rules.

    Raises DataError, naming the file, where it is missing, a folder, unreadable or not a whole
    picture of at most MAX_PIXELS.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a picture; name a file in it")
    if not path.is_file():
        raise DataError(f"{path}: no such picture; check the path")
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened ({error.strerror or error}); check its permissions"
        ) from error
    with file:
        return read_picture(file, str(path))


def read_picture(file: BinaryIO, name: str) -> Image.Image:
    """The picture in an open file as RGB, upright; `name` is what errors call it.

    Animations give their first frame. Transparent pixels are laid on white, as transformers'
    `convert_to_rgb` does. Grey pictures of 16 bits are scaled to 8, where Pillow's own conversion
    would clip them to white. Raises DataError as `open_picture` does.
    """
    with warnings.catch_warnings():
        # Of large pictures and odd metadata: what matters of it is refused below, in one line.
        warnings.simplefilter("ignore")
        try:
            picture = _opened(file, name)
            picture.load()
            # In place: a copy would be another 268 MB.
            ImageOps.exif_transpose(picture, in_place=True)
            return _rgb(picture, name)
        except DataError:
            raise
        except Image.DecompressionBombError as error:
            raise DataError(_too_large(name, "too many pixels")) from error
        except UnidentifiedImageError as error:
            raise DataError(f"{name}: {_not_a_picture(file)}") from error
        # Pillow's decoders raise OSError, SyntaxError, struct.error and more on damaged files.
        except Exception as error:
            raise DataError(
                f"{name}: a damaged picture ({_one_line(error)}); copy or save it again"
            ) from error


def _opened(file: BinaryIO, name: str) -> Image.Image:
    """The picture in a file, its header read and nothing of its pixels.

    Raises DataError where these would be too many, and what Pillow raises.
    """
    size = file.seek(0, SEEK_END)
    file.seek(0)
    if size > MAX_BYTES:
        raise DataError(f"{name}: more than {MAX_BYTES >> 20} MiB; scale it down first")
    picture = Image.open(file, formats=FORMATS)
    if picture.width * picture.height > MAX_PIXELS:
        raise DataError(_too_large(name, f"{picture.width} x {picture.height} pixels"))
    return picture


def stored_shape(path: Path) -> tuple[tuple[int, int], int]:
    """((width, height) as stored, EXIF orientation 1 to 8) of a picture, from its header. Raises
    DataError for a file that is none, and for one that is too large to be read.
    """
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            # Of large pictures and odd metadata.
            warnings.simplefilter("ignore")
            picture = _opened(file, str(path))
            orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except DataError:
        raise
    # Pillow's decoders raise OSError, SyntaxError, struct.error and more on damaged files.
    except Exception as error:
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({_one_line(error)})"
        raise DataError(
            f"{path} is not a picture that Pillow can read{why}; save it as PNG or JPEG"
        ) from error
    # Of these Pillow tells the size after turning.
    turned = picture.format == "TIFF" and orientation in (5, 6, 7, 8)
    stored = picture.size[::-1] if turned else picture.size
    return stored, orientation if orientation in range(2, 9) else 1


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture as `open_picture` gives it, from its header alone. Raises
    DataError for a file that is none.
    """
    (width, height), orientation = stored_shape(path)
    return (width, height) if orientation >= 5 else (height, width)


def _too_large(name: str, size: str) -> str:
    limit = MAX_PIXELS // 10**6
    return f"{name}: {size}, more than the {limit} million that are read; scale it down first"


def _not_a_picture(file: BinaryIO) -> str:
    file.seek(0)
    if not file.read(1):
        return "an empty file; copy or download the picture again"
    return "not a picture that Pillow can read; save it as PNG or JPEG"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode.startswith("I"):
        return _eight_bits(picture, name).convert("RGB")
    if picture.mode == "F":
        raise DataError(
            f"{name}: its pixels are floating-point numbers without a known range; "
            "save it with 8 bits a channel"
        )
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        return _on_white(picture)
    return picture.convert("RGB")


def _on_white(picture: Image.Image) -> Image.Image:
    """Transparent pixels laid on white."""
    whole = Image.new("RGB", picture.size)
    for box in _strips(picture):
        strip = picture.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        whole.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return whole


def _eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """A grey picture of mode I or I;16 (0 to 65535) with its range scaled to 0 to 255, rounded."""
    lowest, highest = (int(np.asarray(value)) for value in picture.getextrema())
    if lowest < 0 or highest > 65535:
        raise DataError(
            f"{name}: grey values from {lowest} to {highest} do not fit 16 bits; "
            "save it with 8 bits a channel"
        )
    whole = Image.new("L", picture.size)
    for box in _strips(picture):
        values = np.asarray(picture.crop(box)).astype(np.int64)
        whole.paste(Image.fromarray(((values + 128) // 257).astype(np.uint8)), box)
    return whole


def _strips(picture: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes (x0, y0, x1, y1) of some rows each that cover a picture."""
    rows = max(1, STRIP // picture.width)
    for top in range(0, picture.height, rows):
        yield 0, top, picture.width, min(top + rows, picture.height)


def open_for_model(path: Path) -> Image.Image:
    """`open_picture` of a picture that a model is shown. Raises DataError, which names the file,
    also for one of extreme proportions.
    """
    picture = open_picture(path)
    refuse_extreme(picture, str(path))
    return picture


def refuse_extreme(picture: Image.Image, name: str) -> None:
    """Raises DataError where one side is more than MAX_ASPECT times the other, as transformers."""
    w, h = picture.size
    if max(w, h) > MAX_ASPECT * min(w, h):
        raise DataError(
            f"{name}: {w} x {h} pixels, one side more than {MAX_ASPECT} times the other; "
            "crop it first"
        )


def normalized(image: ImageSpec) -> np.ndarray:
    """(3, 256) float32: what each 8-bit value of each channel becomes; rounded step by step as
    transformers rounds.
    """
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(image.mean, np.float32), np.array(image.std, np.float32)
    return np.asarray((scaled[None] - mean[:, None]) / std[:, None], np.float32)
