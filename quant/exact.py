"""Bundles that run what was trained: the 4-bit base as bitsandbytes packed it, its adapters beside
it. May import: onnx and what stands above `quant`.

MatMulBnb4 reads bitsandbytes' NF4 bytes as they are. It is 21 times slower than the kernel of int4:
a reference that the other precisions are measured against.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from lvr_lite import terminal
from lvr_lite.export.graphs.structure import Origin
from lvr_lite.export.onnxfile import DataFile
from lvr_lite.files import JsonObject
from lvr_lite.quant.integers import Read, change_operator, declare_microsoft
from lvr_lite.train.trained_weights import TrainedWeights

# MatMulBnb4's quant_type.
NF4 = 1
# Values that share a scale, as bitsandbytes packs them.
BLOCK = 64


class ExactConvert:
    """What `lvr_lite.export.write.write_bundle` calls for each graph. weights: unmerged."""

    def __init__(self, weights: TrainedWeights) -> None:
        self._weights = weights

    def __call__(
        self,
        graph: str,
        model: onnx.ModelProto,
        read: Read,
        data: DataFile,
        origins: Mapping[str, Origin],
    ) -> JsonObject:
        """Linears of the 4-bit base become MatMulBnb4, in place; all else stays in float32."""
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        packed: list[onnx.TensorProto] = []
        replaced = 0
        for node in terminal.bar(list(model.graph.node), graph):
            origin = None
            if node.op_type == "MatMul":
                origin = origins.get(node.input[1])
            if origin is None or origin.parameter not in self._weights.in_nf4:
                continue
            weight = weights.pop(node.input[1])
            values, scales = self._weights.nf4(origin.parameter)
            packed += _replace(node, weight, values, scales, data)
            replaced += 1
        floats = [data.add(tensor.name, read(tensor)) for tensor in weights.values()]
        del model.graph.initializer[:]
        model.graph.initializer.extend([*packed, *floats])
        if packed:
            declare_microsoft(model)
        adapters = sum(name.endswith((".lora_A", ".lora_B")) for name in weights) // 2
        return {
            "precision": "nf4" if packed else "fp32",
            "replaced": replaced,
            "adapters": adapters,
        }


def _replace(
    node: onnx.NodeProto,
    weight: onnx.TensorProto,
    values: np.ndarray,
    scales: np.ndarray,
    data: DataFile,
) -> list[onnx.TensorProto]:
    """Turn a MatMul into MatMulBnb4; the tensors that took the place of its weight (K, N)."""
    tensors = [
        data.add(f"{weight.name}_nf4", values),
        data.add(f"{weight.name}_scales", scales),
    ]
    attributes = {
        "K": weight.dims[0],
        "N": weight.dims[1],
        "block_size": BLOCK,
        "quant_type": NF4,
    }
    inputs = [node.input[0], *(tensor.name for tensor in tensors)]
    change_operator(node, "MatMulBnb4", inputs, attributes)
    return tensors
