"""ONNX graphs whose weights lie in a file beside them, read and written one weight at a time.

May import: onnx, numpy, model/.

A graph of any size is a small ModelProto and a large file; neither reading nor writing holds more
than one weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import external_data_helper, helper, numpy_helper

from lvr_lite.errors import BundleError
from lvr_lite.model.bundle import Graph, TensorInfo, hashes_and_bytes
from lvr_lite.model.onnx_files import Place, check_graph, place_of

# Of each weight in its file, in bytes, so that ONNX Runtime can map it.
ALIGNMENT = 4096
# Bytes up to which a weight stays in the .onnx.
INLINE = 1024
# Bytes of each sample that `fingerprint` hashes, and how many samples.
SAMPLE = 4096
SAMPLES = 64
# Types of weights that a bundle may hold: those that numpy computes with, and two of 4 bits.
KINDS = frozenset(
    onnx.TensorProto.DataType.Value(name)
    for name in (
        *("FLOAT", "DOUBLE", "FLOAT16", "BOOL"),
        *("INT4", "INT8", "INT16", "INT32", "INT64"),
        *("UINT4", "UINT8", "UINT16", "UINT32", "UINT64"),
    )
)


class DataFile:
    """A file of weights that grows by one weight at a time."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name

    def add(self, name: str, array: np.ndarray) -> onnx.TensorProto:
        """The initializer for `array`, which lies in the file from now on (in the proto itself
        where it is small).
        """
        # Not ascontiguousarray, which would make a scalar a vector.
        array = np.asarray(array, order="C")
        if array.nbytes <= INLINE:
            return numpy_helper.from_array(array, name)
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        # Not tofile, whose error on a full disk does not say so.
        self._file.write(array.data)
        tensor = declared(name, array.dtype, array.shape)
        del tensor.external_data[:]
        place = {"location": self._name, "offset": offset, "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def declared(name: str, dtype: npt.DTypeLike, shape: Iterable[int]) -> onnx.TensorProto:
    """An initializer whose values are to come."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=list(shape))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="")
    return tensor


@contextmanager
def data_file(path: Path) -> Iterator[DataFile]:
    """A new file of weights beside the graph `path` (….onnx): ….onnx_data."""
    weights = path.with_name(path.name + "_data")
    with weights.open("wb") as file:
        yield DataFile(file, weights.name)


def load(path: Path) -> onnx.ModelProto:
    """A graph without its weights. Raises BundleError where it is none, where a
    weight is of a type that none here has, or as `check_graph`.
    """
    check_graph(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    # protobuf, which onnx brings, has a class of its own for it.
    except Exception as error:
        raise BundleError(f"{path}: not an ONNX graph ({error}); export again") from error
    for tensor in model.graph.initializer:
        if tensor.data_type not in KINDS:
            raise BundleError(
                f"{path}: weight {tensor.name} is of type {tensor.data_type}, which no weight of a "
                "bundle has; export again"
            )
    return model


def _place(tensor: onnx.TensorProto, folder: Path) -> Place:
    """Where a weight's values lie. Raises BundleError as `place_of`, and where they are not as many
    as its shape says.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    place = place_of(folder / "graph", tensor.name, entries)
    wanted = size(tensor)
    left = place.file.stat().st_size - place.offset
    if wanted > (left if place.length is None else place.length):
        raise BundleError(
            f"{place.file}: holds fewer bytes of weight {tensor.name} than its shape takes; "
            "export again"
        )
    return place


def read(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """A weight's values. folder: where its file lies."""
    if not external_data_helper.uses_external_data(tensor):
        return np.asarray(numpy_helper.to_array(tensor))
    place = _place(tensor, folder)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    array = np.fromfile(place.file, dtype, _count(tensor), offset=place.offset)
    return array.reshape(tuple(tensor.dims))


def overwrite(tensor: onnx.TensorProto, folder: Path, array: np.ndarray) -> None:
    """Give a weight other values of the same type and shape, where they lie: in its file, in
    `folder`, or in the tensor itself.
    """
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    assert array.dtype == dtype, tensor.name
    assert array.shape == tuple(tensor.dims), tensor.name
    if not external_data_helper.uses_external_data(tensor):
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return
    place = _place(tensor, folder)
    with place.file.open("r+b") as file:
        file.seek(place.offset)
        file.write(np.ascontiguousarray(array).data)


def _count(tensor: onnx.TensorProto) -> int:
    """Raises BundleError for a shape that no array has."""
    # Python's own product, since numpy's would overflow to anything.
    count: int = math.prod(tensor.dims)
    if any(side < 0 for side in tensor.dims) or count >= 1 << 48:
        raise BundleError(f"weight {tensor.name} has the shape {list(tensor.dims)}; export again")
    return count


def size(tensor: onnx.TensorProto) -> int:
    """Bytes of a weight's values."""
    if tensor.data_type in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4):
        return _count(tensor) // 2
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return _count(tensor) * int(dtype.itemsize)


def graph_files(folder: Path, path: str) -> tuple[dict[str, str], int]:
    """`files` and `bytes` of the manifest's entry for a graph that lies at `path` in a bundle.

    The .onnx comes first, then what holds its weights. A file that another graph has too counts
    among the bytes only where it has the graph's own name.
    """
    own = f"{path}_data"
    folder_of_graph = Path(path).parent
    files = locations(load(folder / path))
    data = {str(folder_of_graph / file) for file in files}
    if own not in data:
        # Nothing was large enough for it.
        (folder / own).unlink(missing_ok=True)
    digests, _ = hashes_and_bytes(folder, [path, *sorted(data)])
    counted = [path, own] if own in data else [path]
    return digests, sum((folder / p).stat().st_size for p in counted)


def describe(folder: Path, path: str, precision: str) -> Graph:
    """The manifest's entry for the graph at `path` in a bundle, its inputs and outputs read off the
    file.
    """
    proto = load(folder / path).graph
    digests, size = graph_files(folder, path)
    return Graph(
        precision=precision,
        inputs={value.name: _tensor_info(value) for value in proto.input},
        outputs={value.name: _tensor_info(value) for value in proto.output},
        files=digests,
        bytes=size,
    )


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return TensorInfo(dtype, [axis.dim_param or axis.dim_value for axis in tensor.shape.dim])


def locations(model: onnx.ModelProto) -> set[str]:
    """The files that hold a graph's weights, by their names."""
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def fingerprint(tensor: onnx.TensorProto, folder: Path) -> tuple[int, bytes]:
    """Tells a weight's bytes from others: their number, and a hash over samples of them, so that a
    large file is not read again.
    """
    place = _place(tensor, folder)
    length = size(tensor) if place.length is None else place.length
    end = place.offset + length
    digest = hashlib.sha256()
    with place.file.open("rb") as file:
        for start in range(place.offset, end, max(SAMPLE, length // SAMPLES)):
            file.seek(start)
            digest.update(file.read(min(SAMPLE, end - start)))
    return length, digest.digest()


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises BundleError, naming the weight, where a value is not finite."""
    # A sum is finite only where all values are, and needs no second array; where it overflows,
    # every value is looked at.
    if array.dtype.kind != "f" or np.isfinite(array.sum(dtype=np.float64)):
        return
    if not np.isfinite(array).all():
        raise BundleError(
            f"weight {name} holds values that are not finite; export a sound checkpoint again"
        )
