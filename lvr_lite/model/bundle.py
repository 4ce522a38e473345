"""A bundle: the folder that passes from the workshop to the device. May import: the standard
library and the core.

lvr.json          the manifest: everything a reader needs; nothing is inferred from file names
tokenizer.json    a `tokenizers` file
onnx/*.onnx       the graphs, each with its weights in *.onnx_data beside it
report.json       parity and errors, for people
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lvr_lite.errors import BundleError
from lvr_lite.files import sha256
from lvr_lite.model.spec import LatentSpec

MANIFEST, VERSION = "lvr.json", 1
GRAPHS = ("vision_encoder", "embed_tokens", "decoder", "lm_head")


@dataclass(frozen=True)
class Graph:
    """One ONNX graph. files: every file it needs, the .onnx first, relative to the bundle, each
    with its sha256; bytes: their sum, less what lies in another graph's file.

    inputs, outputs: {name: {"dtype": "float32", "axes": ["batch", 256, …]}} in the graph's order.
    precision: "fp32", "int8", "int4", "mixed" (both), "fp16" or "nf4".
    """

    files: dict[str, str]
    bytes: int
    precision: str
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]

    @property
    def path(self) -> str:
        return next(iter(self.files))


@dataclass(frozen=True)
class Manifest:
    """What lvr.json says; field by field as in docs/design.md."""

    family: str
    precision: str
    graphs: dict[str, Graph]
    latent: LatentSpec
    tokens: dict[str, Any]  # image, end (list), lvr_start, lvr, lvr_end: ids
    chat_template: str
    image: dict[str, Any]
    decoder: dict[str, int]  # layers, kv_heads, head_dim, hidden_size, vocab_size
    rope: dict[str, Any]
    source: dict[str, Any]
    parity: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def graph_files(folder: Path, paths: list[str]) -> dict[str, Any]:
    """`files` and `bytes` of a Graph for the files at these relative paths."""
    return {
        "files": {p: sha256(folder / p) for p in paths},
        "bytes": sum((folder / p).stat().st_size for p in paths),
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1), encoding="utf-8")


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path, check: bool = True) -> Manifest:
    """The manifest of a bundle; with `check`, every file is there and has the bytes that were
    written.

    Raises BundleError, naming the file, for a folder without a manifest, an unknown version, a
    missing, changed or truncated file.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: no such folder; `lvr-lite export CHECKPOINT BUNDLE` makes a bundle"
        )
    if not path.is_file():
        raise BundleError(
            f"{folder}: not a bundle ({MANIFEST} is missing); `lvr-lite export CHECKPOINT {folder}` makes one"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["version"]
        if version != VERSION:
            advice = "export again, or install the matching release"
            raise BundleError(
                f"{path}: bundle version {version}, this lvr-lite reads version {VERSION}: {advice}"
            )
        graphs = {name: Graph(**graph) for name, graph in data.pop("graphs").items()}
        if not all(isinstance(graph.files, dict) and graph.files for graph in graphs.values()):
            raise TypeError("a graph without files")
        data["source"]["tokenizer_sha256"]
        manifest = Manifest(graphs=graphs, latent=LatentSpec.from_json(data.pop("latent")), **data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}); export again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{path}: a field is missing or unknown ({error}); export again"
        ) from error
    missing = [name for name in GRAPHS if name not in manifest.graphs]
    if missing:
        raise BundleError(f"{path}: graph {missing[0]} is missing; export again")
    if check:
        check_files(folder, manifest)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError for the first file that is missing or does not have the sha256 of the
    manifest.
    """
    wanted = {p: h for graph in manifest.graphs.values() for p, h in graph.files.items()}
    wanted["tokenizer.json"] = manifest.source["tokenizer_sha256"]
    for name, digest in wanted.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(
                f"{folder / MANIFEST}: file {name} lies outside the bundle; do not use it"
            )
        if not path.is_file():
            raise BundleError(f"{path}: missing; copy the whole bundle again, or export again")
        if sha256(path) != digest:
            raise BundleError(
                f"{path}: changed or truncated (its sha256 is not the manifest's); copy the bundle again, or export again"
            )
