"""From a picture file to RGB, and the numbers that its pixels become.

May import: numpy, Pillow, the families' ImageSpec. The numbers equal those of transformers'
processors: tests/model/test_images.py compares them over sizes, modes and orientations,
tests/model/test_families.py by family.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lvr_lite.errors import DataError
from lvr_lite.model.families.base import ImageSpec

MAX_PIXELS = (
    2 * 89_478_485
)  # where Pillow itself calls a picture a decompression bomb: 179 million, half a gigabyte as RGB
# endings, in small letters, of names that stand for pictures
SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_ASPECT = 200  # transformers refuses longer pictures (smart_resize)


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
        warnings.simplefilter(
            "ignore"
        )  # of large pictures and odd metadata: what matters of it is refused below, in one line
        try:
            picture = Image.open(file)
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(_too_large(name, f"{picture.width} x {picture.height} pixels"))
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture), name)
        except DataError:
            raise
        except Image.DecompressionBombError as error:
            raise DataError(_too_large(name, "too many pixels")) from error
        except UnidentifiedImageError as error:
            raise DataError(f"{name}: {_not_a_picture(file)}") from error
        # Pillow's decoders raise OSError, SyntaxError, struct.error and more on damaged files
        except Exception as error:
            raise DataError(
                f"{name}: a damaged picture ({_one_line(error)}); copy or save it again"
            ) from error


def stored_shape(path: Path) -> tuple[tuple[int, int], int]:
    """((width, height) as stored, EXIF orientation 1 to 8) of a picture, from its header. Raises
    DataError for a file that is none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd metadata
            picture = Image.open(path)
        with picture:
            orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
            turned = picture.format == "TIFF" and orientation in (
                5,
                6,
                7,
                8,
            )  # of which Pillow tells the size after turning
            return picture.size[
                ::-1
            ] if turned else picture.size, orientation if orientation in range(2, 9) else 1
    # Pillow's decoders raise OSError, SyntaxError, struct.error and more on damaged files
    except Exception as error:
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({_one_line(error)})"
        raise DataError(
            f"{path} is not a picture that Pillow can read{why}; save it as PNG or JPEG"
        ) from error


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
        picture = picture.convert("RGBA")
        return Image.alpha_composite(
            Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture
        ).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """A grey picture of mode I or I;16 (0 to 65535) with its range scaled to 0 to 255, rounded."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"{name}: grey values from {values.min()} to {values.max()} do not fit 16 bits; "
            "save it with 8 bits a channel"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


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
