"""fp16 bundles, for GPU providers: graphs that compute in 16-bit floats. May import: onnx,
onnxruntime, numpy and what stands above `quant`.

ONNX Runtime's own converter turns the graph; weights pass one at a time. Positions become angles in
float32, since 16 bits do not hold them beyond 2,048. Keys and values are in fp16 too; embeddings,
hidden states and logits keep float32 at the graphs' borders.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from lvr_lite.errors import BundleError
from lvr_lite.export.onnxfile import DataFile, check_finite, size
from lvr_lite.quant.reports import Conversion

LARGEST = float(np.finfo(np.float16).max)
IN_FLOAT32 = ("Cos", "Sin")
# Bytes of a constant up to which ONNX Runtime's converter may turn it.
SMALL = 1024


def convert(
    model: onnx.ModelProto, read: Callable[[onnx.TensorProto], np.ndarray], data: DataFile
) -> Conversion:
    """Turn a float32 graph into a float16 one, in place.

    read: gives the values of a weight; data: the file that the new weights go to. Raises
    BundleError for a weight beyond float16.
    """
    graph = model.graph
    angles = _angle_nodes(model)
    of_angles: set[str] = set()
    for node in graph.node:
        if node.name in angles:
            of_angles.update(node.input)
    weights = []
    in_float32 = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        if tensor.name in of_angles:
            in_float32.append(tensor)
        elif size(tensor) > SMALL:
            weights.append(tensor)
    _convert_nodes(model, [*weights, *in_float32], angles)
    for tensor in in_float32:
        graph.initializer.append(data.add(tensor.name, read(tensor)))
    squared_error = 0.0
    squared_norm = 0.0
    for tensor in weights:
        array = read(tensor)
        half = _half(tensor.name, array)
        squared_error += float(np.square(half - array).sum())
        squared_norm += float(np.square(array).sum())
        graph.initializer.append(data.add(tensor.name, half))
    count = sum(int(np.prod(tensor.dims)) for tensor in weights)
    relative = squared_error / max(squared_norm, 1e-30)
    return Conversion(
        precision="fp16",
        what="fp16",
        schemes=["fp16"],
        replaced=len(weights),
        kept={},
        shared=False,
        weights=count,
        bytes_of_weights=2 * count,
        weight_error=float(np.sqrt(relative)),
        errors={},
        layers={},
        bits={},
    )


def _half(name: str, array: np.ndarray) -> np.ndarray:
    check_finite(name, array)
    largest = float(np.abs(array).max())
    if largest > LARGEST:
        raise BundleError(
            f"weight {name} has values beyond {LARGEST:.0f}, which fp16 cannot hold; use int8"
        )
    return array.astype(np.float16)


def _convert_nodes(
    model: onnx.ModelProto, weights: list[onnx.TensorProto], in_float32: list[str]
) -> None:
    """All but the weights, which are gone afterwards.

    The converter reads initializers whole, and inputs it only declares anew: so weights are inputs
    while it runs. in_float32: nodes that stay as they are.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    graph = model.graph
    names = {tensor.name for tensor in weights}
    ports = [value.name for value in (*graph.input, *graph.output)]
    in_both = [name for name in ports if not name.startswith(("past_key", "present"))]
    constants = [tensor for tensor in graph.initializer if tensor.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights
    )
    converted = convert_float_to_float16(
        model, keep_io_types=in_both, disable_shape_infer=True, node_block_list=in_float32
    )
    model.CopyFrom(converted)
    _shorten(model)
    inputs = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def _shorten(model: onnx.ModelProto) -> None:
    """Read what is cast to float16 and straight back as it was: the converter puts such casts
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
            before, kind_before = casts.get(source, ("", 0))
            if kind == onnx.TensorProto.FLOAT and kind_before == onnx.TensorProto.FLOAT16:
                node.input[i] = before


def _angle_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes between position ids and their cosines and sines."""
    producers: dict[str, onnx.NodeProto] = {}
    open_nodes = []
    for node in model.graph.node:
        producers |= dict.fromkeys(node.output, node)
        if node.op_type in IN_FLOAT32:
            open_nodes.append(node)
    names: list[str] = []
    while open_nodes:
        node = open_nodes.pop()
        if node.name in names:
            continue
        names.append(node.name)
        open_nodes += [producers[name] for name in node.input if name in producers]
    return names
