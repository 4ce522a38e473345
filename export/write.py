"""From a checkpoint to a bundle that has passed the parity gate, one weight at a time.

May import: torch, onnx, model/, generate/.

    weights = TrainedWeights(checkpoint)
    write_bundle(checkpoint, weights, Path("bundles/first-fp32"), print,
                 reference=lambda: load_merged(checkpoint))
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx

from lvr_lite import files, terminal
from lvr_lite.export import apart, graphs, onnxfile, parity
from lvr_lite.export.graphs.structure import Origin, structure
from lvr_lite.export.weights import TransformersModule, Weights, origins
from lvr_lite.files import JsonObject
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.torch import TorchRuntime, language_model
from lvr_lite.model.bundle import (
    MANIFEST,
    TOKENIZER,
    Bundle,
    DecoderShape,
    Graph,
    Manifest,
    write_bundle_sums,
    write_manifest,
)
from lvr_lite.model.checkpoint import Checkpoint

PACKAGES = ("lvr-lite", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
# Bytes of weights in float32 up to which torch's model and the graphs are compared whole, both in
# memory.
SMALL = 1 << 30


class Convert(Protocol):
    """Writes one graph's weights, in whatever precision.

    graph: its name.
    model: the graph, which is changed in place.
    read: gives the float32 values of an initializer.
    data: takes the values that are written.
    origins: which parameter an initializer is.

    Returns what report.json says of the graph, "precision" (the manifest's) among it.
    """

    def __call__(
        self,
        graph: str,
        model: onnx.ModelProto,
        read: Callable[[onnx.TensorProto], np.ndarray],
        data: onnxfile.DataFile,
        origins: dict[str, Origin],
    ) -> JsonObject: ...


def write_bundle(
    checkpoint: Checkpoint,
    weights: Weights,
    target: Path,
    progress: Callable[[str], None],
    reference: Callable[[], TransformersModule] | None = None,
    precision: str = "fp32",
    convert: Convert | None = None,
    source: JsonObject | None = None,
) -> Bundle:
    """Write a checkpoint as a bundle at `target`, which is returned.

    progress: called with one line per stage.
    reference: loads torch's model, which a small bundle must equal in every graph and token by
        token; a larger one (SMALL) must equal `weights` graph by graph and layer by layer, and
        these what transformers loads, weight by weight. None: nothing is compared.
    precision, convert: how weights are written; in float32 by default.
    source: the manifest's `source`; what names the checkpoint by default.

    Raises LvrError where the model cannot be exported or a graph fails the parity gate, BundleError
    where a weight is not finite, OutputError where `target` cannot be written; either way nothing
    is left and an earlier bundle at `target` stays as it was.
    """
    float32_bytes = 4 * sum(p.numel() for p in weights.model.parameters())
    # Other precisions need at least a quarter.
    needed = int(float32_bytes * 1.05) if convert is None else float32_bytes // 4
    files.check_free_space(target, needed)
    with files.fresh_folder(target, MANIFEST) as folder:
        (folder / "onnx").mkdir()
        # The empty model is used up by export.
        decoder = _decoder_shape(weights.model)
        written, reports = _write_graphs(
            folder, checkpoint, weights, convert or as_float32, progress
        )
        checkpoint.processor.tokenizer.save(str(folder / TOKENIZER))
        manifest = Manifest(
            family=checkpoint.processor.family.model_type,
            precision=precision,
            graphs=written,
            latent=checkpoint.latent,
            tokens=checkpoint.processor.tokens,
            chat_template=checkpoint.processor.template,
            image=checkpoint.processor.image,
            decoder=decoder,
            rope=dict(weights.model.config.text_config.rope_parameters),
            source=_source(checkpoint, folder, source),
        )
        write_manifest(folder, manifest)
        if reference is not None:
            whole = reference if float32_bytes <= SMALL else None
            measured = _gate(
                Bundle(folder, manifest), checkpoint, weights.merged(), whole, progress
            )
            manifest = replace(manifest, parity=measured.to_json())
            write_manifest(folder, manifest)
        report = {"precision": precision, "graphs": reports, "parity": manifest.parity}
        text = json.dumps(report, indent=1)
        (folder / "report.json").write_text(text, encoding="utf-8", newline="\n")
        write_bundle_sums(folder, manifest)
    return Bundle(target, manifest)


def _write_graphs(
    folder: Path,
    checkpoint: Checkpoint,
    weights: Weights,
    convert: Convert,
    progress: Callable[[str], None],
) -> tuple[dict[str, Graph], dict[str, JsonObject]]:
    """Writes the graphs and their weights; returns their entries in the manifest and in
    report.json.
    """
    codes = origins(weights.model)
    written: dict[str, Graph] = {}
    reports: dict[str, JsonObject] = {}
    for name, spec in graphs.specs(weights.model, checkpoint.processor).items():
        began = time.perf_counter()
        proto, places = structure(spec, codes)
        path = f"onnx/{name}.onnx"
        read = partial(_values, weights=weights, origins=places)
        with onnxfile.data_file(folder / path) as data:
            report = convert(name, proto, read, data, places)
        (folder / path).write_bytes(proto.SerializeToString())
        graph = onnxfile.describe(folder, path, str(report.pop("precision")))
        seconds = round(time.perf_counter() - began, 2)
        written[name] = graph
        reports[name] = report | {"bytes": graph.bytes, "seconds": seconds}
        progress(f"{name}: {graph.bytes / 1e6:.1f} MB, {seconds:.1f} s")
    return written, reports


def _values(
    tensor: onnx.TensorProto, weights: Weights, origins: Mapping[str, Origin]
) -> np.ndarray:
    """The float32 values of an initializer: of the parameter that it is, or its own."""
    if tensor.name not in origins:
        return onnxfile.read(tensor, Path())
    origin = origins[tensor.name]
    shape = tuple(tensor.dims)
    array = np.asarray(weights[origin.parameter].numpy())
    onnxfile.check_finite(origin.parameter, array)
    if origin.rows is not None:
        return np.asarray(array[origin.rows])
    return array.reshape(shape[::-1]).T if origin.transposed else array.reshape(shape)


def as_float32(
    graph: str,
    model: onnx.ModelProto,
    read: Callable[[onnx.TensorProto], np.ndarray],
    data: onnxfile.DataFile,
    origins: dict[str, Origin],
) -> JsonObject:
    """The `Convert` that leaves weights as they are."""
    tensors: list[onnx.TensorProto] = list(model.graph.initializer)
    del model.graph.initializer[:]
    for tensor in terminal.bar(tensors, graph):
        stored = data.add(tensor.name, read(tensor)) if tensor.name in origins else tensor
        model.graph.initializer.append(stored)
    return {"precision": "fp32"}


def _decoder_shape(model: TransformersModule) -> DecoderShape:
    config = model.config.text_config
    return DecoderShape(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=language_model(model).layers[0].self_attn.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
    )


def _source(checkpoint: Checkpoint, folder: Path, source: JsonObject | None) -> JsonObject:
    """The manifest's `source`."""
    if source is None:
        source = {
            "checkpoint_sha256": checkpoint.digest(),
            "base": checkpoint.base.name,
            "adapter": checkpoint.adapter,
        }
    return source | {
        "tokenizer_sha256": files.sha256(folder / TOKENIZER),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _gate(
    bundle: Bundle,
    checkpoint: Checkpoint,
    weights: Weights,
    load: Callable[[], TransformersModule] | None,
    progress: Callable[[str], None],
) -> parity.Parity:
    """Compares a bundle with torch. load: gives torch's model; None for one that is too large to be
    in memory whole.
    """
    layers = apart.check_layers(bundle, checkpoint, weights)
    progress(
        f"parity of the decoder's layers, one by one: relative difference {max(layers):.1e} at most"
    )
    decoding = None
    if load is None:
        count = apart.check_reading(checkpoint, weights.base())
        progress(f"parity of reading: {count} weights are what transformers loads")
        by_graph = apart.check_graphs_apart(bundle, checkpoint, weights)
    else:
        got = OnnxRuntime(bundle)
        want = TorchRuntime(load(), checkpoint)
        by_graph = parity.check_graphs(got, want)
        decoding = parity.check_decoding(got, want)
    for name, gap in by_graph.items():
        progress(f"parity of {name}: relative difference {gap.relative:.1e} over {gap.cases} cases")
    if decoding is None:
        progress(
            "parity of decoding: not compared, for torch's model and the graphs do not fit "
            "into memory side by side"
        )
    else:
        progress(
            f"parity of decoding: same tokens, hidden states within {decoding.worst.relative:.1e}, "
            f"{decoding.prompts} prompts"
        )
    return parity.Parity(by_graph, layers, decoding)
