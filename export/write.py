"""From a merged float32 model to a bundle that has passed the parity gate. May import: torch, onnx and the core.

write_bundle(model, read_checkpoint("runs/first"), Path("bundles/first-fp32"), print)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from lvr_lite import bundle
from lvr_lite.bundle import Graph, Manifest
from lvr_lite.checkpoint import Checkpoint
from lvr_lite.export import graphs, parity
from lvr_lite.runtime.onnx import OnnxRuntime
from lvr_lite.runtime.torch import TorchRuntime, language_model

PACKAGES = ("lvr-lite", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def write_bundle(model: Any, checkpoint: Checkpoint, target: Path, progress: Callable[[str], None]) -> Manifest:
    """Write `model` as an fp32 bundle at `target`; returns its manifest.

    model: the checkpoint's network in float32 on the CPU, with its adapter merged. progress: is told one line per stage.
    Raises LvrError where the model cannot be exported or a graph fails the parity gate, BundleError where `target` cannot be
    written; either way nothing is left and an earlier bundle at `target` stays as it was.
    """
    model = model.eval()
    pieces = graphs.specs(model, checkpoint.family, checkpoint.image_spec)
    with bundle.fresh_folder(target) as folder:
        (folder / "onnx").mkdir()
        written, seconds = {}, {}
        for name, spec in pieces.items():
            began = time.perf_counter()
            files = graphs.write_graph(spec, folder / "onnx" / f"{name}.onnx")
            written[name] = describe(folder, [str(f.relative_to(folder)) for f in files], "fp32")
            seconds[name] = round(time.perf_counter() - began, 2)
            progress(f"{name}: {written[name].bytes / 1e6:.1f} MB, {seconds[name]:.1f} s")
        checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
        manifest = _manifest(model, checkpoint, written, bundle.sha256(folder / "tokenizer.json"))
        bundle.write_manifest(folder, manifest)
        manifest = replace(manifest, parity=_gate(folder, model, checkpoint, progress))
        bundle.write_manifest(folder, manifest)
        sizes = {name: graph.bytes for name, graph in written.items()}
        report = {"parity": manifest.parity, "bytes": sizes, "export_seconds": seconds}
        (folder / "report.json").write_text(json.dumps(report, indent=1))
    return manifest


def _gate(folder: Path, model: Any, checkpoint: Checkpoint, progress: Callable[[str], None]) -> dict[str, Any]:
    got, want = OnnxRuntime(folder), TorchRuntime(model, checkpoint)
    by_graph = parity.check_graphs(got, want)
    for name, found in by_graph.items():
        progress(f"parity of {name}: relative difference {found['relative']:.1e} over {found['cases']} cases")
    decoding = parity.check_decoding(got, want)
    progress(f"parity of decoding: same tokens, hidden states within {decoding['relative']:.1e}, {decoding['prompts']} prompts")
    return {"tolerance": parity.TOLERANCE, "graphs": by_graph, "decoding": decoding}


def describe(folder: Path, paths: list[str], precision: str) -> Graph:
    """The manifest's entry for a graph whose .onnx is `paths[0]`, its inputs and outputs read off the file."""
    proto = onnx.load(str(folder / paths[0]), load_external_data=False).graph
    return Graph(
        precision=precision,
        inputs={value.name: _tensor(value) for value in proto.input},
        outputs={value.name: _tensor(value) for value in proto.output},
        **bundle.graph_files(folder, paths),
    )


def _tensor(value: Any) -> dict[str, Any]:
    kind = value.type.tensor_type
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return {"dtype": dtype, "axes": [axis.dim_param or axis.dim_value for axis in kind.shape.dim]}


def _manifest(model: Any, checkpoint: Checkpoint, written: dict[str, Graph], tokenizer_sha256: str) -> Manifest:
    config = model.config.text_config
    attention = language_model(model).layers[0].self_attn
    source = {
        "checkpoint_sha256": checkpoint.digest(),
        "base": checkpoint.base.name,
        "adapter": checkpoint.adapter,
        "tokenizer_sha256": tokenizer_sha256,
        "versions": {package: version(package) for package in PACKAGES},
    }
    return Manifest(
        family=checkpoint.family.MODEL_TYPE,
        precision="fp32",
        graphs=written,
        latent=checkpoint.latent,
        tokens=asdict(checkpoint.tokens) | {"end": list(checkpoint.tokens.end)},
        chat_template=checkpoint.template,
        image=checkpoint.image_spec,
        decoder={
            "layers": config.num_hidden_layers,
            "kv_heads": config.num_key_value_heads,
            "head_dim": attention.head_dim,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
        },
        rope=dict(config.rope_parameters),
        source=source,
    )
