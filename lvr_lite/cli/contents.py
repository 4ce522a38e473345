"""What `lvr-lite inspect` shows on a terminal. May import: rich, lvr_lite.commands.inspect."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lvr_lite.commands.inspect import OK, BundleContents, CheckpointContents
from lvr_lite.files import JsonObject
from lvr_lite.model.bundle import Graph, TensorInfo

ADAPTER = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules")


def show(contents: BundleContents | CheckpointContents, console: Console) -> None:
    console.print(f"[bold]{contents.kind}[/bold] {contents.folder}", highlight=False)
    if isinstance(contents, BundleContents):
        _show_bundle(contents, console)
    else:
        _show_checkpoint(contents, console)


def _show_bundle(contents: BundleContents, console: Console) -> None:
    manifest = contents.manifest
    facts = {
        "family": manifest.family,
        "precision": manifest.precision,
        "size": _size(contents.bytes),
        "latent loop": _words(manifest.latent.to_json()),
        "tokenizer": contents.tokenizer_state,
        "manifest": f"version {manifest.version}, sha256 {contents.manifest_sha256[:16]}…",
        "made from": _words(manifest.source),
    }
    console.print(_facts(facts))
    table = _table("graphs", "graph", "precision", "size", "files", "inputs", "outputs")
    for name, graph in manifest.graphs.items():
        table.add_row(name, *_graph_cells(graph, contents.graph_states[name]))
    console.print(table)
    if manifest.parity:
        parity = {name: _words(value) for name, value in manifest.parity.items()}
        console.print(_facts(parity, title="parity with torch, in float32"))
    if contents.report:
        _show_report(contents.report, console)
    if not contents.intact:
        console.print(
            "[red]This bundle is not what was written: copy it again, or export again.[/red]"
        )


def _graph_cells(graph: Graph, state: str) -> tuple[str, ...]:
    colour = "green" if state == OK else "red"
    ends = _ends(graph.inputs), _ends(graph.outputs)
    return graph.precision, _size(graph.bytes), f"[{colour}]{state}[/]", *ends


def _ends(tensors: dict[str, TensorInfo]) -> str:
    """Names of inputs or outputs, a run of numbered ones (the K/V of each layer) as one line."""
    lines: dict[str, int] = {}
    for name, tensor in tensors.items():
        general = ".".join("N" if part.isdigit() else part for part in name.split("."))
        # The bracket is escaped from rich's markup.
        line = rf"{general} {tensor.dtype}\[{', '.join(map(str, tensor.axes))}]"
        lines[line] = lines.get(line, 0) + 1
    return "\n".join(f"{line} × {n}" if n > 1 else line for line, n in lines.items())


def _show_report(report: JsonObject, console: Console) -> None:
    """What quantization did: weights by graph, drift of the latent loop, and the search where there
    was one.
    """
    quantized = {name: graph for name, graph in report.get("graphs", {}).items() if "what" in graph}
    if quantized:
        columns = ("graph", "weights", "as", "error", "worst layer", "size")
        table = _table("weights", *columns)
        for name, graph in quantized.items():
            table.add_row(name, *_weight_cells(graph))
        console.print(table)
        bits = f"{report['bits_per_weight']:.2f} bits a weight, scales included"
        console.print(f"decoder, embedding and head: {bits}", highlight=False)
    drift = report.get("drift") or {}
    if drift.get("layers"):
        errors = " ".join(f"{error:.2%}" for error in drift["layers"])
        console.print(f"error of each decoder layer on the same input: {errors}", highlight=False)
    if drift.get("decoder"):
        console.print(_drift(drift["decoder"]))
    if "search" in report:
        console.print(_search(report["search"]))


def _weight_cells(graph: JsonObject) -> tuple[str, ...]:
    worst = max(graph["layers"].items(), key=lambda item: item[1], default=None)
    lines = [graph["what"], "; ".join(graph["schemes"])]
    if graph["shared"]:
        lines.append("bytes of embed_tokens")
    return (
        str(graph["replaced"]),
        "\n".join(lines),
        f"{graph['weight_error']:.2%}",
        f"{worst[0]} {worst[1]:.2%}" if worst else "–",
        f"{_size(graph['bytes_before'])} → {_size(graph['bytes'])}",
    )


def _search(search: JsonObject) -> Table:
    chosen = search["chosen"]
    eight = chosen["eight"]
    facts = {
        "budget": search["budget"],
        "written": _words({name: chosen[name] for name in ("bits", "kl", "drift")}),
        "measured": f"{len(search['measured'])} candidates",
        "8 bits": f"{len(eight)} of {search['units']}: {', '.join(eight)}",
    }
    return _facts(facts, title="search")


def _drift(drift: JsonObject) -> Table:
    columns = ("fed back: error", "cosine", "norm", "tokens fed: error", "cosine", "norm")
    after_prompt = f"after the prompt: {drift['prefill']:.2%}"
    title = f"latent steps against fp32, {drift['prompts']} prompts ({after_prompt})"
    table = _table(title, "step", *columns)
    for step in range(len(drift["fed_back"]["relative"])):
        cells = []
        for feeding in (drift["fed_back"], drift["token_fed"]):
            cells.append(f"{feeding['relative'][step]:.2%}")
            cells.append(f"{feeding['cosine'][step]:.5f}")
            cells.append(f"{feeding['norm'][step]:.4f}")
        table.add_row(str(step + 1), *cells)
    return table


def _show_checkpoint(contents: CheckpointContents, console: Console) -> None:
    model = contents.facts
    adapter = contents.adapter or {}
    facts = {
        "model type": model["model_type"],
        "base": model["base"],
        "latent loop": _words(model["latent"] or {}),
        "adapter": _words({name: adapter[name] for name in ADAPTER if name in adapter}),
        "quantization": _words(model["quantization"] or {}),
        "parameters": f"{model['parameters']:,}",
        "size": _size(contents.bytes),
    }
    console.print(_facts({name: value for name, value in facts.items() if value}))
    table = _table("weights", "weights", "parameters", "tensors", "types", "size")
    for name, file in contents.weights.items():
        types = ", ".join(f"{dtype} {count:,}" for dtype, count in file.dtypes.items())
        counts = f"{file.parameters:,}", str(file.tensors)
        table.add_row(name, *counts, types, _size(file.bytes))
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left")


def _facts(facts: JsonObject, title: str | None = None) -> Table:
    table = Table("", "", show_header=False, title=title, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


def _words(value: object) -> str:
    """A JSON value in a line or a few: lists and objects without their brackets, long numbers
    shortened.
    """
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(_words(v) for v in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _size(count: int) -> str:
    """Bytes in MB (1e6), or kB where that reads better."""
    if count >= 1e6:
        return f"{count / 1e6:,.1f} MB"
    return f"{count / 1e3:,.1f} kB"
