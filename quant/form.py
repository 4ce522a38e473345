"""A quantized bundle's last check: no form that runs slowly or holds weights twice. May import:
onnx, numpy and what stands above `quant`.
"""

from __future__ import annotations

import numpy as np
import onnx

from lvr_lite.errors import BundleError
from lvr_lite.export import onnxfile
from lvr_lite.model.bundle import Bundle
from lvr_lite.quant.integers import SMALL

# Bytes of a weight up to which it may be there twice.
COMPARED = 1 << 16


def check_form(bundle: Bundle) -> None:
    """Raises BundleError, naming the node or weight, for MatMulNBits without accuracy_level 4 (23
    times slower on CPUs), a Gemm or a large MatMul left in float, or the same bytes written twice.
    """
    # {fingerprint: where the bytes lie}
    places: dict[tuple[int, bytes], str] = {}
    for name in bundle.manifest.graphs:
        file = bundle.path(name)
        graph = onnxfile.load(file).graph
        weights = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            _check_node(name, node, weights)
        for tensor in weights.values():
            if onnxfile.size(tensor) <= COMPARED:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            place = f"{entries['location']} at {entries['offset']}"
            first = places.setdefault(onnxfile.fingerprint(tensor, file.parent), place)
            if first != place and np.any(onnxfile.read(tensor, file.parent)):
                raise BundleError(
                    f"{name}: {tensor.name} holds the same bytes as {first}; nothing written"
                )


def _check_node(graph: str, node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> None:
    level = next((a.i for a in node.attribute if a.name == "accuracy_level"), 0)
    if node.op_type == "MatMulNBits" and level != 4:
        raise BundleError(
            f"{graph}: {node.name} has no accuracy_level 4, so it would run 23 times slower; "
            "nothing written"
        )
    if node.op_type == "Gemm" or (
        node.op_type == "MatMul" and _is_large_float(weights.get(node.input[1]))
    ):
        raise BundleError(
            f"{graph}: {node.name} is a {node.op_type} with its weight in float; nothing written"
        )


def _is_large_float(weight: onnx.TensorProto | None) -> bool:
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
        return False
    return int(np.prod(weight.dims)) >= SMALL
