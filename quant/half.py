"""fp16 bundles, for GPU providers: graphs that compute in 16-bit floats. May import: onnx,
onnxruntime, numpy and the core.

ONNX Runtime's own converter turns the graph; weights pass one at a time. Positions become angles in
float32, since 16 bits do not hold them beyond 2,048. Keys and values are in fp16 too; embeddings,
hidden states and logits keep float32 at the graphs' borders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from lvr_lite.errors import BundleError
from lvr_lite.export.onnxfile import DataFile, check_finite, size
from lvr_lite.model.bundle import Graph, TensorInfo

LARGEST = float(np.finfo(np.float16).max)
IN_FLOAT32 = ("Cos", "Sin")


def convert(
    model: onnx.ModelProto, read: Callable[[onnx.TensorProto], np.ndarray], data: DataFile
) -> dict[str, Any]:
    """Turn a float32 graph into a float16 one, in place; returns what was done. Raises BundleError
    for a weight beyond float16.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    angles = _angles(model)
    exact = {name for node in model.graph.node if node.name in angles for name in node.input}
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    weights = [t for t in floats if size(t) > 1024 and t.name not in exact]
    apart = [t for t in floats if t.name in exact]
    _declare_as_inputs(model, [*weights, *apart])
    names = {t.name for t in (*weights, *apart)}
    ports = [
        value.name for value in (*model.graph.input, *model.graph.output) if value.name not in names
    ]
    keep = [name for name in ports if not name.startswith(("past_key", "present"))]
    model.CopyFrom(
        convert_float_to_float16(
            model, keep_io_types=keep, disable_shape_infer=True, node_block_list=angles
        )
    )
    _shorten(model)
    inputs = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(data.add(tensor.name, read(tensor)) for tensor in apart)
    gap = norm = 0.0
    for tensor in weights:
        array = read(tensor)
        check_finite(tensor.name, array)
        if float(np.abs(array).max()) > LARGEST:
            raise BundleError(
                f"weight {tensor.name} has values beyond {LARGEST:.0f}, which fp16 cannot hold; use int8"
            )
        half = array.astype(np.float16)
        gap, norm = gap + float(np.square(half - array).sum()), norm + float(np.square(array).sum())
        model.graph.initializer.append(data.add(tensor.name, half))
    count = sum(int(np.prod(t.dims)) for t in weights)
    return {
        "precision": "fp16", "what": "fp16", "schemes": ["fp16"], "replaced": len(weights), "kept": {}, "shared": False, "weights": count,
        "bytes_of_weights": 2 * count, "weight_error": float(np.sqrt(gap / max(norm, 1e-30))), "errors": {}, "layers": {}, "bits": {},
    }  # fmt: skip


def _declare_as_inputs(model: onnx.ModelProto, weights: list[onnx.TensorProto]) -> None:
    """The converter reads initializers whole; inputs it only declares anew."""
    names = {t.name for t in weights}
    left = [t for t in model.graph.initializer if t.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(left)
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights
    )


def _shorten(model: onnx.ModelProto) -> None:
    """What is cast to float16 and straight back is read as it was: the converter puts such casts
    between nodes that stay in float32.
    """
    casts = {
        node.output[0]: (node.input[0], node.attribute[0].i)
        for node in model.graph.node
        if node.op_type == "Cast"
    }
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            source, kind = casts.get(name, ("", 0))
            before, half = casts.get(source, ("", 0))
            if (kind, half) == (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
                node.input[i] = before


def _angles(model: onnx.ModelProto) -> list[str]:
    """The nodes between position ids and their cosines and sines."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    wanted, found = [node for node in model.graph.node if node.op_type in IN_FLOAT32], []
    while wanted:
        node = wanted.pop()
        if node.name not in found:
            found.append(node.name)
            wanted += [made_by[name] for name in node.input if name in made_by]
    return found


def ports(model: onnx.ModelProto, graph: Graph) -> dict[str, Any]:
    """`inputs` and `outputs` of the manifest's entry, with the types that they have now."""
    now = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}

    def typed(given: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        return {
            name: replace(port, dtype=str(onnx.helper.tensor_dtype_to_np_dtype(now[name])))
            for name, port in given.items()
        }

    return {"inputs": typed(graph.inputs), "outputs": typed(graph.outputs)}
