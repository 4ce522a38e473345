"""What is in a bundle or a checkpoint: graphs, precision, sizes, hashes, parity, parameters. May
import: the standard library, lvr_lite.model.

Weights are not loaded, only the headers of their files.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from lvr_lite.errors import BundleError
from lvr_lite.files import JsonObject, sha256
from lvr_lite.model import bundle, checkpoint
from lvr_lite.model.bundle import Bundle, Manifest
from lvr_lite.model.json_files import read_object
from lvr_lite.model.weight_files import read_header

# What bitsandbytes stores beside a packed weight: statistics, not parameters.
STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
QUANT_STATE = ".quant_state.bitsandbytes__"
OK = "ok"


@dataclass(frozen=True)
class BundleContents:
    """What lies in a bundle.

    manifest_sha256: of lvr.json, which names the bundle.
    graph_states: for each graph "ok", or which of its files are missing or changed.
    tokenizer_state: "ok", "missing" or "changed".
    report: report.json; None without one.
    """

    kind: ClassVar[str] = "bundle"
    folder: Path
    manifest: Manifest
    manifest_sha256: str
    graph_states: dict[str, str]
    tokenizer_state: str
    report: JsonObject | None

    @property
    def bytes(self) -> int:
        return Bundle(self.folder, self.manifest).bytes

    @property
    def intact(self) -> bool:
        """Whether every file has the bytes that were written."""
        return {self.tokenizer_state, *self.graph_states.values()} == {OK}

    def to_json(self) -> JsonObject:
        manifest = self.manifest.to_json()
        del manifest["chat_template"]
        for name, state in self.graph_states.items():
            manifest["graphs"][name]["files_state"] = state
        own = {
            "schema": "lvr-lite/inspect",
            "kind": self.kind,
            "path": str(self.folder),
            "manifest_sha256": self.manifest_sha256,
            "bytes": self.bytes,
            "tokenizer": self.tokenizer_state,
            "intact": self.intact,
            "report": self.report,
        }
        return own | manifest


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file.

    dtypes: parameters by dtype. A weight that bitsandbytes packed counts two parameters a byte,
        under "4-bit"; the statistics beside it count none.
    """

    tensors: int
    dtypes: dict[str, int]
    bytes: int

    @property
    def parameters(self) -> int:
        return sum(self.dtypes.values())

    def to_json(self) -> JsonObject:
        return {"parameters": self.parameters, **asdict(self)}


@dataclass(frozen=True)
class CheckpointContents:
    """What lies in the folder of a whole model, or of an adapter that was tuned over one.

    config, tuned, adapter: config.json, lvr_config.json and adapter_config.json; None where the
        folder has no such file.
    weights: by the name of the file.
    files: bytes of every file in the folder.
    """

    folder: Path
    config: JsonObject | None
    tuned: JsonObject | None
    adapter: JsonObject | None
    weights: dict[str, WeightFile]
    files: dict[str, int]

    @property
    def kind(self) -> str:
        if self.tuned is None:
            return "checkpoint"
        return "tuned checkpoint"

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @cached_property
    def facts(self) -> JsonObject:
        """What both configurations say of the model, by the names of `to_json`."""
        config = self.config or {}
        tuned = self.tuned or {}
        return {
            "model_type": config.get("model_type"),
            "base": tuned.get("base"),
            "latent": tuned.get("latent"),
            "quantization": config.get("quantization_config"),
            "parameters": sum(file.parameters for file in self.weights.values()),
        }

    def to_json(self) -> JsonObject:
        return {
            "schema": "lvr-lite/inspect",
            "version": 1,
            "kind": self.kind,
            "path": str(self.folder),
            **self.facts,
            "lvr_config": self.tuned,
            "adapter": self.adapter,
            "weights": {name: file.to_json() for name, file in self.weights.items()},
            "bytes": self.bytes,
            "files": self.files,
        }


def inspect(model: str | Path) -> BundleContents | CheckpointContents:
    """What lies in a bundle, or in a checkpoint: a folder, `tiny` or a hub id.

    Files of a bundle that are missing or changed are reported, not refused. Raises BundleError for
    any other folder, and for files that cannot be read.
    """
    folder = Path(model)
    if bundle.is_bundle(folder):
        return _bundle(folder)
    folder = checkpoint.resolve(str(model))
    if not checkpoint.is_checkpoint(folder):
        raise BundleError(
            f"{folder}: neither a bundle ({bundle.MANIFEST}) nor a checkpoint "
            f"(config.json or {checkpoint.LVR_CONFIG})"
        )
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return CheckpointContents(
        folder=folder,
        config=_json(folder / "config.json"),
        tuned=_json(folder / checkpoint.LVR_CONFIG),
        adapter=_json(folder / "adapter_config.json"),
        weights={p.name: read_weights(p) for p in paths if p.suffix == ".safetensors"},
        files={p.name: p.stat().st_size for p in paths},
    )


def _bundle(folder: Path) -> BundleContents:
    manifest = Bundle.open(folder, check=False).manifest
    tokenizer = folder / bundle.TOKENIZER
    return BundleContents(
        folder=folder,
        manifest=manifest,
        manifest_sha256=sha256(folder / bundle.MANIFEST),
        graph_states={name: _state(folder, graph.files) for name, graph in manifest.graphs.items()},
        tokenizer_state=_file_state(tokenizer, manifest.source.get("tokenizer_sha256")),
        report=_json(folder / "report.json"),
    )


def _state(folder: Path, digests: dict[str, str]) -> str:
    states = {name: _file_state(folder / name, digest) for name, digest in digests.items()}
    return "; ".join(f"{name} is {state}" for name, state in states.items() if state != OK) or OK


def _file_state(path: Path, digest: str | None) -> str:
    if not path.is_file():
        return "missing"
    if sha256(path) != digest:
        return "changed"
    return OK


def read_weights(path: Path) -> WeightFile:
    """What a safetensors file holds. Raises BundleError as `read_header`."""
    header = {name: tensor for name, tensor in read_header(path).items() if name != "__metadata__"}
    packed = {name.split(QUANT_STATE)[0] for name in header if QUANT_STATE in name}
    dtypes: dict[str, int] = {}
    for name, tensor in header.items():
        if QUANT_STATE in name or name.endswith(STATISTICS):
            continue
        dtype, count = ("4-bit", 2) if name in packed else (tensor["dtype"], 1)
        dtypes[dtype] = dtypes.get(dtype, 0) + count * math.prod(tensor["shape"])
    return WeightFile(len(header), dtypes, path.stat().st_size)


def _json(path: Path) -> JsonObject | None:
    """The object in a JSON file; None where there is no such file."""
    try:
        return read_object(path, "copy it again")
    except FileNotFoundError:
        return None
