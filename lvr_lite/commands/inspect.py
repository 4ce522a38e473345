"""What is in a bundle or a checkpoint: graphs, precision, sizes, hashes, parity, parameters.

May import: the standard library, rich, the core.

Weights are not loaded: a safetensors header is JSON behind eight bytes of length
(huggingface.co/docs/safetensors), and is read by hand.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lvr_lite import files
from lvr_lite.errors import BundleError
from lvr_lite.model import bundle, checkpoint
from lvr_lite.model.bundle import Bundle

HEADER_LIMIT = 100 << 20  # bytes; the format's own limit
# What bitsandbytes stores beside a packed weight: statistics, not parameters.
STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
QUANT_STATE = ".quant_state.bitsandbytes__"


def describe(path: Path) -> dict[str, Any]:
    """What lies in the folder `path`, ready for JSON; "kind" is "bundle", "checkpoint" (a whole
    model) or "tuned checkpoint" (an adapter).

    Changed or missing files of a bundle are told, not raised. Raises BundleError for any other
    folder, and for files that cannot be read.
    """
    if bundle.is_bundle(path):
        return _describe_bundle(path)
    if path.is_dir() and checkpoint.is_checkpoint(path):
        return _describe_checkpoint(path)
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder; give a bundle or a checkpoint")
    raise BundleError(
        f"{path}: neither a bundle ({bundle.MANIFEST}) nor a checkpoint (config.json or {checkpoint.LVR_CONFIG})"
    )


# ---------------------------------------------------------------------------------------------------------------
# bundles


def _describe_bundle(folder: Path) -> dict[str, Any]:
    manifest = Bundle.open(folder, check=False).manifest
    graphs = {name: _describe_graph(folder, graph) for name, graph in manifest.graphs.items()}
    tokenizer = _file_state(folder / "tokenizer.json", manifest.source.get("tokenizer_sha256"))
    return {
        "kind": "bundle",
        "path": str(folder),
        "version": manifest.version,
        "family": manifest.family,
        "precision": manifest.precision,
        "manifest_sha256": files.sha256(folder / bundle.MANIFEST),
        "graphs": graphs,
        "bytes": sum(graph.bytes for graph in manifest.graphs.values()),
        "tokenizer": tokenizer,
        "intact": tokenizer == "ok"
        and all(graph["files_state"] == "ok" for graph in graphs.values()),
        "latent": manifest.latent.to_json(),
        "tokens": manifest.to_json()["tokens"],
        "image": manifest.image.to_json(),
        "decoder": asdict(manifest.decoder),
        "rope": manifest.rope,
        "source": manifest.source,
        "parity": manifest.parity,
        "report": _json(folder / "report.json"),
    }


def _describe_graph(folder: Path, graph: bundle.Graph) -> dict[str, Any]:
    states = {name: _file_state(folder / name, digest) for name, digest in graph.files.items()}
    bad = [f"{name} is {state}" for name, state in states.items() if state != "ok"]
    return {
        "precision": graph.precision,
        "bytes": graph.bytes,
        "files": graph.files,
        "files_state": "; ".join(bad) or "ok",
        "inputs": {name: asdict(port) for name, port in graph.inputs.items()},
        "outputs": {name: asdict(port) for name, port in graph.outputs.items()},
    }


def _file_state(path: Path, digest: str | None) -> str:
    if not path.is_file():
        return "missing"
    return "ok" if files.sha256(path) == digest else "changed"


# -----------------------------------------------------------------------------------------------------------
# checkpoints


def _describe_checkpoint(folder: Path) -> dict[str, Any]:
    tuned = _json(folder / checkpoint.LVR_CONFIG)
    config = _json(folder / "config.json")
    weights = {path.name: count_parameters(path) for path in sorted(folder.glob("*.safetensors"))}
    return {
        "kind": "tuned checkpoint" if tuned is not None else "checkpoint",
        "path": str(folder),
        "model_type": (config or {}).get("model_type"),
        "quantization": (config or {}).get("quantization_config"),
        "base": (tuned or {}).get("base"),
        "latent": (tuned or {}).get("latent"),
        "lvr_config": tuned,
        "adapter": _json(folder / "adapter_config.json"),
        "parameters": sum(found["parameters"] for found in weights.values()),
        "weights": weights,
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "files": {
            path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()
        },
    }


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: {tensor: {"dtype", "shape", "data_offsets"}}. Raises
    BundleError where it is not one.
    """
    try:
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > min(HEADER_LIMIT, path.stat().st_size):
                raise BundleError(
                    f"{path}: truncated, or not a safetensors file (its header would take {length} bytes)"
                )
            header = json.loads(f.read(length))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (struct.error, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: truncated, or not a safetensors file ({error})") from error
    if not isinstance(header, dict):
        raise BundleError(f"{path}: not a safetensors file (its header is not an object)")
    return header


def count_parameters(path: Path) -> dict[str, Any]:
    """Parameters of a safetensors file: {"parameters", "tensors", "dtypes": {dtype: parameters},
    "bytes"}.

    A weight that bitsandbytes packed counts two parameters a byte, under "4-bit"; the statistics
    beside it count none.
    """
    header = {name: tensor for name, tensor in read_header(path).items() if name != "__metadata__"}
    packed = {name.split(QUANT_STATE)[0] for name in header if QUANT_STATE in name}
    dtypes: dict[str, int] = {}
    for name, tensor in header.items():
        if QUANT_STATE in name or name.endswith(STATISTICS):
            continue
        dtype, count = ("4-bit", 2) if name in packed else (tensor["dtype"], 1)
        dtypes[dtype] = dtypes.get(dtype, 0) + count * math.prod(tensor["shape"])
    return {
        "parameters": sum(dtypes.values()),
        "tensors": len(header),
        "dtypes": dtypes,
        "bytes": path.stat().st_size,
    }


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no such file."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path}: must hold a JSON object")
    return data


# ------------------------------------------------------------------------------------------------------------
# for people


def render(description: dict[str, Any], console: Console) -> None:
    """Print what `describe` found."""
    console.print(f"[bold]{description['kind']}[/bold] {description['path']}", highlight=False)
    if description["kind"] == "bundle":
        _render_bundle(description, console)
    else:
        _render_checkpoint(description, console)


def _render_bundle(description: dict[str, Any], console: Console) -> None:
    facts = {
        "family": description["family"],
        "precision": description["precision"],
        "size": _size(description["bytes"]),
        "latent loop": _words(description["latent"]),
        "tokenizer": description["tokenizer"],
        "manifest": f"version {description['version']}, sha256 {description['manifest_sha256'][:16]}…",
        "made from": _words(description["source"]),
    }
    console.print(_facts(facts))
    table = Table(
        "graph",
        "precision",
        "size",
        "files",
        "inputs",
        "outputs",
        title="graphs",
        title_justify="left",
    )
    for name, graph in description["graphs"].items():
        state = (
            "[green]ok[/green]"
            if graph["files_state"] == "ok"
            else f"[red]{graph['files_state']}[/red]"
        )
        table.add_row(
            name,
            graph["precision"],
            _size(graph["bytes"]),
            state,
            _ports(graph["inputs"]),
            _ports(graph["outputs"]),
        )
    console.print(table)
    if description["parity"]:
        console.print(
            _facts(
                {name: _words(value) for name, value in description["parity"].items()},
                title="parity with torch, in float32",
            )
        )
    if description["report"]:
        _render_report(description["report"], console)
    if not description["intact"]:
        console.print(
            "[red]This bundle is not what was written: copy it again, or export again.[/red]"
        )


def _render_report(report: dict[str, Any], console: Console) -> None:
    """What quantization did: weights by graph, drift of the latent loop, and the search where there
    was one.
    """
    written = {name: graph for name, graph in report.get("graphs", {}).items() if "what" in graph}
    if written:
        table = Table(
            "graph",
            "weights",
            "as",
            "error",
            "worst layer",
            "size",
            title="weights",
            title_justify="left",
        )
        for name, graph in written.items():
            worst = max(graph["layers"].items(), key=lambda item: item[1], default=None)
            shown = f"{worst[0]} {worst[1]:.2%}" if worst else "–"
            how = f"{graph['what']}\n{'; '.join(graph['schemes'])}" + (
                "\nbytes of embed_tokens" if graph["shared"] else ""
            )
            sizes = f"{_size(graph['bytes_before'])} → {_size(graph['bytes'])}"
            table.add_row(
                name, str(graph["replaced"]), how, f"{graph['weight_error']:.2%}", shown, sizes
            )
        console.print(table)
        console.print(
            f"decoder, embedding and head: {report['bits_per_weight']:.2f} bits a weight, scales included",
            highlight=False,
        )
    drift = report.get("drift") or {}
    if drift.get("layers"):
        console.print(
            "error of each decoder layer on the same input: "
            + " ".join(f"{e:.2%}" for e in drift["layers"]),
            highlight=False,
        )
    if drift.get("decoder"):
        _render_drift(drift["decoder"], console)
    if "search" in report:
        chosen = report["search"]["chosen"]
        facts = {
            "budget": report["search"]["budget"],
            "written": _words({k: chosen[k] for k in ("bits", "kl", "drift")}),
        }
        eight = (
            f"{len(chosen['eight'])} of {report['search']['units']}: {', '.join(chosen['eight'])}"
        )
        console.print(
            _facts(
                {
                    **facts,
                    "measured": f"{len(report['search']['measured'])} candidates",
                    "8 bits": eight,
                },
                title="search",
            )
        )


def _render_drift(drift: dict[str, Any], console: Console) -> None:
    title = f"latent steps against fp32, {drift['prompts']} prompts (after the prompt: {drift['prefill']:.2%})"
    table = Table(
        "step",
        "fed back: error",
        "cosine",
        "norm",
        "tokens fed: error",
        "cosine",
        "norm",
        title=title,
        title_justify="left",
    )
    for i in range(len(drift["fed_back"]["relative"])):
        cells = []
        for feeding in ("fed_back", "token_fed"):
            one = drift[feeding]
            cells += [
                f"{one['relative'][i]:.2%}",
                f"{one['cosine'][i]:.5f}",
                f"{one['norm'][i]:.4f}",
            ]
        table.add_row(str(i + 1), *cells)
    console.print(table)


def _render_checkpoint(description: dict[str, Any], console: Console) -> None:
    adapter = description["adapter"] or {}
    facts = {
        "model type": description["model_type"],
        "base": description["base"],
        "latent loop": _words(description["latent"]) if description["latent"] else None,
        "adapter": _words(
            {
                k: adapter[k]
                for k in ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules")
                if k in adapter
            }
        ),
        "quantization": _words(description["quantization"])
        if description["quantization"]
        else None,
        "parameters": f"{description['parameters']:,}",
        "size": _size(description["bytes"]),
    }
    console.print(_facts({name: value for name, value in facts.items() if value}))
    table = Table(
        "weights", "parameters", "tensors", "types", "size", title="weights", title_justify="left"
    )
    for name, found in description["weights"].items():
        types = ", ".join(f"{dtype} {count:,}" for dtype, count in found["dtypes"].items())
        table.add_row(
            name, f"{found['parameters']:,}", str(found["tensors"]), types, _size(found["bytes"])
        )
    console.print(table)


def _facts(facts: dict[str, Any], title: str | None = None) -> Table:
    table = Table("", "", show_header=False, title=title, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


def _ports(ports: dict[str, dict[str, Any]]) -> str:
    """Names of inputs or outputs, a run of numbered ones (the K/V of each layer) as one line."""
    lines: dict[str, int] = {}
    for name, port in ports.items():
        general = ".".join("N" if part.isdigit() else part for part in name.split("."))
        line = f"{general} {port.get('dtype', '')}[{', '.join(str(axis) for axis in port.get('axes', []))}]"
        lines[line] = lines.get(line, 0) + 1
    return "\n".join(f"{line} × {n}" if n > 1 else line for line, n in lines.items()).replace(
        "[", r"\["
    )


def _words(value: Any) -> str:
    """A JSON value in a line or a few: lists and objects without their brackets, long numbers
    shortened.
    """
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(_words(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(count: int) -> str:
    """Bytes in MB (1e6), or kB where that reads better."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
