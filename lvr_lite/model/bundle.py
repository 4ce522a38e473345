"""A bundle: the folder that passes from the workshop to the device.

May import: the standard library, tokenizers and this folder.

lvr.json          the manifest: everything a reader needs; nothing is inferred from file names
tokenizer.json    a `tokenizers` file
onnx/*.onnx       the graphs, each with its weights in *.onnx_data beside it
report.json       parity and errors, for people
SHA256SUMS        of all these, as sha256sum writes it; bundles of earlier versions have none
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from tokenizers import Tokenizer

from lvr_lite.errors import BundleError
from lvr_lite.files import earlier_result, sha256
from lvr_lite.model import families
from lvr_lite.model.families import ImageSpec
from lvr_lite.model.json_files import check_number, check_whole, read_object
from lvr_lite.model.onnx_files import check_graph
from lvr_lite.model.processor import Processor
from lvr_lite.model.spec import LatentSpec, TokenIds
from lvr_lite.sums import check_sums, files_below, is_plain, write_sums

MANIFEST = "lvr.json"
VERSION = 1
TOKENIZER = "tokenizer.json"
# The largest values of numbers in a manifest: some 30 times what any published model has.
LARGEST_SIZES = {
    "layers": 1 << 10,
    "kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "hidden_size": 1 << 18,
    "vocab_size": 1 << 24,
}
LARGEST_STEPS = 1 << 12
GRAPHS = ("vision_encoder", "embed_tokens", "decoder", "lm_head")


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph: dtype such as "float32"; axes: names where sizes vary."""

    dtype: str
    axes: list[str | int]


@dataclass(frozen=True)
class Graph:
    """One ONNX graph.

    files: {path relative to the bundle: sha256} of every file it needs, the .onnx first.
    bytes: their sum, less what lies in another graph's file.
    precision: "fp32", "int8", "int4", "mixed" (both), "fp16" or "nf4".
    inputs, outputs: in the graph's order.
    """

    files: dict[str, str]
    bytes: int
    precision: str
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]

    @property
    def path(self) -> str:
        """The .onnx, relative to the bundle."""
        return next(iter(self.files))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Graph:
        """Raises KeyError or TypeError for a missing or an unknown field."""
        ends = {
            name: {tensor: TensorInfo(**info) for tensor, info in data[name].items()}
            for name in ("inputs", "outputs")
        }
        graph = cls(**{**data, **ends})
        if not (isinstance(graph.files, dict) and graph.files):
            raise TypeError("a graph without files")
        return graph


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder that its K/V cache and its ends depend on."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class Manifest:
    """What lvr.json says; field by field as in docs/bundle.md."""

    family: str
    precision: str
    graphs: dict[str, Graph]
    latent: LatentSpec
    tokens: TokenIds
    chat_template: str
    image: ImageSpec
    decoder: DecoderShape
    rope: dict[str, Any]
    source: dict[str, Any]
    parity: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        tokens = asdict(self.tokens) | {"end": list(self.tokens.end)}
        return asdict(self) | {"image": self.image.to_json(), "tokens": tokens}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises KeyError, TypeError or AttributeError for a missing or an unknown field."""
        data["source"]["tokenizer_sha256"]
        tokens = data["tokens"]
        typed = {
            "graphs": {name: Graph.from_json(graph) for name, graph in data["graphs"].items()},
            "latent": LatentSpec.from_json(data["latent"]),
            "tokens": TokenIds(**{**tokens, "end": tuple(tokens["end"])}),
            "image": ImageSpec.from_json(data["image"]),
            "decoder": DecoderShape(**data["decoder"]),
        }
        return cls(**{**data, **typed})


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest, checked once and passed on from there."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path, check: bool = True) -> Bundle:
        """Read a bundle; with `check`, every file is there and has the bytes that were written.

        Raises BundleError, naming the file, for a folder without a manifest, an unknown version, a
        missing, changed or truncated file.
        """
        bundle = cls(folder, _read_manifest(folder))
        if check:
            bundle.check_files()
        return bundle

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def bytes(self) -> int:
        """Of all graphs."""
        return sum(graph.bytes for graph in self.manifest.graphs.values())

    @cached_property
    def processor(self) -> Processor:
        """Raises BundleError for a family that is not supported."""
        manifest = self.manifest
        return Processor(
            family=families.get(manifest.family),
            image=manifest.image,
            template=manifest.chat_template,
            tokenizer=_read_tokenizer(_inside(self.folder, TOKENIZER)),
            tokens=manifest.tokens,
        )

    def path(self, graph: str) -> Path:
        """The .onnx of a graph."""
        return self.folder / self.manifest.graphs[graph].path

    def with_manifest(self, **changes: Any) -> Bundle:
        """The same folder with some fields of its manifest replaced, in memory alone."""
        return Bundle(self.folder, replace(self.manifest, **changes))

    def check_files(self) -> None:
        """Raises BundleError for the first file that is missing, lies outside the bundle, or does
        not have the sha256 of the manifest; then for one that SHA256SUMS says otherwise of."""
        digests = _digests(self.manifest)
        for name, digest in digests.items():
            path = _inside(self.folder, name)
            if not path.is_file():
                raise BundleError(f"{path}: missing; copy the whole bundle again, or export again")
            if sha256(path) != digest:
                raise BundleError(
                    f"{path}: changed or truncated (its sha256 is not the manifest's); "
                    "copy the bundle again, or export again"
                )
        for graph in self.manifest.graphs.values():
            listed = [_beside(graph.path, file) for file in graph.files]
            check_graph(self.folder / graph.path, listed)
        # What the manifest vouches for was hashed above.
        check_sums(self.folder, known=digests, required=(MANIFEST, *digests))


def _inside(folder: Path, name: str) -> Path:
    """The file of a bundle's. Raises BundleError where its name or a link leads elsewhere."""
    path = folder / name
    if not is_plain(name) or not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(
            f"{folder / MANIFEST}: file {name} lies outside the bundle; do not use it"
        )
    return path


def _beside(graph: str, file: str) -> str:
    """A file of a bundle as a graph in it names it."""
    return PurePosixPath(os.path.relpath(file, PurePosixPath(graph).parent)).as_posix()


def _digests(manifest: Manifest) -> dict[str, str]:
    """{path relative to the bundle: sha256} of every file that the manifest names."""
    digests = {p: h for graph in manifest.graphs.values() for p, h in graph.files.items()}
    return digests | {TOKENIZER: manifest.source["tokenizer_sha256"]}


def write_bundle_sums(folder: Path, manifest: Manifest) -> None:
    """Write SHA256SUMS over all that lies in a bundle. Comes last of its files."""
    write_sums(folder, files_below(folder), known=_digests(manifest))


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    # tokenizers raises plain Exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{path}: cannot be read ({reason}); export again") from error


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.to_json(), indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")


def hashes_and_bytes(folder: Path, paths: Sequence[str]) -> tuple[dict[str, str], int]:
    """{path: sha256} of files at these relative paths, and the sum of their sizes in bytes."""
    digests = {path: sha256(folder / path) for path in paths}
    return digests, sum((folder / path).stat().st_size for path in paths)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not folder.is_dir() and (earlier := earlier_result(folder)):
        raise BundleError(
            f"{folder}: no such folder, since its replacing was interrupted; the earlier bundle is "
            f"{earlier}: rename it to {folder.name}"
        )
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: no such folder; `lvr-lite export CHECKPOINT BUNDLE` makes a bundle"
        )
    if not path.is_file():
        raise BundleError(
            f"{folder}: not a bundle ({MANIFEST} is missing); "
            f"`lvr-lite export CHECKPOINT {folder}` makes one"
        )
    try:
        data = read_object(path, "export again")
        version = data["version"]
        if version != VERSION:
            raise BundleError(
                f"{path}: bundle version {version}, this lvr-lite reads version {VERSION}: "
                "export again, or install the matching release"
            )
        manifest = Manifest.from_json(data)
        _check_values(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(
            f"{path}: a field is missing, unknown or wrong ({error}); export again"
        ) from error
    for name in GRAPHS:
        if name not in manifest.graphs:
            raise BundleError(f"{path}: graph {name} is missing; export again")
    for name in _digests(manifest):
        _inside(folder, name)
    return manifest


def _check_values(manifest: Manifest) -> None:
    """Raises ValueError, naming the field, for a value of another kind or beyond all use."""
    for name, most in LARGEST_SIZES.items():
        check_whole(f"decoder.{name}", getattr(manifest.decoder, name), 1, most)
    check_whole("latent.steps", manifest.latent.steps, 0, LARGEST_STEPS)
    check_number("latent.norm", manifest.latent.norm)
    tokens = asdict(manifest.tokens)
    for name, value in tokens.items():
        for token in value if name == "end" else [value]:
            check_whole(f"tokens.{name}", token, 0, manifest.decoder.vocab_size - 1)
    if not manifest.tokens.end:
        raise ValueError("tokens.end is empty")
    manifest.image.check()
    for name, kind in (("family", str), ("precision", str), ("chat_template", str)):
        if not isinstance(getattr(manifest, name), kind):
            raise ValueError(f"{name} must be text")
    for name in ("rope", "source", "parity"):
        if not isinstance(getattr(manifest, name), dict):
            raise ValueError(f"{name} must be an object")
    for name, graph in manifest.graphs.items():
        _check_graph_values(name, graph)


def _check_graph_values(name: str, graph: Graph) -> None:
    check_whole(f"graphs.{name}.bytes", graph.bytes, 0, 1 << 50)
    if not isinstance(graph.precision, str):
        raise ValueError(f"graphs.{name}.precision must be text")
    if not all(isinstance(digest, str) for digest in graph.files.values()):
        raise ValueError(f"graphs.{name}.files must give each file its sha256")
    for info in (*graph.inputs.values(), *graph.outputs.values()):
        axes = info.axes if isinstance(info.axes, list) else [None]
        if not all(isinstance(axis, str | int) for axis in axes) or not isinstance(info.dtype, str):
            raise ValueError(f"graphs.{name} has an end without dtype and axes")
