"""JSON that others wrote, read with limits. May import: the standard library."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lvr_lite.errors import BundleError
from lvr_lite.files import JsonObject

# Bytes of a file; the largest that is published, a tokenizer.json, has some 40 MB.
LARGEST = 256 << 20


def read_object(path: Path, remedy: str) -> JsonObject:
    """The JSON object in a file. Raises BundleError, which names file and remedy, where there is
    none. FileNotFoundError is the caller's.
    """
    try:
        # A device or a pipe has no end.
        if path.exists() and not path.is_file():
            raise BundleError(f"{path}: is not a file; {remedy}")
        if path.stat().st_size > LARGEST:
            raise BundleError(f"{path}: larger than {LARGEST >> 20} MiB; {remedy}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error
    return parse_object(content, path, remedy)


def parse_object(content: bytes, path: Path, remedy: str) -> JsonObject:
    """The JSON object that bytes (UTF-8) are. Raises BundleError, as `read_object`.

    path: the file that errors name.
    """
    try:
        data = json.loads(content.decode("utf-8"))
    # ValueError: also of a number with more digits than Python reads.
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{path}: not valid JSON ({reason}); {remedy}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path}: must hold a JSON object; {remedy}")
    return data


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Raises ValueError, which names a field, where its value is no whole number in a range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and isinstance(value, int) and least <= value <= most):
        raise ValueError(f"{name} must be a whole number from {least} to {most}, not {value!r}")


def check_number(name: str, value: object) -> None:
    """Raises ValueError, which names a field, where its value is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, not {value!r}")
