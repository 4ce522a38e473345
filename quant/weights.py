"""Integer weights for a bundle: from an fp32 bundle to an int8 or int4 one. May import: onnx, onnxruntime, numpy, Pillow and the core.

    quantize_bundle(Path("bundles/first-fp32"), Path("bundles/first-int4"), "int4", print)

Every matrix product with a constant weight becomes MatMulNBits and every embedding GatherBlockQuantized; a large weight that
neither rule takes is an error, never a silent exception. Rounding is this package's own (`blocks`), since at 4 bits it leaves
about a tenth less error than the quantizer that ships with ONNX Runtime, and since that one skips 8-bit embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import external_data_helper, numpy_helper
from PIL import Image

from lvr_lite import bundle
from lvr_lite.bundle import Graph, Manifest
from lvr_lite.errors import BundleError, UsageError
from lvr_lite.quant.blocks import Blocks, pack, quantize
from lvr_lite.runtime.onnx import OnnxRuntime
from lvr_lite.runtime.preprocess import prepare

SMALL = 4096  # a weight with fewer values may stay as it is
MICROSOFT = "com.microsoft"
WEIGHTED = {"MatMul": 1, "Gather": 0}  # operators whose weight can be replaced, and which input it is
LATENT_STEPS = 8  # over which drift is measured


@dataclass(frozen=True)
class Scheme:
    """bits: 4 or 8 a weight. block: values that share a scale. symmetric: without zero points."""

    bits: int
    block: int
    symmetric: bool


INT8 = Scheme(bits=8, block=64, symmetric=True)
INT4 = Scheme(bits=4, block=32, symmetric=False)  # zero points cost 1/64 byte a weight and no time that could be measured
SCHEMES: dict[str, dict[str, Scheme]] = {
    "int8": dict.fromkeys(bundle.GRAPHS, INT8),
    # The decoder's weights are read at every step, so they are worth 4 bits; vision runs once and the head decides near ties.
    "int4": {**dict.fromkeys(bundle.GRAPHS, INT8), "decoder": INT4},
}


def quantize_bundle(source: Path, target: Path, precision: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Write the fp32 bundle `source` with integer weights to `target`; returns what report.json then says.

    precision: "int8" (all weights in 8 bits) or "int4" (the decoder in 4 bits, vision, embedding and head in 8).
    Raises UsageError for another precision, BundleError where `source` is not an fp32 bundle or `target` cannot be written; either way
    nothing is left and an earlier bundle at `target` stays as it was.
    """
    if precision not in SCHEMES:
        raise UsageError(f"precision {precision!r} is not known; quantize writes {' or '.join(SCHEMES)}")
    manifest = bundle.read_manifest(source)
    if manifest.precision != "fp32":
        raise BundleError(f"{source}: its precision is {manifest.precision}; quantize starts from an fp32 bundle (`lvr-lite export`)")
    if target.resolve() == source.resolve():
        raise BundleError(f"{target}: is the source itself; choose another folder for the quantized bundle")
    with bundle.fresh_folder(target) as folder:
        (folder / "onnx").mkdir()
        graphs, by_graph = {}, {}
        for name, graph in manifest.graphs.items():
            graphs[name], by_graph[name] = _quantize_graph(source, folder, graph, SCHEMES[precision][name])
            done = by_graph[name]
            numbers = f"error {done['weight_error']:.2%}, {done['bytes'] / 1e6:.2f} MB"
            left = f", kept: {', '.join(f'{w} ({why})' for w, why in done['kept'].items())}" if done["kept"] else ", none kept in float"
            progress(f"{name}: {done['replaced']} weights to {done['bits']} bits{left}, {numbers}")
        (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        bundle.write_manifest(folder, _manifest(manifest, graphs, precision))
        drift = measure_drift(OnnxRuntime(source), OnnxRuntime(folder))
        report = _report(manifest, precision, by_graph, drift)
        (folder / "report.json").write_text(json.dumps(report, indent=1))
    progress(f"{precision}: {report['bytes_before'] / 1e6:.1f} MB -> {report['bytes'] / 1e6:.1f} MB")
    return report


def _manifest(manifest: Manifest, graphs: dict[str, Graph], precision: str) -> Manifest:
    origin = {name: next(iter(graph.files.values())) for name, graph in manifest.graphs.items()}
    return replace(manifest, precision=precision, graphs=graphs, source={**manifest.source, "quantized_from": origin})


def _report(manifest: Manifest, precision: str, by_graph: dict[str, Any], drift: dict[str, Any]) -> dict[str, Any]:
    before = sum(graph.bytes for graph in manifest.graphs.values())
    after = sum(graph["bytes"] for graph in by_graph.values())
    return {"precision": precision, "bytes_before": before, "bytes": after, "graphs": by_graph, "drift": drift, "parity": manifest.parity}


def _quantize_graph(source: Path, folder: Path, graph: Graph, scheme: Scheme) -> tuple[Graph, dict[str, Any]]:
    """Write one graph in `scheme`; its manifest entry, and what was done to it."""
    model = onnx.load(str(source / graph.path), load_external_data=False)
    rewriting = _Rewriting(model, (source / graph.path).parent, scheme)
    rewriting.run()
    weights = f"{graph.path}_data"
    onnx.save(model, str(folder / graph.path), save_as_external_data=True, location=Path(weights).name, size_threshold=1024)
    files = bundle.graph_files(folder, [graph.path, weights])
    described = {
        **asdict(scheme),
        "replaced": len(rewriting.errors),
        "kept": rewriting.kept,
        "weight_error": rewriting.weight_error,
        "worst": rewriting.worst,
        "bytes_before": graph.bytes,
        "bytes": files["bytes"],
    }
    return replace(graph, precision=f"int{scheme.bits}", **files), described


class _Rewriting:
    """One graph on its way from float to integer weights; weights are read from disk one by one.

    errors: {node: relative error of its weight}. kept: {weight: why it stayed in float}.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path, scheme: Scheme) -> None:
        self.model, self.folder, self.scheme = model, folder, scheme
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.errors: dict[str, float] = {}
        self.kept: dict[str, str] = {}
        self._gap = self._norm = 0.0
        self._made: dict[str, list[str]] = {}  # weights that several nodes share are rounded once

    @property
    def weight_error(self) -> float:
        """norm of all rounding errors / norm of all weights replaced."""
        return float(np.sqrt(self._gap / max(self._norm, 1e-30)))

    @property
    def worst(self) -> dict[str, float]:
        return dict(sorted(self.errors.items(), key=lambda item: -item[1])[:3])

    def run(self) -> None:
        for node in self.model.graph.node:
            weight = self.initializers.get(node.input[WEIGHTED[node.op_type]]) if node.op_type in WEIGHTED else None
            if weight is None or not _is_matrix(weight) or len(weight.dims) != 2 or np.prod(weight.dims) < SMALL:
                continue
            if node.op_type == "MatMul":
                self._matmul(node, weight)
            elif _axis(node) == 0:
                self._gather(node, weight)
        self._drop_unused()
        self._explain_what_is_left()
        if not any(opset.domain == MICROSOFT for opset in self.model.opset_import):
            self.model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))

    def _explain_what_is_left(self) -> None:
        """Every matrix that is still in float must be a small one: a layer that another operator holds would stay large unnoticed."""
        made = {name for names in self._made.values() for name in names}
        for tensor in self.model.graph.initializer:
            if tensor.name in made or not _is_matrix(tensor):
                continue
            size = int(np.prod(tensor.dims))
            users = sorted({node.op_type for node in self.model.graph.node if tensor.name in node.input})
            if size >= SMALL:
                raise BundleError(f"weight {tensor.name} {list(tensor.dims)} of {', '.join(users)} cannot be quantized; nothing written")
            self.kept[tensor.name] = f"{size} values, fewer than {SMALL}"

    def _matmul(self, node: onnx.NodeProto, weight: onnx.TensorProto) -> None:
        """x @ weight (K, N): blocks along K, so the matrix that is cut is the transpose."""
        inputs = self._rounded(node, weight, transpose=True)
        attributes = {"K": weight.dims[0], "N": weight.dims[1], "bits": self.scheme.bits, "block_size": self.scheme.block}
        # accuracy_level 4 (8-bit activations): without it the CPU kernel is twenty times slower
        self._become(node, "MatMulNBits", [node.input[0], *inputs], {**attributes, "accuracy_level": 4})

    def _gather(self, node: onnx.NodeProto, weight: onnx.TensorProto) -> None:
        inputs = self._rounded(node, weight, transpose=False)
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": self.scheme.block, "bits": self.scheme.bits}
        self._become(node, "GatherBlockQuantized", [inputs[0], node.input[1], *inputs[1:]], attributes)

    def _become(self, node: onnx.NodeProto, operator: str, inputs: list[str], attributes: dict[str, int]) -> None:
        """Turn a node into another operator in place: its name, outputs and position in the graph stay."""
        node.op_type, node.domain = operator, MICROSOFT
        del node.input[:], node.attribute[:]
        node.input.extend(inputs)
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())

    def _rounded(self, node: onnx.NodeProto, weight: onnx.TensorProto, transpose: bool) -> list[str]:
        """Names of the initializers that replace `weight`: integers, scales and, where asymmetric, zero points."""
        if self._made.get(weight.name) is None:
            matrix = numpy_helper.to_array(weight, base_dir=str(self.folder))
            if not np.isfinite(matrix).all():
                raise BundleError(f"weight {weight.name} holds values that are not finite; export a sound checkpoint again")
            matrix = np.ascontiguousarray(matrix.T) if transpose else matrix
            made = quantize(matrix, self.scheme.bits, self.scheme.block, self.scheme.symmetric)
            self._made[weight.name] = self._add(weight.name, made, flat=not transpose)
            gap, norm = float(np.square(made.dense() - matrix).sum()), float(np.square(matrix).sum())
            self._gap, self._norm = self._gap + gap, self._norm + norm
            self.errors[node.name] = float(np.sqrt(gap / max(norm, 1e-30)))
        return self._made[weight.name]

    def _add(self, name: str, made: Blocks, flat: bool) -> list[str]:
        rows = len(made.values)
        values = made.values.reshape(rows, -1)[:, : made.columns] if flat else made.values  # Gather takes rows, MatMulNBits blocks
        arrays = {f"{name}_q{made.bits}": pack(values, made.bits), f"{name}_scales": made.scales}
        if made.zeros is not None:
            arrays[f"{name}_zeros"] = pack(made.zeros, made.bits)
        self.model.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(array), key) for key, array in arrays.items())
        return list(arrays)

    def _drop_unused(self) -> None:
        used = {name for node in self.model.graph.node for name in node.input}
        keep = [tensor for tensor in self.model.graph.initializer if tensor.name in used]
        for tensor in keep:  # what stays as it is still lies in the source's file
            if external_data_helper.uses_external_data(tensor):
                external_data_helper.load_external_data_for_tensor(tensor, str(self.folder))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(keep)


def _is_matrix(tensor: onnx.TensorProto) -> bool:
    return len(tensor.dims) >= 2 and tensor.data_type == onnx.TensorProto.FLOAT


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def measure_drift(reference: OnnxRuntime, quantized: OnnxRuntime, seed: int = 0) -> dict[str, Any]:
    """How far the quantized graphs are from the reference, as norm of the difference / norm of the reference.

    Each graph on the same input, then `latent_steps`: both feed their own hidden states back, so that errors may add up; and
    `same_input_steps`, where both are fed the reference's.
    """
    rng = np.random.default_rng(seed)
    both = (reference, quantized)
    noise = Image.fromarray(rng.integers(0, 256, (168, 224, 3), dtype=np.uint8))
    pixels, grids = prepare([noise], reference.family, reference.image_spec)
    ids = rng.integers(0, reference.tokenizer.get_vocab_size(), (1, 24), np.int64)
    hidden = _run(both[0], ids)[1][None]
    return {
        "vision_encoder": _apart(*(runtime.encode(pixels, grids) for runtime in both)),
        "embed_tokens": _apart(*(runtime.embed(ids) for runtime in both)),
        "lm_head": _apart(*(runtime.head(hidden) for runtime in both)),
        "decoder": _latent_drift(both, ids),
    }


def _run(runtime: OnnxRuntime, ids: np.ndarray, embeds: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Starts a batch of one row; its embeddings, and the hidden state (H,) after it."""
    embeds = runtime.embed(ids) if embeds is None else embeds
    runtime.start(1, ids.shape[1] + 2 * LATENT_STEPS)
    positions = np.broadcast_to(np.arange(ids.shape[1]), (3, *ids.shape))
    return embeds, runtime.prefill(embeds, positions, np.array([ids.shape[1]]))[0]


def _latent_drift(both: tuple[OnnxRuntime, OnnxRuntime], ids: np.ndarray) -> dict[str, Any]:
    embeds, _ = _run(both[0], ids)
    own = [_feed_back(runtime, ids, embeds, None) for runtime in both]
    same = _feed_back(both[1], ids, embeds, own[0])
    return {
        "prefill": _apart(own[0][0], own[1][0]),
        "latent_steps": [_apart(a, b) for a, b in zip(own[0][1:], own[1][1:], strict=True)],
        "same_input_steps": [_apart(a, b) for a, b in zip(own[0][1:], same[1:], strict=True)],
    }


def _feed_back(runtime: OnnxRuntime, ids: np.ndarray, embeds: np.ndarray, fed: list[np.ndarray] | None) -> list[np.ndarray]:
    """Hidden states (H,) of the prompt and of each latent step, fed with its own states or with `fed`."""
    states = [_run(runtime, ids, embeds)[1].copy()]
    for step in range(LATENT_STEPS):
        given = states[-1] if fed is None else fed[step]
        states.append(runtime.step(given[None], np.array([ids.shape[1] + step]))[0].copy())
    return states


def _apart(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
