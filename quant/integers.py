"""ONNX graphs in float become graphs of integer weights, one weight at a time. May import: onnx,
numpy and what stands above `quant`.

Every matrix product with a constant weight becomes MatMulNBits, and every embedding
GatherBlockQuantized. A large weight that neither rule takes is an error, never a silent exception.
Rounding is this package's own (`blocks`): at 4 bits it leaves about a tenth less error than the
quantizer that ships with ONNX Runtime, which also skips 8-bit embeddings.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from lvr_lite import terminal
from lvr_lite.errors import BundleError
from lvr_lite.export import onnxfile
from lvr_lite.export.onnxfile import DataFile
from lvr_lite.quant.blocks import LARGEST, Blocks, gptq, pack, quantize
from lvr_lite.quant.reports import Conversion
from lvr_lite.quant.schemes import RoundingPlan, Scheme

# A weight with fewer values may stay in float.
SMALL = 4096
MICROSOFT = "com.microsoft"
# Operators whose weight can be replaced, and which input it is.
WEIGHT_INPUT = {"MatMul": 1, "Gather": 0}
# Values whose error is measured at once: the largest matrix of a model takes a gigabyte.
MEASURED = 1 << 22
Read = Callable[[onnx.TensorProto], np.ndarray]


@dataclass(frozen=True)
class EmbeddingTable:
    """An embedding that was rounded, whose bytes a head may read where the two are tied.

    matrix: (V, H) in float.
    scheme: how it was rounded.
    tensors: integers, scales and, where asymmetric, zero points, in the embedding's file.
    """

    matrix: np.ndarray
    scheme: Scheme
    tensors: list[onnx.TensorProto]

    def is_tied_to(self, matrix: np.ndarray, scheme: Scheme) -> bool:
        # A head's last block may be padded, and the rows of an embedding are not.
        padded = matrix.shape[1] % scheme.block
        return not padded and self.scheme == scheme and np.array_equal(self.matrix, matrix)


@dataclass
class IntegerGraph:
    """A float graph that becomes one of integer weights.

    name: of the graph, such as "decoder".
    model: is changed in place.
    read: gives the values of a weight.
    data: the file that the new weights go to.
    plan: how each weight is rounded.
    table: the embedding that was rounded before, for the head; afterwards this graph's, if it has
        one.
    """

    name: str
    model: onnx.ModelProto
    read: Read
    data: DataFile
    plan: RoundingPlan
    table: EmbeddingTable | None = None

    def __post_init__(self) -> None:
        self._weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        # {weight: names of the tensors that took its place}; several nodes may share a weight
        self._parts: dict[str, list[str]] = {}
        # {scales in float32: node that widens them}
        self._casts: dict[str, onnx.NodeProto] = {}
        # {node: how its weight was rounded, and with which error}; of a shared weight, the first
        self._schemes: dict[str, Scheme] = {}
        self._errors: dict[str, float] = {}
        self._kept: dict[str, str] = {}
        self._shared = False
        self._values = 0
        self._bytes = 0
        # Squares of the rounding errors, and of the weights.
        self._squares = np.zeros(2)

    def convert(self) -> Conversion:
        """Returns what became of the graph. Raises BundleError for a weight that cannot be
        rounded.
        """
        nodes = [node for node in self.model.graph.node if self._is_replaceable(node)]
        for node in terminal.bar(nodes, f"{self.name}: weights"):
            weight = self._weights[node.input[WEIGHT_INPUT[node.op_type]]]
            if node.op_type == "MatMul":
                self._replace_matmul(node, weight)
            else:
                self._replace_gather(node, weight)
        for cast in self._casts.values():
            self.model.graph.node.insert(0, cast)
        self._keep_the_rest()
        declare_microsoft(self.model)
        return self._conversion()

    def _conversion(self) -> Conversion:
        # {bits of a weight: number of weights}
        counts = Counter(scheme.bits for scheme in self._schemes.values())
        mixed = len(counts) > 1
        what = [f"{bits} bits" for bits in counts]
        if mixed:
            what = [f"{counts[bits]} × {bits} bits" for bits in sorted(counts)]
        return Conversion(
            precision="mixed" if mixed else f"int{self.plan.by_graph[self.name].bits}",
            what=" and ".join(what),
            schemes=sorted(map(str, set(self._schemes.values()))),
            replaced=len(self._errors),
            kept=self._kept,
            shared=self._shared,
            weights=self._values,
            bytes_of_weights=self._bytes,
            weight_error=_relative(self._squares),
            errors=self._errors,
            layers=layer_errors(self._errors),
            bits={node: scheme.bits for node, scheme in self._schemes.items()},
        )

    def _is_replaceable(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in WEIGHT_INPUT:
            return False
        name = node.input[WEIGHT_INPUT[node.op_type]]
        weight = self._weights.get(name)
        if weight is None or not _is_float_matrix(weight):
            return False
        if len(weight.dims) != 2 or np.prod(weight.dims) < SMALL:
            return False
        return node.op_type == "MatMul" or _axis(node) == 0

    def _keep_the_rest(self) -> None:
        """Every matrix that is still in float must be a small one: a large one of another operator
        would stay as it is unnoticed.
        """
        graph = self.model.graph
        new: set[str] = set()
        for names in self._parts.values():
            new.update(names)
        used: set[str] = set()
        for node in graph.node:
            used.update(node.input)
        tensors = [tensor for tensor in graph.initializer if tensor.name in used]
        rest = [tensor for tensor in tensors if tensor.name not in new]
        for tensor in rest:
            if _is_float_matrix(tensor):
                self._keep(tensor)
        stored = []
        for tensor in tensors:
            if tensor.name not in new:
                tensor = self.data.add(tensor.name, self.read(tensor))
            stored.append(tensor)
        del graph.initializer[:]
        graph.initializer.extend(stored)

    def _keep(self, tensor: onnx.TensorProto) -> None:
        size = int(np.prod(tensor.dims))
        readers = {n.op_type for n in self.model.graph.node if tensor.name in n.input}
        if readers == {"Add"}:
            # The learned positions of a tile: no product reads them, and no integer kernel adds.
            self._kept[tensor.name] = f"{size} values, added and not multiplied"
            return
        if size >= SMALL:
            raise BundleError(
                f"weight {tensor.name} {list(tensor.dims)} of {', '.join(sorted(readers))} "
                "cannot be quantized; nothing written"
            )
        self._kept[tensor.name] = f"{size} values, fewer than {SMALL}"

    def _replace_matmul(self, node: onnx.NodeProto, weight: onnx.TensorProto) -> None:
        """x @ weight (K, N): blocks along K, so the matrix that is cut is the transpose."""
        inputs, scheme = self._integers(node, weight, transpose=True)
        attributes = {
            "K": weight.dims[0],
            "N": weight.dims[1],
            "bits": scheme.bits,
            "block_size": scheme.block,
            # 8-bit activations: without them the CPU kernel is twenty times slower.
            "accuracy_level": 4,
        }
        change_operator(
            node=node,
            operator="MatMulNBits",
            inputs=[node.input[0], *inputs],
            attributes=attributes,
        )

    def _replace_gather(self, node: onnx.NodeProto, weight: onnx.TensorProto) -> None:
        (table, *scales), scheme = self._integers(node, weight, transpose=False)
        attributes = {
            "gather_axis": 0,
            "quantize_axis": 1,
            "block_size": scheme.block,
            "bits": scheme.bits,
        }
        change_operator(
            node=node,
            operator="GatherBlockQuantized",
            inputs=[table, node.input[1], *scales],
            attributes=attributes,
        )

    def _integers(
        self, node: onnx.NodeProto, weight: onnx.TensorProto, transpose: bool
    ) -> tuple[list[str], Scheme]:
        """Names of what replaces `weight` (integers, scales and, where asymmetric, zero points),
        and how it was rounded.
        """
        columns = weight.dims[0 if transpose else 1]
        scheme = self.plan.scheme(self.name, weight.name, columns)
        if weight.name not in self._parts:
            matrix = self._matrix(weight, transpose)
            self._values += matrix.size
            self._schemes[node.name] = scheme
            if transpose and self.table is not None and self.table.is_tied_to(matrix, scheme):
                self._parts[weight.name] = self._share(self.table)
            else:
                blocks = self._round(f"{self.name}/{weight.name}", matrix, scheme)
                tensors = self._add(weight.name, blocks, flat=not transpose)
                self._parts[weight.name] = [tensor.name for tensor in tensors]
                self._errors[node.name] = self._error(blocks, matrix)
                if not transpose and self.name == "embed_tokens":
                    self.table = EmbeddingTable(matrix, scheme, tensors)
        names = self._widened(self._parts[weight.name])
        return names, scheme

    def _matrix(self, weight: onnx.TensorProto, transpose: bool) -> np.ndarray:
        matrix = self.read(weight)
        onnxfile.check_finite(weight.name, matrix)
        if float(np.abs(matrix).max()) > LARGEST:
            raise BundleError(
                f"weight {weight.name} has values beyond {LARGEST:g}, too large for integers "
                "whose scales are float16"
            )
        if transpose:
            return np.ascontiguousarray(matrix.T)
        return matrix

    def _round(self, key: str, matrix: np.ndarray, scheme: Scheme) -> Blocks:
        if scheme.bits == 8 or key not in self.plan.products:
            return quantize(matrix, scheme)
        if self.plan.cache is None:
            return gptq(matrix, self.plan.products[key], scheme)
        digest = hashlib.sha256(f"{key} {scheme}".encode())
        file = self.plan.cache / f"{digest.hexdigest()}.npz"
        if not file.is_file():
            _save(file, gptq(matrix, self.plan.products[key], scheme))
        return _load(file, scheme, matrix.shape[1])

    def _error(self, blocks: Blocks, matrix: np.ndarray) -> float:
        """The relative error of one matrix, which is added to that of the graph."""
        step = max(1, MEASURED // matrix.shape[1])
        squares = np.zeros(2)
        for first in range(0, len(matrix), step):
            rows = slice(first, first + step)
            wanted = matrix[rows]
            error = blocks.rows(rows).dense() - wanted
            squares[0] += np.square(error).sum()
            squares[1] += np.square(wanted).sum()
        self._squares += squares
        return _relative(squares)

    def _share(self, table: EmbeddingTable) -> list[str]:
        """The embedding's bytes, which stay in its file, as MatMulNBits wants them declared."""
        self._shared = True
        self._errors["shared with embed_tokens"] = 0.0
        rows, columns = table.matrix.shape
        block = table.scheme.block
        tensors = []
        for tensor in table.tensors:
            mine = onnx.TensorProto()
            mine.CopyFrom(tensor)
            tensors.append(mine)
        integers = tensors[0]
        block_bytes = block * table.scheme.bits // 8
        del integers.dims[:]
        integers.dims.extend([rows, columns // block, block_bytes])
        self.model.graph.initializer.extend(tensors)
        return [tensor.name for tensor in tensors]

    def _add(self, name: str, blocks: Blocks, flat: bool) -> list[onnx.TensorProto]:
        """flat: rows without padding, which a Gather reads; MatMulNBits reads blocks."""
        values = blocks.values
        if flat:
            values = values.reshape(len(values), -1)[:, : blocks.columns]
        arrays = {
            f"{name}_q{blocks.bits}": pack(values, blocks.bits),
            f"{name}_scales": blocks.scales.astype(np.float16),
        }
        if blocks.zeros is not None:
            arrays[f"{name}_zeros"] = pack(blocks.zeros, blocks.bits)
        self._bytes += sum(array.nbytes for array in arrays.values())
        tensors = [self.data.add(key, array) for key, array in arrays.items()]
        self.model.graph.initializer.extend(tensors)
        return tensors

    def _widened(self, names: list[str]) -> list[str]:
        """The same names with scales in float32, as the operators want them.

        They are stored in half the bytes, and widened once, when ONNX Runtime folds constants as it
        loads the graph.
        """
        integers, scales, *zeros = names
        wide = f"{scales}_fp32"
        self._casts[wide] = onnx.helper.make_node(
            "Cast", [scales], [wide], wide, to=onnx.TensorProto.FLOAT
        )
        return [integers, wide, *zeros]


def _save(file: Path, blocks: Blocks) -> None:
    arrays = {"values": blocks.values, "scales": blocks.scales}
    if blocks.zeros is not None:
        arrays["zeros"] = blocks.zeros
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _load(file: Path, scheme: Scheme, columns: int) -> Blocks:
    with np.load(file) as arrays:
        return Blocks(
            values=arrays["values"],
            scales=arrays["scales"],
            zeros=arrays.get("zeros"),
            bits=scheme.bits,
            columns=columns,
        )


def _relative(squares: np.ndarray) -> float:
    error, norm = squares
    return float(np.sqrt(error / max(norm, 1e-30)))


def change_operator(
    node: onnx.NodeProto,
    operator: str,
    inputs: list[str],
    attributes: dict[str, int],
) -> None:
    """Turn a node into another operator of ONNX Runtime's own, in place: its name, outputs and
    position in the graph stay.
    """
    node.op_type = operator
    node.domain = MICROSOFT
    del node.input[:]
    node.input.extend(inputs)
    del node.attribute[:]
    for name, value in attributes.items():
        attribute = onnx.helper.make_attribute(name, value)
        node.attribute.append(attribute)


def declare_microsoft(model: onnx.ModelProto) -> None:
    """Declare the operators of ONNX Runtime's own in a graph that has some."""
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))


def _is_float_matrix(tensor: onnx.TensorProto) -> bool:
    return len(tensor.dims) >= 2 and tensor.data_type == onnx.TensorProto.FLOAT


def _axis(node: onnx.NodeProto) -> int:
    for attribute in node.attribute:
        if attribute.name == "axis":
            return int(attribute.i)
    return 0


def layer_errors(errors: dict[str, float]) -> dict[str, float]:
    """The root mean square of weight errors by layer, {"layers.3": 0.08}; what belongs to none by
    its own name.
    """
    by_layer: dict[str, list[float]] = {}
    for node, error in errors.items():
        layer = node
        match = re.search(r"(layers|blocks)\.\d+", node)
        if match:
            layer = match.group()
        by_layer.setdefault(layer, []).append(error)
    means = {}
    for layer, each in by_layer.items():
        mean_square = np.mean(np.square(each))
        means[layer] = float(np.sqrt(mean_square))
    return means
