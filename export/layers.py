"""The layers of a bundle's decoder, each as a graph of its own, run one after another.

May import: onnx, onnxruntime, numpy, model/, generate/.

No more than one layer is in memory, so a decoder of any size can be compared with torch's, and
calibrated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from lvr_lite.export import onnxfile
from lvr_lite.generate.onnx import open_session
from lvr_lite.model.bundle import Bundle

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# Called with the names of weights that are multiplied with one value, and that value (N, K).
Watch = Callable[[tuple[str, ...], np.ndarray], None]


@dataclass(frozen=True)
class LayerCall:
    """What a layer reads at once.

    hidden: (B, S, H) float32.
    positions: (3, B, S) int64.
    totals: (B,), positions of each row so far, with these.
    added: (B, S, H) float32, what is added after the layer (deepstack), or None.
    """

    hidden: np.ndarray
    positions: np.ndarray
    totals: np.ndarray
    added: np.ndarray | None = None


class DecoderLayers:
    """The layers of a bundle's decoder, run one by one."""

    def __init__(self, bundle: Bundle) -> None:
        self._file = bundle.path("decoder")
        self._model = onnxfile.load(self._file)
        self._shape = bundle.manifest.decoder
        inputs = bundle.manifest.graphs["decoder"].inputs
        self._cache_type = np.dtype(inputs["past_key_values.0.key"].dtype)
        deepstack = inputs.get("deepstack_embeds")
        # The width of what is added after any layer, side by side.
        self._deepstack = int(deepstack.axes[-1]) if deepstack else 0

    def run(self, index: int, calls: list[LayerCall]) -> list[np.ndarray]:
        """Hidden states (B, S, H) after layer `index` of several calls, one after another; keys and
        values stay between them.
        """
        return self.run_all(index, [calls])[0]

    def run_all(
        self, index: int, sequences: list[list[LayerCall]], watch: Watch | None = None
    ) -> list[list[np.ndarray]]:
        """`run` for several sequences, each with keys and values of its own.

        watch: called once a call for each value that weights of the layer are multiplied with.
        """
        layer = decoder_layer(self._model, index, self._shape.layers)
        readers: dict[str, list[str]] = {}
        if watch is not None:
            readers = _readers(layer)
        for name in readers:
            value = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            layer.graph.output.append(value)
        session = open_session(layer.SerializeToString(), self._file.parent)
        results = []
        for calls in sequences:
            cache = self._empty_cache(index, calls)
            after = []
            for call in calls:
                hidden, watched = self._step(session, index, call, cache, list(readers))
                after.append(hidden)
                for name, value in watched.items():
                    assert watch is not None
                    rows = value.reshape(-1, value.shape[-1])
                    watch(tuple(readers[name]), rows)
            results.append(after)
        return results

    def _empty_cache(self, index: int, calls: list[LayerCall]) -> dict[str, np.ndarray]:
        """Room for the keys and values of these calls, by the names of the layer's inputs."""
        shape = (
            len(calls[0].hidden),
            self._shape.kv_heads,
            sum(call.hidden.shape[1] for call in calls),
            self._shape.head_dim,
        )
        return {name: np.zeros(shape, self._cache_type) for name in _cache_names(index)}

    def _step(
        self,
        session: InferenceSession,
        index: int,
        call: LayerCall,
        cache: dict[str, np.ndarray],
        watched: list[str],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Hidden states after one call, and the values called `watched`; `cache` has the new keys
        and values afterwards.
        """
        key, value = _cache_names(index)
        inputs = {
            "hidden": call.hidden.astype(self._cache_type),
            "position_ids": call.positions,
            "seqlens_k": (call.totals - 1).astype(np.int32),
            "total_sequence_length": np.array(call.totals.max(), np.int32),
            "deepstack_embeds": self._added(index, call),
            **cache,
        }
        wanted = [tensor.name for tensor in session.get_inputs()]
        # The graph reads the cache's size from one layer's keys, which need not be this one's.
        for name in wanted:
            if name.startswith("past_key_values.") and name not in inputs:
                inputs[name] = cache[key]
        present = [name.replace("past_key_values", "present") for name in cache]
        outputs = ["after", *present, *watched]
        results = session.run(outputs, {name: inputs[name] for name in wanted})
        hidden, cache[key], cache[value], *values = results
        return hidden.astype(np.float32), dict(zip(watched, values, strict=True))

    def _added(self, index: int, call: LayerCall) -> np.ndarray:
        """`deepstack_embeds` with what is added after this layer in its place."""
        batch, length, width = call.hidden.shape
        embeds = np.zeros((batch, length, self._deepstack), np.float32)
        if call.added is not None:
            first = index * width
            embeds[..., first : first + width] = call.added
        return embeds


def _cache_names(index: int) -> tuple[str, str]:
    return f"past_key_values.{index}.key", f"past_key_values.{index}.value"


def _readers(layer: onnx.ModelProto) -> dict[str, list[str]]:
    """{value: the weights that it is multiplied with}"""
    tensors = layer.graph.initializer
    weights = {tensor.name for tensor in tensors if len(tensor.dims) == 2}
    readers: dict[str, list[str]] = {}
    for node in layer.graph.node:
        if node.op_type != "MatMul":
            continue
        value, weight = node.input
        if weight in weights:
            readers.setdefault(value, []).append(weight)
    return readers


def decoder_layer(model: onnx.ModelProto, index: int, layers: int) -> onnx.ModelProto:
    """One layer of a decoder graph as a graph of its own, whose weights lie where they lay: hidden
    states in as `hidden`, out as `after`.

    layers: of the whole decoder. A layer begins where its first norm reads and ends where the next
    one does.

        decoder:  … ── begin ── layer `index` ── end ── …
        layer:    hidden ── Identity ── begin ── the same nodes ── end ── Identity ── after
    """
    whole = model.graph
    begin = _read_by_norm(model, f".layers.{index}.input_layernorm.weight")
    if index + 1 < layers:
        end = _read_by_norm(model, f".layers.{index + 1}.input_layernorm.weight")
    else:
        end = _read_by_norm(model, "language_model.norm.weight")
    present = [f"present.{index}.key", f"present.{index}.value"]
    stops = {value.name for value in whole.input}
    stops.add(begin)
    nodes = [
        helper.make_node("Identity", ["hidden"], [begin]),
        *_nodes_between(model, stops, [end, *present]),
        helper.make_node("Identity", [end], ["after"]),
    ]
    reads: set[str] = set()
    for node in nodes:
        reads.update(node.input)
    reads.discard(begin)
    outputs = {value.name: value for value in whole.output}
    # What the layer computes in.
    dtype = outputs[present[0]].type.tensor_type.elem_type
    layer = onnx.ModelProto(ir_version=model.ir_version)
    layer.opset_import.extend(model.opset_import)
    graph = layer.graph
    graph.name = f"layer {index}"
    graph.node.extend(nodes)
    graph.initializer.extend(tensor for tensor in whole.initializer if tensor.name in reads)
    graph.input.extend(value for value in whole.input if value.name in reads)
    graph.input.append(_states("hidden", dtype))
    graph.output.append(_states("after", dtype))
    graph.output.extend(outputs[name] for name in present)
    return layer


def _states(name: str, dtype: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, ["batch", "sequence", None])


def _nodes_between(
    model: onnx.ModelProto, stops: set[str], results: list[str]
) -> list[onnx.NodeProto]:
    """The nodes that compute `results` from the values `stops` and from weights, in the graph's
    order.
    """
    nodes = model.graph.node
    # {value: place of the node that computes it}
    producers: dict[str, int] = {}
    for place, node in enumerate(nodes):
        producers |= dict.fromkeys(node.output, place)
    places: set[int] = set()
    names = list(results)
    while names:
        name = names.pop()
        producer = producers.get(name)
        if name in stops or producer is None or producer in places:
            continue
        places.add(producer)
        names += nodes[producer].input
    return [nodes[place] for place in sorted(places)]


def _read_by_norm(model: onnx.ModelProto, weight: str) -> str:
    """The value that the norm with this weight reads."""
    norms = [node for node in model.graph.node if node.op_type == "RMSNormalization"]
    values = [node.input[0] for node in norms if node.input[1].endswith(weight)]
    return str(values[0])
