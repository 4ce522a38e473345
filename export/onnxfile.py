"""ONNX graphs whose weights lie in a file beside them, read and written one weight at a time. May
import: onnx, numpy, rich, the core.

A graph of any size is a small ModelProto and a large file; neither reading nor writing holds more
than one weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

from lvr_lite.errors import BundleError
from lvr_lite.generate.onnx import open_session
from lvr_lite.model.bundle import Bundle, hashes_and_bytes

ALIGNMENT = 4096  # of each weight in its file, so that ONNX Runtime can map it
INLINE = 1024  # bytes up to which a weight stays in the .onnx


class DataFile:
    """A file of weights that grows by one weight at a time."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name

    def add(self, name: str, array: np.ndarray) -> onnx.TensorProto:
        """The initializer for `array`, which lies in the file from now on (in the proto itself
        where it is small).
        """
        array = np.asarray(array, order="C")  # ascontiguousarray would make a scalar a vector
        if array.nbytes <= INLINE:
            return numpy_helper.from_array(array, name)
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(array.data)  # not tofile, whose error on a full disk does not say so
        tensor = declared(name, array.dtype, array.shape)
        del tensor.external_data[:]
        for key, value in (("location", self._name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def declared(name: str, dtype: Any, shape: Iterable[int]) -> onnx.TensorProto:
    """An initializer whose values are to come."""
    tensor = onnx.TensorProto(
        name=name, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dims=list(shape)
    )
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
    """A graph without its weights."""
    return onnx.load(str(path), load_external_data=False)


def read(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """A weight's values. folder: where its file lies."""
    if not external_data_helper.uses_external_data(tensor):
        return np.asarray(numpy_helper.to_array(tensor))
    where = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = int(np.prod(tensor.dims, dtype=np.int64))
    return np.asarray(
        np.fromfile(
            folder / where["location"], dtype, count, offset=int(where.get("offset", 0))
        ).reshape(tuple(tensor.dims))
    )


def overwrite(tensor: onnx.TensorProto, folder: Path, array: np.ndarray) -> None:
    """Give a weight other values of the same type and shape, where they lie: in its file, in
    `folder`, or in the tensor itself.
    """
    assert array.dtype == helper.tensor_dtype_to_np_dtype(
        tensor.data_type
    ) and array.shape == tuple(tensor.dims), tensor.name
    if not external_data_helper.uses_external_data(tensor):
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return
    where = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / where["location"]).open("r+b") as file:
        file.seek(int(where.get("offset", 0)))
        file.write(np.ascontiguousarray(array).data)


def size(tensor: onnx.TensorProto) -> int:
    """Bytes of a weight's values."""
    bits = {onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT4: 4}.get(tensor.data_type)
    count = int(np.prod(tensor.dims, dtype=np.int64))
    return (
        count * bits // 8
        if bits
        else count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    )


def graph_files(folder: Path, path: str) -> tuple[dict[str, str], int]:
    """`files` and `bytes` of the manifest's entry for a graph that lies at `path` in a bundle.

    The .onnx comes first, then what holds its weights. A file that another graph has too counts
    among the bytes only where it has the graph's own name.
    """
    own = f"{path}_data"
    data = {str(Path(path).parent / location) for location in locations(load(folder / path))}
    if own not in data:
        # Nothing was large enough for it.
        (folder / own).unlink(missing_ok=True)
    digests, _ = hashes_and_bytes(folder, [path, *sorted(data)])
    counted = [path, own] if own in data else [path]
    return digests, sum((folder / p).stat().st_size for p in counted)


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
    where = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(where["offset"]), int(where["length"])
    digest = hashlib.sha256()
    with (folder / where["location"]).open("rb") as file:
        for at in range(offset, offset + length, max(4096, length // 64)):
            file.seek(at)
            digest.update(file.read(min(4096, offset + length - at)))
    return length, digest.digest()


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises BundleError, naming the weight, where a value is not finite."""
    if (
        array.dtype.kind == "f"
        and not np.isfinite(array.sum(dtype=np.float64))
        and not np.isfinite(array).all()
    ):
        raise BundleError(
            f"weight {name} holds values that are not finite; export a sound checkpoint again"
        )


def decoder_layer(model: onnx.ModelProto, index: int, layers: int) -> onnx.ModelProto:
    """One layer of a decoder graph as a graph of its own, whose weights lie where they lay: hidden
    states in as `hidden`, out as `after`.

    layers: of the whole decoder. A layer begins where its first norm reads and ends where the next
    one does.
    """
    begin = _read_by_norm(model, f".layers.{index}.input_layernorm.weight")
    end = _read_by_norm(
        model,
        f".layers.{index + 1}.input_layernorm.weight"
        if index + 1 < layers
        else "language_model.norm.weight",
    )
    cached = [f"present.{index}.key", f"present.{index}.value"]
    made_by = {output: node for node in model.graph.node for output in node.output}
    wanted, nodes, ends = [end, *cached], [], {begin, *(value.name for value in model.graph.input)}
    while wanted:
        name = wanted.pop()
        node = made_by.get(name)
        if name not in ends and node is not None and node not in nodes:
            nodes.append(node)
            wanted += [n for n in node.input if n]
    order = {id(node): i for i, node in enumerate(model.graph.node)}
    used = {name for node in nodes for name in node.input}
    part = onnx.ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.graph.name = f"layer {index}"
    part.graph.node.extend(
        sorted((made_by[node.output[0]] for node in nodes), key=lambda node: order[id(node)])
    )
    part.graph.initializer.extend(
        tensor for tensor in model.graph.initializer if tensor.name in used
    )
    part.graph.input.extend(value for value in model.graph.input if value.name in used - {begin})
    part.graph.output.extend(value for value in model.graph.output if value.name in cached)
    kind = next(
        value for value in model.graph.output if value.name == cached[0]
    ).type.tensor_type.elem_type  # what a layer computes in
    part.graph.input.append(
        helper.make_tensor_value_info("hidden", kind, ["batch", "sequence", None])
    )
    part.graph.output.insert(
        0, helper.make_tensor_value_info("after", kind, ["batch", "sequence", None])
    )
    for name, own in ((begin, "hidden"), (end, "after")):
        part.graph.node.append(
            helper.make_node(
                "Identity",
                [own] if own == "hidden" else [name],
                [name] if own == "hidden" else [own],
            )
        )
    first = part.graph.node.pop(
        len(part.graph.node) - 2
    )  # what makes `begin` must come before its readers
    part.graph.node.insert(0, first)
    return part


def _read_by_norm(model: onnx.ModelProto, weight: str) -> str:
    """What the norm with this weight reads."""
    return str(
        next(
            node.input[0]
            for node in model.graph.node
            if node.op_type == "RMSNormalization" and node.input[1].endswith(weight)
        )
    )


class DecoderLayers:
    """The layers of a bundle's decoder, run one by one, so that no more than one is in memory."""

    def __init__(self, bundle: Bundle) -> None:
        self._file = bundle.path("decoder")
        self._model = load(self._file)
        decoder = bundle.manifest.decoder
        self._layers = decoder.layers
        self._row = (decoder.kv_heads, decoder.head_dim)
        inputs = bundle.manifest.graphs["decoder"].inputs
        self._cache_type = np.dtype(inputs["past_key_values.0.key"].dtype)
        self._deepstack = (
            int(inputs["deepstack_embeds"].axes[-1]) if "deepstack_embeds" in inputs else 0
        )

    def run(self, index: int, calls: list[LayerCall]) -> list[np.ndarray]:
        """Hidden states after layer `index` of several calls, one after another, K/V kept between
        them.
        """
        return self.run_all(index, [calls])[0]

    def run_all(
        self,
        index: int,
        sequences: list[list[LayerCall]],
        watch: Callable[[tuple[str, ...], np.ndarray], None] | None = None,
    ) -> list[list[np.ndarray]]:
        """`run` for several sequences, each with K/V of its own. watch: is told the names of the
        layer's weights, those that are multiplied with the same value together, and that value, (N,
        K), once a call.
        """
        part = decoder_layer(self._model, index, self._layers)
        weights = {tensor.name for tensor in part.graph.initializer if len(tensor.dims) == 2}
        watched: dict[str, list[str]] = {}  # value -> the weights that read it
        for node in part.graph.node:
            if watch is not None and node.op_type == "MatMul" and node.input[1] in weights:
                watched.setdefault(node.input[0], []).append(node.input[1])
        part.graph.output.extend(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in watched
        )
        session = open_session(part.SerializeToString(), self._file.parent)
        seen: dict[str, Callable[[np.ndarray], None]] = {}
        if watch is not None:
            seen = {name: partial(watch, tuple(readers)) for name, readers in watched.items()}
        return [self._run(session, part, index, calls, seen) for calls in sequences]

    def _run(
        self,
        session: Any,
        part: onnx.ModelProto,
        index: int,
        calls: list[LayerCall],
        seen: dict[str, Callable[[np.ndarray], None]],
    ) -> list[np.ndarray]:
        batch, room = len(calls[0].hidden), sum(call.hidden.shape[1] for call in calls)
        cache = {
            part: np.zeros((batch, self._row[0], room, self._row[1]), self._cache_type)
            for part in ("key", "value")
        }
        wanted, after = {value.name for value in part.graph.input}, []
        for call in calls:
            given = {
                "hidden": call.hidden.astype(self._cache_type),
                "position_ids": call.positions,
                "seqlens_k": (call.totals - 1).astype(np.int32),
            }
            given["total_sequence_length"] = np.array(call.totals.max(), np.int32)
            given["deepstack_embeds"] = np.zeros(
                (*call.hidden.shape[:2], self._deepstack), np.float32
            )
            if call.added is not None:
                width = call.hidden.shape[2]
                given["deepstack_embeds"][..., index * width : (index + 1) * width] = call.added
            given |= {f"past_key_values.{index}.{name}": value for name, value in cache.items()}
            given |= {
                n: cache["key"]
                for n in wanted
                if n.startswith("past_key_values.") and n not in given
            }  # another's, for its shape
            names = ["after", f"present.{index}.key", f"present.{index}.value", *seen]
            out, cache["key"], cache["value"], *shown = session.run(
                names, {k: v for k, v in given.items() if k in wanted}
            )
            after.append(out.astype(np.float32))
            for tell, value in zip(seen.values(), shown, strict=True):
                tell(value.reshape(-1, value.shape[-1]))
        return after


@dataclass(frozen=True)
class LayerCall:
    """hidden (B, S, H), positions (3, B, S), totals (B,): positions of each row so far, with these;
    added (B, S, H): what is added after the layer (deepstack), or None.
    """

    hidden: np.ndarray
    positions: np.ndarray
    totals: np.ndarray
    added: np.ndarray | None = None
