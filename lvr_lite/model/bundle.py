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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lvr_lite.errors import BundleError
from lvr_lite.files import sha256
from lvr_lite.model import families
from lvr_lite.model.families import ImageSpec
from lvr_lite.model.processor import Processor
from lvr_lite.model.spec import LatentSpec, TokenIds
from lvr_lite.sums import check_sums, files_below, write_sums

MANIFEST = "lvr.json"
VERSION = 1
TOKENIZER = "tokenizer.json"
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
            tokenizer=Tokenizer.from_file(str(self.folder / TOKENIZER)),
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
            path = self.folder / name
            if not path.resolve().is_relative_to(self.folder.resolve()):
                manifest = self.folder / MANIFEST
                raise BundleError(f"{manifest}: file {name} lies outside the bundle; do not use it")
            if not path.is_file():
                raise BundleError(f"{path}: missing; copy the whole bundle again, or export again")
            if sha256(path) != digest:
                raise BundleError(
                    f"{path}: changed or truncated (its sha256 is not the manifest's); "
                    "copy the bundle again, or export again"
                )
        # What the manifest vouches for was hashed above.
        check_sums(self.folder, known=digests, required=(MANIFEST, *digests))


def _digests(manifest: Manifest) -> dict[str, str]:
    """{path relative to the bundle: sha256} of every file that the manifest names."""
    digests = {p: h for graph in manifest.graphs.values() for p, h in graph.files.items()}
    return digests | {TOKENIZER: manifest.source["tokenizer_sha256"]}


def write_bundle_sums(folder: Path, manifest: Manifest) -> None:
    """Write SHA256SUMS over all that lies in a bundle. Comes last of its files."""
    write_sums(folder, files_below(folder), known=_digests(manifest))


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
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["version"]
        if version != VERSION:
            raise BundleError(
                f"{path}: bundle version {version}, this lvr-lite reads version {VERSION}: "
                "export again, or install the matching release"
            )
        manifest = Manifest.from_json(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}); export again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{path}: a field is missing or unknown ({error}); export again"
        ) from error
    for name in GRAPHS:
        if name not in manifest.graphs:
            raise BundleError(f"{path}: graph {name} is missing; export again")
    return manifest
