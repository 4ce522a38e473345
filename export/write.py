"""From a checkpoint to a bundle that has passed the parity gate, one weight at a time. May import:
torch, onnx and the core.

weights = TrainedWeights(checkpoint) write_bundle(checkpoint, weights, Path("bundles/first-fp32"),
print, reference=lambda: load_merged(checkpoint))
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from torch import Tensor

from lvr_lite import files, terminal
from lvr_lite.export import graphs, onnxfile, parity
from lvr_lite.export.graphs import Origin
from lvr_lite.export.weights import origins
from lvr_lite.generate.torch import language_model
from lvr_lite.model.bundle import (
    MANIFEST,
    Bundle,
    DecoderShape,
    Graph,
    Manifest,
    TensorInfo,
    write_manifest,
)
from lvr_lite.model.checkpoint import Checkpoint

PACKAGES = ("lvr-lite", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
SMALL = (
    1 << 30
    # bytes of weights in float32 up to which torch's model and the graphs are compared whole, both in
    # memory
)


class Weights(Protocol):
    """A model's parameters in float32 by transformers' names, made when asked for; model: its
    `lvr_lite.export.weights.empty_model`.
    """

    model: Any

    def __getitem__(self, name: str) -> Tensor: ...

    def merged(self) -> Weights:
        """The same, its adapters merged."""
        ...


class Convert(Protocol):
    """Writes one graph's weights in another precision: rewrites `model` in place, reading weights
    with `read`, adding them to `data`.

    origins: which parameter an initializer is. Returns what report.json says of it, "precision"
    among it.
    """

    def __call__(
        self,
        graph: str,
        model: onnx.ModelProto,
        read: Callable[[onnx.TensorProto], np.ndarray],
        data: onnxfile.DataFile,
        origins: dict[str, Origin],
    ) -> dict[str, Any]: ...


def write_bundle(
    checkpoint: Checkpoint,
    weights: Weights,
    target: Path,
    progress: Callable[[str], None],
    reference: Callable[[], Any] | None = None,
    precision: str = "fp32",
    convert: Convert | None = None,
    source: dict[str, Any] | None = None,
) -> Bundle:
    """Write a checkpoint as a bundle at `target`, which is returned.

    progress: is told one line per stage. reference: loads torch's model, which a small bundle must
    equal in every graph and token by token; a larger one (SMALL) must equal `weights` graph by
    graph and layer by layer. None: nothing is compared. precision, convert: how weights are
    written, float32 as they are by default. source: what the manifest says of the origin beyond
    that. Raises LvrError where the model cannot be exported or a graph fails the parity gate,
    BundleError where `target` cannot be written or a weight is not finite; either way nothing is
    left and an earlier bundle at `target` stays as it was.
    """
    model = weights.model
    total = 4 * sum(p.numel() for p in model.parameters())
    files.check_free_space(target, int(total * 1.05) if convert is None else total // 4)
    codes, config = origins(model), model.config.text_config
    head_dim = language_model(model).layers[0].self_attn.head_dim
    with files.fresh_folder(target, MANIFEST) as folder:
        (folder / "onnx").mkdir()
        written, report = {}, {}
        for name, spec in graphs.specs(model, checkpoint.processor).items():
            began = time.perf_counter()
            proto, found = graphs.structure(spec, codes)
            path = folder / "onnx" / f"{name}.onnx"

            def read(tensor: onnx.TensorProto, found: dict[str, Origin] = found) -> np.ndarray:
                return _values(tensor, weights, found)

            with onnxfile.data_file(path) as data:
                report[name] = (convert or _as_they_are)(name, proto, read, data, found)
            path.write_bytes(proto.SerializeToString())
            written[name] = describe(folder, f"onnx/{name}.onnx", report[name].pop("precision"))
            report[name] |= {
                "bytes": written[name].bytes,
                "seconds": round(time.perf_counter() - began, 2),
            }
            progress(f"{name}: {written[name].bytes / 1e6:.1f} MB, {report[name]['seconds']:.1f} s")
        checkpoint.processor.tokenizer.save(str(folder / "tokenizer.json"))
        decoder = DecoderShape(
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )
        origin = source if source is not None else _origin(checkpoint)
        origin |= {
            "tokenizer_sha256": files.sha256(folder / "tokenizer.json"),
            "versions": {p: version(p) for p in PACKAGES},
        }
        manifest = _manifest(
            checkpoint, written, precision, decoder, dict(config.rope_parameters), origin
        )
        write_manifest(folder, manifest)
        if reference is not None:
            found_parity = _gate(
                Bundle(folder, manifest),
                checkpoint,
                weights.merged(),
                reference if total <= SMALL else None,
                progress,
            )
            manifest = replace(manifest, parity=found_parity)
            write_manifest(folder, manifest)
        (folder / "report.json").write_text(
            json.dumps(
                {"precision": precision, "graphs": report, "parity": manifest.parity}, indent=1
            )
        )
    return Bundle(target, manifest)


def _values(tensor: onnx.TensorProto, weights: Weights, found: dict[str, Origin]) -> np.ndarray:
    if tensor.name not in found:
        return onnxfile.read(tensor, Path())
    origin, shape = found[tensor.name], tuple(tensor.dims)
    array = np.asarray(weights[origin.parameter].numpy())
    onnxfile.check_finite(origin.parameter, array)
    if origin.rows is not None:
        return np.asarray(array[origin.rows])
    return array.reshape(shape[::-1]).T if origin.transposed else array.reshape(shape)


def _as_they_are(
    graph: str,
    model: onnx.ModelProto,
    read: Callable[[onnx.TensorProto], np.ndarray],
    data: onnxfile.DataFile,
    origins: dict[str, Origin],
) -> dict[str, Any]:
    tensors: Iterable[onnx.TensorProto] = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        data.add(tensor.name, read(tensor)) if tensor.name in origins else tensor
        for tensor in terminal.bar(tensors, graph)
    )
    return {"precision": "fp32"}


def _gate(
    bundle: Bundle,
    checkpoint: Checkpoint,
    weights: Weights,
    load: Callable[[], Any] | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """load: of torch's model, to compare it whole; None for one that is too large for that."""
    layers = parity.check_layers(bundle, checkpoint, weights)
    progress(
        f"parity of the decoder's layers, one by one: relative difference {max(layers):.1e} at most"
    )
    if load is None:
        by_graph, decoding = parity.check_graphs_apart(bundle, checkpoint, weights), None
    else:
        from lvr_lite.generate.onnx import OnnxRuntime
        from lvr_lite.generate.torch import TorchRuntime

        got, want = OnnxRuntime(bundle), TorchRuntime(load(), checkpoint)
        by_graph, decoding = parity.check_graphs(got, want), parity.check_decoding(got, want)
    for name, found in by_graph.items():
        progress(
            f"parity of {name}: relative difference {found['relative']:.1e} over {found['cases']} cases"
        )
    if decoding is None:
        progress(
            "parity of decoding: not compared, for torch's model and the graphs do not fit into memory side by side"
        )
    else:
        progress(
            f"parity of decoding: same tokens, hidden states within {decoding['relative']:.1e}, {decoding['prompts']} prompts"
        )
    return {
        "tolerance": parity.TOLERANCE,
        "graphs": by_graph,
        "layers": layers,
        "decoding": decoding,
    }


def describe(folder: Path, path: str, precision: str) -> Graph:
    """The manifest's entry for the graph at `path` in a bundle, its inputs and outputs read off the
    file.
    """
    proto = onnxfile.load(folder / path).graph
    digests, size = onnxfile.graph_files(folder, path)
    return Graph(
        precision=precision,
        inputs={value.name: _tensor(value) for value in proto.input},
        outputs={value.name: _tensor(value) for value in proto.output},
        files=digests,
        bytes=size,
    )


def _tensor(value: Any) -> TensorInfo:
    kind = value.type.tensor_type
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return TensorInfo(dtype, [axis.dim_param or axis.dim_value for axis in kind.shape.dim])


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_sha256": checkpoint.digest(),
        "base": checkpoint.base.name,
        "adapter": checkpoint.adapter,
    }


def _manifest(
    checkpoint: Checkpoint,
    written: dict[str, Graph],
    precision: str,
    decoder: DecoderShape,
    rope: dict[str, Any],
    source: dict[str, Any],
) -> Manifest:
    return Manifest(
        family=checkpoint.processor.family.model_type,
        precision=precision,
        graphs=written,
        latent=checkpoint.latent,
        tokens=checkpoint.processor.tokens,
        chat_template=checkpoint.processor.template,
        image=checkpoint.processor.image,
        decoder=decoder,
        rope=rope,
        source=source,
    )
