"""Integer weights for a bundle, one weight at a time. May import: onnx, onnxruntime, numpy, Pillow
and the core.

    quantize_bundle(Path("bundles/first-fp32"), Path("bundles/first-int4"), "int4", print)

Every matrix product with a constant weight becomes MatMulNBits and every embedding
GatherBlockQuantized; a large weight that neither rule takes is an error, never a silent exception.
Rounding is this package's own (`blocks`), since at 4 bits it leaves about a tenth less error than
the quantizer that ships with ONNX Runtime, and since that one skips 8-bit embeddings.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lvr_lite import files, terminal
from lvr_lite.errors import BundleError, UsageError
from lvr_lite.export import onnxfile
from lvr_lite.export.onnxfile import DataFile
from lvr_lite.model import bundle
from lvr_lite.model.bundle import Bundle, Graph, Manifest, write_manifest
from lvr_lite.quant import drift, half
from lvr_lite.quant.blocks import LARGEST, Blocks, gptq, pack, quantize
from lvr_lite.system import peak_rss_mb

SMALL = 4096  # a weight with fewer values may stay as it is
MICROSOFT = "com.microsoft"
WEIGHTED = {
    "MatMul": 1,
    "Gather": 0,
}  # operators whose weight can be replaced, and which input it is
Read = Callable[[onnx.TensorProto], np.ndarray]


@dataclass(frozen=True)
class Scheme:
    """bits: 4 or 8 a weight. block: values that share a scale, or the largest half of it, or
    quarter, that divides the columns. symmetric: without zero points.
    """

    bits: int
    block: int
    symmetric: bool

    def of(self, columns: int) -> Scheme:
        """This scheme for a matrix of so many columns: a block that is padded would waste bytes,
        and could not be shared with a Gather.
        """
        fitting = [
            b
            for b in (self.block, self.block // 2, self.block // 4)
            if columns % b == 0 and b >= 16
        ]
        return replace(self, block=fitting[0] if fitting else self.block)


# Measured on real weights (docs/results/quant.md): small blocks with zero points keep a perplexity
# within 0.3 %, large ones within 1.1 %.
INT8 = Scheme(bits=8, block=32, symmetric=False)
COMPACT = Scheme(bits=8, block=128, symmetric=True)  # what stays in 8 bits beside 4
# Rounded with GPTQ, zero points and blocks of 64 are no better; without them a product takes 12 %
# less (docs/results/runtime.md).
INT4 = Scheme(bits=4, block=128, symmetric=True)
WHOLE = {  # precision -> scheme of each graph
    "int8": dict.fromkeys(bundle.GRAPHS, INT8),
    # The decoder's weights are read at every step, so they are worth 4 bits; vision runs once and
    # the head decides near ties.
    "int4": {**dict.fromkeys(bundle.GRAPHS, COMPACT), "decoder": INT4},
}
ORDER = (
    "vision_encoder",
    "decoder",
    "embed_tokens",
    "lm_head",
)  # GPTQ's products come layer by layer, the head's last
PRECISIONS = ("int8", "int4", "mixed", "fp16")


@dataclass(frozen=True)
class Plan:
    """How each weight of a bundle is rounded. by_graph: the scheme of a graph; by_weight:
    {graph/weight: scheme} where it is another; products: {graph/weight: sum of x xᵀ over its
    inputs}, for GPTQ. kept: a folder where what GPTQ makes of these products stays, so that a
    second bundle takes it from there.
    """

    by_graph: dict[str, Scheme]
    by_weight: dict[str, Scheme] = field(default_factory=dict)
    products: Mapping[str, np.ndarray] = field(default_factory=dict)
    kept: Path | None = None

    def scheme(self, graph: str, weight: str, columns: int) -> Scheme:
        return self.by_weight.get(f"{graph}/{weight}", self.by_graph[graph]).of(columns)


def quantize_bundle(
    source: Path,
    target: Path,
    precision: str,
    progress: Callable[[str], None],
    block: int | None = None,
    plan: Plan | None = None,
    tune: Callable[[Path, Manifest], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write the fp32 bundle `source` with other weights to `target`; returns what report.json then
    says.

    precision: "int8" (all weights in 8 bits), "int4" (the decoder in 4 bits, vision, embedding and
    head in 8), "fp16", or, with a `plan`, "mixed" (see `lvr_lite.quant.search`). block: values that
    share a scale where weights have 4 bits. tune: changes values of the decoder of the new bundle
    in that folder, and says what came of it (report.json, "tuning"). Raises UsageError for another
    precision, BundleError where `source` is not an fp32 bundle or `target` cannot be written;
    either way nothing is left and an earlier bundle at `target` stays as it was.
    """
    began = time.perf_counter()
    manifest = check_source(source, target, precision)
    plan = plan or (None if precision == "fp16" else whole(precision, block))
    files.check_free_space(
        target, sum(g.bytes for g in manifest.graphs.values()) // (2 if precision == "fp16" else 3)
    )
    with files.fresh_folder(target, bundle.MANIFEST) as folder:
        (folder / "onnx").mkdir()
        graphs, by_graph = {}, {}
        shared = Shared()
        for name in ORDER:
            graph = manifest.graphs[name]
            graphs[name], by_graph[name] = _write_graph(source, folder, name, graph, plan, shared)
            progress(_line(name, by_graph[name]))
        (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        tuning = tune(folder, manifest) if tune else None
        if tuning:
            digests, size = onnxfile.graph_files(folder, graphs["decoder"].path)
            graphs["decoder"] = replace(graphs["decoder"], files=digests, bytes=size)
        write_manifest(folder, _manifest(manifest, graphs, precision))
        check_form(folder, graphs)
        measured = drift.measure(source, folder)
        report = _report(manifest, precision, by_graph, measured) | (
            {"tuning": tuning} if tuning else {}
        )
        (folder / "report.json").write_text(json.dumps(report, indent=1))
        drift.draw(measured, folder / "drift.png", precision)
    report["seconds"], report["peak_rss_mb"] = round(time.perf_counter() - began, 1), peak_rss_mb()
    bits = report["bits_per_weight"]
    progress(
        f"{precision}: {report['bytes_before'] / 1e6:.1f} MB -> {report['bytes'] / 1e6:.1f} MB, {bits:.2f} bits a weight"
    )
    return report


def whole(precision: str, block: int | None = None) -> Plan:
    """The plan of "int8" or "int4"."""
    if block is not None and (block < 16 or block & (block - 1)):
        raise UsageError(f"block {block}: must be a power of two, 16 or more")
    schemes = WHOLE[precision]
    return Plan(
        {
            name: replace(s, block=block) if block and s.bits == 4 else s
            for name, s in schemes.items()
        }
    )


def check_source(source: Path, target: Path, precision: str) -> Manifest:
    """The manifest of an fp32 bundle that may be quantized to `target`. Raises UsageError and
    BundleError as `quantize_bundle`.
    """
    if precision == "exact":
        raise UsageError(
            "precision exact: is written from the checkpoint, whose 4-bit base an fp32 bundle no longer has (`lvr-lite export`)"
        )
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision!r} is not known; quantize writes {', '.join(PRECISIONS)}"
        )
    manifest = Bundle.open(source).manifest
    if manifest.precision != "fp32":
        raise BundleError(
            f"{source}: its precision is {manifest.precision}; quantize starts from an fp32 bundle (`lvr-lite export`)"
        )
    if target.resolve() == source.resolve():
        raise BundleError(
            f"{target}: is the source itself; choose another folder for the quantized bundle"
        )
    return manifest


def _line(name: str, done: dict[str, Any]) -> str:
    kept = ", ".join(f"{weight} ({why})" for weight, why in done["kept"].items())
    left = f", kept: {kept}" if kept else ", none kept in float"
    return f"{name}: {done['replaced']} weights to {done['what']}{left}, error {done['weight_error']:.2%}, {done['bytes'] / 1e6:.2f} MB"


def _manifest(manifest: Manifest, graphs: dict[str, Graph], precision: str) -> Manifest:
    origin = {name: next(iter(graph.files.values())) for name, graph in manifest.graphs.items()}
    return replace(
        manifest,
        precision=precision,
        graphs=graphs,
        source={**manifest.source, "quantized_from": origin},
    )


def _report(
    manifest: Manifest, precision: str, by_graph: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    before = sum(graph.bytes for graph in manifest.graphs.values())
    after = sum(graph["bytes"] for graph in by_graph.values())
    parts = [graph for name, graph in by_graph.items() if name != "vision_encoder"]
    weights = sum(graph["weights"] for graph in parts) - (
        by_graph["lm_head"]["weights"] if by_graph["lm_head"]["shared"] else 0
    )
    bits = 8 * sum(graph["bytes_of_weights"] for graph in parts) / max(weights, 1)
    sizes = {"bytes_before": before, "bytes": after, "bits_per_weight": round(bits, 3)}
    return {
        "precision": precision,
        **sizes,
        "graphs": by_graph,
        "drift": measured,
        "parity": manifest.parity,
    }


def _write_graph(
    source: Path, folder: Path, name: str, graph: Graph, plan: Plan | None, shared: Shared
) -> tuple[Graph, dict[str, Any]]:
    """Write one graph; its manifest entry, and what was done to it."""
    model, at = onnxfile.load(source / graph.path), (source / graph.path).parent

    def read(tensor: onnx.TensorProto) -> np.ndarray:
        return onnxfile.read(tensor, at)

    with onnxfile.data_file(folder / graph.path) as data:
        described = (
            half.convert(model, read, data)
            if plan is None
            else convert(name, model, read, data, plan, shared)
        )
    (folder / graph.path).write_bytes(model.SerializeToString())
    digests, size = onnxfile.graph_files(folder, graph.path)
    entry = replace(graph, precision=described["precision"], files=digests, bytes=size)
    if plan is None:
        entry = replace(entry, **half.ports(model, graph))
    return entry, described | {"bytes_before": graph.bytes, "bytes": entry.bytes}


@dataclass
class Shared:
    """What graphs have in common: an embedding whose bytes the head reads too, where the two are
    tied.
    """

    table: np.ndarray | None = None
    parts: list[onnx.TensorProto] = field(default_factory=list)
    scheme: Scheme | None = None


class Converter:
    """What `lvr_lite.export.write.write_bundle` calls for each graph: weights go straight to
    integers, or to fp16.
    """

    def __init__(self, plan: Plan | None) -> None:
        """plan: None for fp16."""
        self._plan, self._shared = plan, Shared()

    def __call__(
        self,
        graph: str,
        model: onnx.ModelProto,
        read: Read,
        data: DataFile,
        origins: dict[str, Any],
    ) -> dict[str, Any]:
        if self._plan is None:
            return half.convert(model, read, data)
        return convert(graph, model, read, data, self._plan, self._shared)


def convert(
    name: str, model: onnx.ModelProto, read: Read, data: DataFile, plan: Plan, shared: Shared
) -> dict[str, Any]:
    """Turn a float graph into one of integer weights, in place; returns what was done."""
    rewriting = _Rewriting(name, model, read, data, plan, shared)
    rewriting.run()
    by_bits = {bits: [w for w, s in rewriting.schemes.items() if s.bits == bits] for bits in (4, 8)}
    what = " and ".join(
        f"{len(names)} × {bits} bits" if len(by_bits[4]) * len(by_bits[8]) else f"{bits} bits"
        for bits, names in by_bits.items()
        if names
    )
    schemes = {
        f"{s.bits} bits, block {s.block}{'' if s.symmetric else ', zero points'}"
        for s in rewriting.schemes.values()
    }
    return {
        "precision": f"int{plan.by_graph[name].bits}"
        if not (by_bits[4] and by_bits[8])
        else "mixed",
        "what": what,
        "schemes": sorted(schemes),
        "replaced": len(rewriting.errors),
        "kept": rewriting.kept,
        "shared": rewriting.sharing,
        "weights": rewriting.weights,
        "bytes_of_weights": rewriting.bytes,
        "weight_error": rewriting.weight_error,
        "errors": rewriting.errors,
        "layers": layer_errors(rewriting.errors),
        "bits": {node: scheme.bits for node, scheme in rewriting.schemes.items()},
    }


class _Rewriting:
    """One graph on its way from float to integer weights; weights are read one by one.

    errors: {node: relative error of its weight}; schemes: {node: how it was rounded}; kept:
    {weight: why it stayed in float}.
    """

    def __init__(
        self,
        name: str,
        model: onnx.ModelProto,
        read: Read,
        data: DataFile,
        plan: Plan,
        shared: Shared,
    ) -> None:
        self.name, self.model, self.read, self.data, self.plan, self.shared = (
            name,
            model,
            read,
            data,
            plan,
            shared,
        )
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.errors: dict[str, float] = {}
        self.schemes: dict[str, Scheme] = {}
        self.kept: dict[str, str] = {}
        self.weights = self.bytes = 0
        self.sharing = False
        self._gap = self._norm = 0.0
        self._made: dict[str, list[str]] = {}  # weights that several nodes share are rounded once
        self._casts: dict[str, onnx.NodeProto] = {}

    @property
    def weight_error(self) -> float:
        """norm of all rounding errors / norm of all weights replaced."""
        return float(np.sqrt(self._gap / max(self._norm, 1e-30)))

    def run(self) -> None:
        nodes = [node for node in self.model.graph.node if self._replaceable(node)]
        for node in terminal.bar(nodes, f"{self.name}: weights"):
            weight = self.initializers[node.input[WEIGHTED[node.op_type]]]
            (self._matmul if node.op_type == "MatMul" else self._gather)(node, weight)
        for cast in self._casts.values():
            self.model.graph.node.insert(0, cast)
        self._keep_the_rest()
        if not any(opset.domain == MICROSOFT for opset in self.model.opset_import):
            self.model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))

    def _replaceable(self, node: onnx.NodeProto) -> bool:
        weight = (
            self.initializers.get(node.input[WEIGHTED[node.op_type]])
            if node.op_type in WEIGHTED
            else None
        )
        if (
            weight is None
            or not _is_matrix(weight)
            or len(weight.dims) != 2
            or np.prod(weight.dims) < SMALL
        ):
            return False
        return node.op_type == "MatMul" or _axis(node) == 0

    def _keep_the_rest(self) -> None:
        """Every matrix that is still in float must be a small one: a layer that another operator
        holds would stay large unnoticed.
        """
        made = {name for names in self._made.values() for name in names}
        used = {name for node in self.model.graph.node for name in node.input}
        left = [tensor for tensor in self.model.graph.initializer if tensor.name in used]
        for tensor in left:
            if tensor.name in made or not _is_matrix(tensor):
                continue
            size = int(np.prod(tensor.dims))
            users = sorted(
                {node.op_type for node in self.model.graph.node if tensor.name in node.input}
            )
            if size >= SMALL:
                raise BundleError(
                    f"weight {tensor.name} {list(tensor.dims)} of {', '.join(users)} cannot be quantized; nothing written"
                )
            self.kept[tensor.name] = f"{size} values, fewer than {SMALL}"
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(
            t if t.name in made else self.data.add(t.name, self.read(t)) for t in left
        )

    def _matmul(self, node: onnx.NodeProto, weight: onnx.TensorProto) -> None:
        """x @ weight (K, N): blocks along K, so the matrix that is cut is the transpose."""
        inputs, scheme = self._rounded(node, weight, transpose=True)
        attributes = {
            "K": weight.dims[0],
            "N": weight.dims[1],
            "bits": scheme.bits,
            "block_size": scheme.block,
        }
        # accuracy_level 4 (8-bit activations): without it the CPU kernel is twenty times slower
        become(node, "MatMulNBits", [node.input[0], *inputs], {**attributes, "accuracy_level": 4})

    def _gather(self, node: onnx.NodeProto, weight: onnx.TensorProto) -> None:
        inputs, scheme = self._rounded(node, weight, transpose=False)
        attributes = {
            "gather_axis": 0,
            "quantize_axis": 1,
            "block_size": scheme.block,
            "bits": scheme.bits,
        }
        become(node, "GatherBlockQuantized", [inputs[0], node.input[1], *inputs[1:]], attributes)

    def _rounded(
        self, node: onnx.NodeProto, weight: onnx.TensorProto, transpose: bool
    ) -> tuple[list[str], Scheme]:
        """Names of what replaces `weight`: integers, scales and, where asymmetric, zero points; and
        the scheme.
        """
        columns = weight.dims[0] if transpose else weight.dims[1]
        scheme = self.plan.scheme(self.name, weight.name, columns)
        if self._made.get(weight.name) is None:
            matrix = self.read(weight)
            onnxfile.check_finite(weight.name, matrix)
            if float(np.abs(matrix).max()) > LARGEST:
                raise BundleError(
                    f"weight {weight.name} has values beyond {LARGEST:g}, too large for integers whose scales are float16"
                )
            matrix = np.ascontiguousarray(matrix.T) if transpose else matrix
            self.weights += matrix.size
            if transpose and self._is_tied(matrix, scheme):
                self._made[weight.name] = self._share(matrix, scheme)
            else:
                made = self._round(f"{self.name}/{weight.name}", matrix, scheme)
                self._made[weight.name] = self._add(weight.name, made, flat=not transpose)
                self.errors[node.name] = self._count(made, matrix)
                if not transpose and self.name == "embed_tokens":
                    added = [
                        t for t in self.model.graph.initializer if t.name in self._made[weight.name]
                    ]
                    self.shared.table, self.shared.parts, self.shared.scheme = matrix, added, scheme
            self.schemes[node.name] = scheme
        return self._widened(self._made[weight.name]), scheme

    def _round(self, key: str, matrix: np.ndarray, scheme: Scheme) -> Blocks:
        if scheme.bits == 8 or key not in self.plan.products:
            return quantize(matrix, scheme.bits, scheme.block, scheme.symmetric)
        name = hashlib.sha256(f"{key} {scheme}".encode()).hexdigest()
        file = self.plan.kept / f"{name}.npz" if self.plan.kept else None
        if file and file.is_file():
            with np.load(file) as parts:
                return Blocks(
                    parts["values"],
                    parts["scales"],
                    parts.get("zeros"),
                    scheme.bits,
                    matrix.shape[1],
                )
        made = gptq(matrix, self.plan.products[key], scheme.bits, scheme.block, scheme.symmetric)
        if file:
            arrays: dict[str, Any] = {} if made.zeros is None else {"zeros": made.zeros}
            np.savez(file, values=made.values, scales=made.scales, **arrays)
        return made

    def _count(self, made: Blocks, matrix: np.ndarray) -> float:
        step, gap, norm = max(1, (1 << 22) // matrix.shape[1]), 0.0, 0.0
        for first in range(
            0, len(matrix), step
        ):  # part by part: the largest matrix of a model is a gigabyte
            rows = slice(first, first + step)
            gap += float(np.square(made.rows(rows).dense() - matrix[rows]).sum())
            norm += float(np.square(matrix[rows]).sum())
        self._gap, self._norm = self._gap + gap, self._norm + norm
        return float(np.sqrt(gap / max(norm, 1e-30)))

    def _is_tied(self, matrix: np.ndarray, scheme: Scheme) -> bool:
        table = self.shared.table
        if matrix.shape[1] % scheme.block:
            return False  # the head's last block is padded, the embedding's rows are not
        return (
            table is not None
            and self.shared.scheme == scheme
            and table.shape == matrix.shape
            and np.array_equal(table, matrix)
        )

    def _share(self, matrix: np.ndarray, scheme: Scheme) -> list[str]:
        """The embedding's bytes, as MatMulNBits wants them declared; they lie in the embedding's
        file.
        """
        self.sharing = True
        blocks = matrix.shape[1] // scheme.block
        names = []
        for tensor in self.shared.parts:
            mine = onnx.TensorProto()
            mine.CopyFrom(tensor)
            if tensor is self.shared.parts[0]:
                del mine.dims[:]
                mine.dims.extend([len(matrix), blocks, scheme.block * scheme.bits // 8])
            self.model.graph.initializer.append(mine)
            names.append(mine.name)
        self.errors["shared with embed_tokens"] = 0.0
        return names

    def _add(self, name: str, made: Blocks, flat: bool) -> list[str]:
        rows = len(made.values)
        values = (
            made.values.reshape(rows, -1)[:, : made.columns] if flat else made.values
        )  # Gather takes rows, MatMulNBits blocks
        arrays = {
            f"{name}_q{made.bits}": pack(values, made.bits),
            f"{name}_scales": made.scales.astype(np.float16),
        }
        if made.zeros is not None:
            arrays[f"{name}_zeros"] = pack(made.zeros, made.bits)
        self.bytes += sum(array.nbytes for array in arrays.values())
        self.model.graph.initializer.extend(
            self.data.add(key, array) for key, array in arrays.items()
        )
        return list(arrays)

    def _widened(self, names: list[str]) -> list[str]:
        """The same, with the scales as the operators want them: they are stored in half the bytes,
        and widened once, when ONNX Runtime folds constants as it loads the graph.
        """
        wide = f"{names[1]}_fp32"
        self._casts[wide] = onnx.helper.make_node(
            "Cast", [names[1]], [wide], wide, to=onnx.TensorProto.FLOAT
        )
        return [names[0], wide, *names[2:]]


def become(
    node: onnx.NodeProto, operator: str, inputs: list[str], attributes: dict[str, int]
) -> None:
    """Turn a node into another operator in place: its name, outputs and position in the graph
    stay.
    """
    node.op_type, node.domain = operator, MICROSOFT
    del node.input[:], node.attribute[:]
    node.input.extend(inputs)
    node.attribute.extend(
        onnx.helper.make_attribute(name, value) for name, value in attributes.items()
    )


def _is_matrix(tensor: onnx.TensorProto) -> bool:
    return len(tensor.dims) >= 2 and tensor.data_type == onnx.TensorProto.FLOAT


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def check_form(folder: Path, graphs: dict[str, Graph]) -> None:
    """A bundle's last check: raises BundleError, naming the node, for a form that runs slowly or
    holds weights twice.

    MatMulNBits without accuracy_level 4 (23 times slower on CPUs), Gemm and large float MatMul left
    over, the same bytes written twice.
    """
    seen: dict[tuple[int, bytes], str] = {}
    for name, graph in graphs.items():
        model = onnxfile.load(folder / graph.path)
        initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            level = next((a.i for a in node.attribute if a.name == "accuracy_level"), 0)
            if node.op_type == "MatMulNBits" and level != 4:
                raise BundleError(
                    f"{name}: {node.name} has no accuracy_level 4, so it would run 23 times slower; nothing written"
                )
            weight = (
                initializers.get(node.input[1])
                if node.op_type in ("Gemm", "MatMul") and len(node.input) > 1
                else None
            )
            large = (
                weight is not None
                and int(np.prod(weight.dims)) >= SMALL
                and weight.data_type == onnx.TensorProto.FLOAT
            )
            if node.op_type == "Gemm" or (node.op_type == "MatMul" and large):
                raise BundleError(
                    f"{name}: {node.name} is a {node.op_type} with its weight in float; nothing written"
                )
        for tensor in initializers.values():
            if onnxfile.size(tensor) <= 1 << 16:
                continue
            where = {entry.key: entry.value for entry in tensor.external_data}
            key = onnxfile.fingerprint(tensor, (folder / graph.path).parent)
            place = f"{where['location']} at {where['offset']}"
            if seen.setdefault(key, place) != place and np.any(
                onnxfile.read(tensor, (folder / graph.path).parent)
            ):
                raise BundleError(
                    f"{name}: {tensor.name} holds the same bytes as {seen[key]}; nothing written"
                )


def layer_errors(errors: dict[str, float]) -> dict[str, float]:
    """The root mean square of weight errors by layer, {"layers.3": 0.08}; what belongs to none by
    its own name.
    """
    found: dict[str, list[float]] = {}
    for node, error in errors.items():
        match = re.search(r"(layers|blocks)\.\d+", node)
        found.setdefault(match.group() if match else node, []).append(error)
    return {name: float(np.sqrt(np.mean(np.square(values)))) for name, values in found.items()}
