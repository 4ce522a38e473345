"""A bundle: the folder that passes from the workshop to the device. May import: the standard library and the core.

lvr.json          the manifest: everything a reader needs; nothing is inferred from file names
tokenizer.json    a `tokenizers` file
onnx/*.onnx       the graphs, each with its weights in *.onnx_data beside it
report.json       parity and errors, for people
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lvr_lite.errors import BundleError
from lvr_lite.latent import LatentSpec

MANIFEST, VERSION = "lvr.json", 1
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
GRAPHS = ("vision_encoder", "embed_tokens", "decoder", "lm_head")


@dataclass(frozen=True)
class Graph:
    """One ONNX graph. files: every file it needs, the .onnx first, relative to the bundle, each with its sha256; bytes: their sum, less
    what lies in another graph's file.

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


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def graph_files(folder: Path, paths: list[str]) -> dict[str, Any]:
    """`files` and `bytes` of a Graph for the files at these relative paths."""
    return {"files": {p: sha256(folder / p) for p in paths}, "bytes": sum((folder / p).stat().st_size for p in paths)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1), encoding="utf-8")


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path, check: bool = True) -> Manifest:
    """The manifest of a bundle; with `check`, every file is there and has the bytes that were written.

    Raises BundleError, naming the file, for a folder without a manifest, an unknown version, a missing, changed or truncated file.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; `lvr-lite export CHECKPOINT BUNDLE` makes a bundle")
    if not path.is_file():
        raise BundleError(f"{folder}: not a bundle ({MANIFEST} is missing); `lvr-lite export CHECKPOINT {folder}` makes one")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["version"]
        if version != VERSION:
            advice = "export again, or install the matching release"
            raise BundleError(f"{path}: bundle version {version}, this lvr-lite reads version {VERSION}: {advice}")
        graphs = {name: Graph(**graph) for name, graph in data.pop("graphs").items()}
        if not all(isinstance(graph.files, dict) and graph.files for graph in graphs.values()):
            raise TypeError("a graph without files")
        data["source"]["tokenizer_sha256"]
        manifest = Manifest(graphs=graphs, latent=LatentSpec.from_json(data.pop("latent")), **data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}); export again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: a field is missing or unknown ({error}); export again") from error
    missing = [name for name in GRAPHS if name not in manifest.graphs]
    if missing:
        raise BundleError(f"{path}: graph {missing[0]} is missing; export again")
    if check:
        check_files(folder, manifest)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError for the first file that is missing or does not have the sha256 of the manifest."""
    wanted = {p: h for graph in manifest.graphs.values() for p, h in graph.files.items()}
    wanted["tokenizer.json"] = manifest.source["tokenizer_sha256"]
    for name, digest in wanted.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"{folder / MANIFEST}: file {name} lies outside the bundle; do not use it")
        if not path.is_file():
            raise BundleError(f"{path}: missing; copy the whole bundle again, or export again")
        if sha256(path) != digest:
            raise BundleError(f"{path}: changed or truncated (its sha256 is not the manifest's); copy the bundle again, or export again")


@contextlib.contextmanager
def fresh_folder(target: Path, replaceable: str = MANIFEST) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name at the end; on any error nothing is left and `target` is as before.

    An existing target is replaced only where it is empty or holds the file `replaceable` (what an earlier run of the same command wrote).
    Raises BundleError where the target is something else, or where it cannot be written (a full disk, no permission).
    """
    target = target.resolve()  # a link stays a link to the new folder
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / replaceable).is_file())):
        raise BundleError(f"{target}: exists and is not an earlier result of this command; choose another folder, or remove it")
    staged: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-{os.getpid()}-", dir=target.parent))
        staged.chmod(0o755)
        yield staged
        _take_place(staged, target)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise BundleError(f"{target}: cannot be written ({error.strerror or error}); free some space or choose another folder") from error
    finally:
        if staged is not None and staged.exists():
            shutil.rmtree(staged, ignore_errors=True)


def _take_place(staged: Path, target: Path) -> None:
    """Rename `staged` to `target`; what was there goes last, and comes back where the renaming fails."""
    if not target.exists():
        staged.rename(target)
        return
    old = staged.with_name(staged.name + "-old")
    target.rename(old)
    try:
        staged.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _sweep(target: Path) -> None:
    """Removes what a killed run left beside `target` (its process is gone)."""
    for left in target.parent.glob(f".{target.name}.tmp-*"):
        pid = left.name.split(".tmp-")[1].split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc").exists():
            shutil.rmtree(left, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, whole or not at all. Raises BundleError on a full disk or a missing permission."""
    staged = path.parent / f".{path.name}.tmp-{os.getpid()}"  # "." and "/" have no name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            staged.write_text(content, encoding="utf-8")
        else:
            staged.write_bytes(content)
        staged.replace(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror or error}); free some space or choose another place") from error
    finally:
        with contextlib.suppress(OSError):  # it may never have been made; the error above is the one to tell
            staged.unlink(missing_ok=True)
