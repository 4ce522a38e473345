"""What `lvr-lite inspect` shows on a terminal. May import: rich, lvr_lite.commands.inspect."""

from __future__ import annotations

from collections import Counter

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
    return (
        graph.precision,
        _size(graph.bytes),
        f"[{colour}]{state}[/]",
        _ends(graph.inputs),
        _ends(graph.outputs),
    )


def _ends(tensors: dict[str, TensorInfo]) -> str:
    """Names of inputs or outputs, a run of numbered ones (the K/V of each layer) as one line."""
    counts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts = name.split(".")
        general = ".".join("N" if part.isdigit() else part for part in parts)
        axes = ", ".join(map(str, tensor.axes))
        # The bracket is escaped from rich's markup.
        counts[rf"{general} {tensor.dtype}\[{axes}]"] += 1
    lines = []
    for line, count in counts.items():
        lines.append(f"{line} × {count}" if count > 1 else line)
    return "\n".join(lines)


def _show_report(report: JsonObject, console: Console) -> None:
    """What quantization did: weights by graph, drift of the latent loop, and the search where there
    was one.
    """
    graphs = report.get("graphs", {})
    quantized = {name: graph for name, graph in graphs.items() if "what" in graph}
    if quantized:
        columns = ("graph", "weights", "as", "error", "worst layer", "size")
        table = _table("weights", *columns)
        for name, graph in quantized.items():
            table.add_row(name, *_weight_cells(graph))
        console.print(table)
        bits = f"{report['bits_per_weight']:.2f} bits a weight, scales included"
        console.print(f"decoder, embedding and head: {bits}", highlight=False)
    drift = report.get("drift") or {}
    layers = drift.get("layers")
    decoder = drift.get("decoder")
    if layers:
        errors = " ".join(f"{error:.2%}" for error in layers)
        console.print(f"error of each decoder layer on the same input: {errors}", highlight=False)
    if decoder:
        console.print(_drift(decoder))
    if "search" in report:
        console.print(_search(report["search"]))


def _weight_cells(graph: JsonObject) -> tuple[str, ...]:
    lines = [graph["what"], "; ".join(graph["schemes"])]
    if graph["shared"]:
        lines.append("bytes of embed_tokens")
    errors = graph["layers"]
    worst = "–"
    if errors:
        layer = max(errors, key=errors.__getitem__)
        worst = f"{layer} {errors[layer]:.2%}"
    before = _size(graph["bytes_before"])
    after = _size(graph["bytes"])
    return (
        str(graph["replaced"]),
        "\n".join(lines),
        f"{graph['weight_error']:.2%}",
        worst,
        f"{before} → {after}",
    )


def _search(search: JsonObject) -> Table:
    chosen = search["chosen"]
    eight = chosen["eight"]
    names = ", ".join(eight)
    written = {name: chosen[name] for name in ("bits", "kl", "drift")}
    facts = {
        "budget": search["budget"],
        "written": _words(written),
        "measured": f"{len(search['measured'])} candidates",
        "8 bits": f"{len(eight)} of {search['units']}: {names}",
    }
    return _facts(facts, title="search")


def _drift(drift: JsonObject) -> Table:
    columns = ("fed back: error", "cosine", "norm", "tokens fed: error", "cosine", "norm")
    after_prompt = f"after the prompt: {drift['prefill']:.2%}"
    title = f"latent steps against fp32, {drift['prompts']} prompts ({after_prompt})"
    table = _table(title, "step", *columns)
    fed_back = drift["fed_back"]
    token_fed = drift["token_fed"]
    for step in range(len(fed_back["relative"])):
        cells = _step_cells(fed_back, step) + _step_cells(token_fed, step)
        table.add_row(str(step + 1), *cells)
    return table


def _step_cells(drift: JsonObject, step: int) -> list[str]:
    error = drift["relative"][step]
    cosine = drift["cosine"][step]
    norm = drift["norm"][step]
    return [
        f"{error:.2%}",
        f"{cosine:.5f}",
        f"{norm:.4f}",
    ]


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
    known = {name: value for name, value in facts.items() if value}
    console.print(_facts(known))
    table = _table("weights", "weights", "parameters", "tensors", "types", "size")
    for name, file in contents.weights.items():
        types = [f"{dtype} {count:,}" for dtype, count in file.dtypes.items()]
        table.add_row(
            name,
            f"{file.parameters:,}",
            str(file.tensors),
            ", ".join(types),
            _size(file.bytes),
        )
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
        fields = [f"{key} {_words(field)}" for key, field in value.items()]
        return ", ".join(fields)
    if isinstance(value, list):
        return " ".join(map(_words, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _size(count: int) -> str:
    """Bytes in MB (1e6), or kB where that reads better."""
    if count >= 1e6:
        return f"{count / 1e6:,.1f} MB"
    return f"{count / 1e3:,.1f} kB"
