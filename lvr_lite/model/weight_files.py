"""The files of a model's weights: which ones count, what tensors they declare. May import: the
standard library.

    weight_files(folder)       the shards that model.safetensors.index.json names, or
                               model.safetensors where there is no index; never anything else
    stored_tensors(folder)     {name: where it lies, its type and shape}, no values read

A safetensors header is JSON behind eight bytes of length (huggingface.co/docs/safetensors), and is
read by hand.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lvr_lite.errors import BundleError
from lvr_lite.files import JsonObject
from lvr_lite.model.json_files import parse_object, read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# bytes; the format's own limit
HEADER_LIMIT = 100 << 20
# The first bytes of what Git holds in the place of a large file (git-lfs.com, its specification).
LFS_POINTER = b"version https://git-lfs"
# What weights that are not quantized are stored as, by safetensors' names, and the bytes of each.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Of every type that takes whole bytes.
WHOLE = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
BYTES = FLOATS | WHOLE | {"F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}
GIVE_PLAIN = "the weights are quantized already; give the model in 16 or 32 bits"
# Bytes of a tensor that are compared at a time.
PIECE = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's values lie.

    key: its name in the file.
    dtype: as safetensors names it, such as "BF16".
    offset: of its first byte in the file.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


def first_weights(folder: Path) -> Path:
    """The file that decides which weights count: the index, or the only file of weights.

    Raises BundleError where there is neither.
    """
    for name in (INDEX, SINGLE):
        # A link whose target is gone is there, and says so when it is read.
        if (folder / name).is_file() or (folder / name).is_symlink():
            return folder / name
    if others := sorted(folder.glob("*.safetensors")):
        raise BundleError(
            f"{folder}: neither {SINGLE} nor {INDEX}, which says what {others[0].name} belongs to; "
            "copy the model again"
        )
    raise BundleError(
        f"{folder}: no *.safetensors weights (pickled weights are not read: convert them first)"
    )


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, by their names.

    Raises BundleError for weights that are missing, an index that is damaged, and files that hold
    no weights yet.
    """
    first = first_weights(folder)
    if first.name == INDEX:
        return [_shard(folder, name) for name in sorted(set(_weight_map(first).values()))]
    refuse_stand_in(first)
    return [first]


def _shard(folder: Path, name: str) -> Path:
    # An index may come from anywhere: it names files beside it, and no others.
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise BundleError(f"{folder / INDEX}: {name!r} is not the name of a file beside it")
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{path}: missing, and {INDEX} names it; copy the model again")
    refuse_stand_in(path)
    return path


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor: the file that holds it}."""
    refuse_stand_in(index)
    try:
        weights = read_object(index, "copy the model again")["weight_map"]
    except (OSError, KeyError) as error:
        raise BundleError(
            f"{index}: not an index of weights ({type(error).__name__}: {error}); "
            "copy the model again"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(f, str) for f in weights.values()):
        raise BundleError(f"{index}: weight_map must give each weight a file; copy the model again")
    return weights


def refuse_stand_in(path: Path) -> None:
    """Raises BundleError where a file is empty, or what Git holds in its place."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be read ({error.strerror or error}); copy the model again"
        ) from error
    if not start:
        raise BundleError(f"{path}: is empty; copy it again (in a Git clone: `git lfs pull`)")
    if start == LFS_POINTER:
        raise BundleError(
            f"{path}: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
        )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model's weights by its name in the files.

    Raises BundleError as `weight_files` and `read_header`, where shards lack a name of the index,
    and where two of them hold the same one.
    """
    tensors: dict[str, StoredTensor] = {}
    files = weight_files(folder)
    for file in files:
        for key, tensor in tensors_of(file).items():
            if key in tensors:
                raise BundleError(
                    f"{file}: holds {key}, as {tensors[key].file.name} does; copy the model again"
                )
            tensors[key] = tensor
    if first_weights(folder).name == INDEX:
        _check_index(folder, tensors)
    return tensors


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Which of its shards a tensor lies in does not matter, as for transformers."""
    for key, name in _weight_map(folder / INDEX).items():
        if key not in tensors:
            raise BundleError(
                f"{folder / name}: has no {key}, which {INDEX} places there; copy the model again"
            )


def tensors_of(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by their names.

    Raises BundleError as `read_header`, and where a tensor's bytes are not as many as its shape
    says, lie outside the file, or are another's too.
    """
    header = read_header(path)
    header.pop("__metadata__", None)
    for key, entry in header.items():
        first, last = entry["data_offsets"]
        # 4 bits a value and others need no whole bytes.
        wanted = math.prod(entry["shape"]) * BYTES.get(entry["dtype"], 0)
        if first > last or (entry["dtype"] in BYTES and last - first != wanted):
            problem = f"bytes {first} to {last} do not hold its shape {entry['shape']}"
            raise BundleError(f"{path}: not a safetensors file ({key[:200]}: {problem})")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    start = 8 + length
    _check_bytes(path, header, start)
    tensors = {}
    for key, entry in header.items():
        first, _ = entry["data_offsets"]
        tensors[key] = StoredTensor(path, key, entry["dtype"], tuple(entry["shape"]), start + first)
    return tensors


def read_header(path: Path) -> JsonObject:
    """The header of a safetensors file: {tensor: {"dtype", "shape", "data_offsets"}}.

    Raises BundleError where it is not one.
    """
    refuse_stand_in(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(HEADER_LIMIT, size):
                raise BundleError(
                    f"{path}: truncated, or not a safetensors file "
                    f"(its header would take {length} bytes)"
                )
            content = file.read(length)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error
    except struct.error as error:
        raise BundleError(f"{path}: truncated, or not a safetensors file ({error})") from error
    header = parse_object(content, path, "truncated, or not a safetensors file")
    tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
    for key, entry in tensors.items():
        if (problem := _problem(entry)) is not None:
            raise BundleError(f"{path}: not a safetensors file ({key[:200]}: {problem})")
    return header


def _problem(entry: object) -> str | None:
    """What is wrong with a tensor's entry; None where nothing is."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return "no dtype"
    shape = entry.get("shape")
    offsets = entry.get("data_offsets")
    two = isinstance(offsets, list) and len(offsets) == 2
    if not _are_counts(shape) or not _are_counts(offsets) or not two:
        return "shape or data_offsets are no counts"
    return None


def _are_counts(values: object) -> bool:
    """Whether they are a list of whole numbers that are not negative."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
        for value in values
    )


def _check_bytes(path: Path, tensors: JsonObject, start: int) -> None:
    """Raises BundleError where bytes of two tensors overlap, or lie beyond the end of the file.

    start: of the tensors' bytes in the file.
    """
    places = sorted((*entry["data_offsets"], key) for key, entry in tensors.items())
    end = 0
    for first, last, key in places:
        if first < end:
            raise BundleError(f"{path}: not a safetensors file ({key}: its bytes are another's)")
        end = last
    if (size := path.stat().st_size) < start + end:
        raise BundleError(
            f"{path}: truncated: {size} bytes of {start + end}; copy it again, or resume the "
            "download"
        )


def refuse_quantized(path: Path, config: JsonObject) -> None:
    """Raises BundleError for a base that is quantized already: it is rounded here, from weights of
    16 or 32 bits.

    path: of `config`, config.json.
    """
    parts = (config, config.get("text_config"), config.get("vision_config"))
    for part in parts:
        for field in ("quantization_config", "compression_config"):
            settings = part.get(field) if isinstance(part, dict) else None
            if settings:
                raise BundleError(f"{path}: {field} says {_method(settings)}: {GIVE_PLAIN}")


def _method(settings: object) -> str:
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return str(method or "that it is quantized")


def refuse_quantized_tensor(tensor: StoredTensor) -> None:
    """Raises BundleError for a tensor of another kind than floats of 16 bits or more."""
    if tensor.dtype not in FLOATS:
        raise BundleError(
            f"{tensor.file}: weight {tensor.key} is stored as {tensor.dtype}; {GIVE_PLAIN}"
        )


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are equal to the byte. Holds a few MiB at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left = math.prod(one.shape) * FLOATS[one.dtype]
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        while left:
            count = min(left, PIECE)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True
