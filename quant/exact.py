"""Bundles that run what was trained: the 4-bit base as bitsandbytes packed it, its adapters beside
it. May import: onnx, the core.

MatMulBnb4 reads bitsandbytes' NF4 bytes as they are. It is slow (21 times int4's kernel, FACTS):
the oracle that other precisions are measured against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from lvr_lite import terminal
from lvr_lite.export.onnxfile import DataFile
from lvr_lite.quant.quantize import MICROSOFT, become
from lvr_lite.train.trained_weights import TrainedWeights

NF4 = 1  # MatMulBnb4's quant_type


class ExactConvert:
    """What `lvr_lite.export.write.write_bundle` calls for each graph. weights: unmerged."""

    def __init__(self, weights: TrainedWeights) -> None:
        self._weights = weights

    def __call__(
        self,
        graph: str,
        model: onnx.ModelProto,
        read: Callable[[onnx.TensorProto], np.ndarray],
        data: DataFile,
        origins: dict[str, Any],
    ) -> dict[str, Any]:
        """Linears of the 4-bit base become MatMulBnb4; everything else stays in float32. `model` is
        changed in place.
        """
        initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        made: list[onnx.TensorProto] = []
        for node in terminal.bar(list(model.graph.node), graph):
            origin = origins.get(node.input[1]) if node.op_type == "MatMul" else None
            if origin is None or origin.parameter not in self._weights.in_nf4:
                continue
            weight = initializers.pop(node.input[1])
            packed, scales = self._weights.nf4(origin.parameter)
            parts = [
                data.add(f"{weight.name}_nf4", packed),
                data.add(f"{weight.name}_scales", scales),
            ]
            made += parts
            attributes = {
                "K": weight.dims[0],
                "N": weight.dims[1],
                "block_size": 64,
                "quant_type": NF4,
            }
            become(node, "MatMulBnb4", [node.input[0], *(part.name for part in parts)], attributes)
        kept = [data.add(tensor.name, read(tensor)) for tensor in initializers.values()]
        del model.graph.initializer[:]
        model.graph.initializer.extend([*made, *kept])
        if made and not any(opset.domain == MICROSOFT for opset in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        adapters = sum(name.endswith((".lora_A", ".lora_B")) for name in initializers) // 2
        return {
            "precision": "nf4" if made else "fp32",
            "replaced": len(made) // 2,
            "adapters": adapters,
        }
