"""An fp32 bundle written in another precision: int8, int4 or mixed integers, or fp16. May import:
onnx, onnxruntime, numpy, torch and what stands above `quant`.

    source = Bundle.open(Path("bundles/first-fp32"))
    quantize_bundle(source, Path("bundles/first-int8"), "int8", print)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx

from lvr_lite import files
from lvr_lite.errors import BundleError, UsageError
from lvr_lite.export import onnxfile
from lvr_lite.export.onnxfile import DataFile
from lvr_lite.files import JsonObject
from lvr_lite.model.bundle import (
    MANIFEST,
    TOKENIZER,
    Bundle,
    Graph,
    Manifest,
    write_bundle_sums,
    write_manifest,
)
from lvr_lite.quant import drift, half, pareto
from lvr_lite.quant.form import check_form
from lvr_lite.quant.integers import EmbeddingTable, IntegerGraph, Read
from lvr_lite.quant.reports import (
    Conversion,
    Drift,
    GraphReport,
    QuantizationReport,
    SearchReport,
    TuningReport,
)
from lvr_lite.quant.schemes import RoundingPlan, plan_of
from lvr_lite.quant.tune import Tuner
from lvr_lite.system import peak_rss_mb

PRECISIONS = ("int8", "int4", "mixed", "fp16")
# GPTQ's products come layer by layer, and those of the head last.
ORDER = ("vision_encoder", "decoder", "embed_tokens", "lm_head")


class Converter:
    """Rewrites the weights of a bundle's graphs, one graph after another; the head may share the
    embedding's bytes. `lvr_lite.export.write.write_bundle` calls it for each graph.

    plan: how weights become integers; None turns graphs into fp16.
    """

    def __init__(self, plan: RoundingPlan | None) -> None:
        self._plan = plan
        self._table: EmbeddingTable | None = None

    def convert(
        self,
        graph: str,
        model: onnx.ModelProto,
        read: Read,
        data: DataFile,
    ) -> Conversion:
        """`model` is changed in place, see `IntegerGraph` and `half.convert`."""
        if self._plan is None:
            return half.convert(model, read, data)
        integer_graph = IntegerGraph(
            name=graph, model=model, read=read, data=data, plan=self._plan, table=self._table
        )
        conversion = integer_graph.convert()
        self._table = integer_graph.table
        return conversion

    def __call__(
        self,
        graph: str,
        model: onnx.ModelProto,
        read: Read,
        data: DataFile,
        origins: Mapping[str, object],  # noqa: ARG002
    ) -> JsonObject:
        return self.convert(graph, model, read, data).to_json()


def quantize_bundle(
    source: Bundle,
    target: Path,
    precision: str,
    progress: Callable[[str], None],
    block: int | None = None,
    plan: RoundingPlan | None = None,
    tuner: Tuner | None = None,
    search: SearchReport | None = None,
) -> QuantizationReport:
    """Write an fp32 bundle to `target` with other weights.

    source: was opened with `check`; its files are not hashed again.
    precision: "int8" (all weights in 8 bits), "int4" (the decoder in 4 bits; vision, embedding and
        head in 8), "fp16", or, with a `plan`, "mixed" (see `lvr_lite.quant.search`).
    progress: is told one line a graph, and one at the end.
    block: values that share a scale where weights have 4 bits.
    plan: how each weight is rounded; None takes that of `precision` and `block`.
    tuner: trains the scales and norms of the new decoder.
    search: what found the plan of "mixed"; report.json and pareto.png show it.
    Returns what report.json says. Raises UsageError for another precision, BundleError where
    `source` is not an fp32 bundle, OutputError where `target` cannot be written; an earlier bundle
    at `target` then stays as it was.
    """
    began = time.perf_counter()
    check_source(source, target, precision)
    if plan is None and precision != "fp16":
        plan = plan_of(precision, block)
    files.check_free_space(target, source.bytes // (2 if precision == "fp16" else 3))
    converter = Converter(plan)
    graphs: dict[str, Graph] = {}
    reports: dict[str, GraphReport] = {}
    with files.fresh_folder(target, MANIFEST) as folder:
        (folder / "onnx").mkdir()
        for name in ORDER:
            before = source.manifest.graphs[name]
            conversion = _write_graph(source, name, folder, converter)
            graphs[name] = onnxfile.describe(folder, before.path, conversion.precision)
            reports[name] = GraphReport(conversion, before.bytes, graphs[name].bytes)
            progress(reports[name].line(name))
        (folder / TOKENIZER).write_bytes((source.folder / TOKENIZER).read_bytes())
        written = Bundle(folder, _manifest(source.manifest, graphs, precision))
        tuning = None
        if tuner is not None:
            tuning = tuner.tune(written)
            decoder = graphs["decoder"]
            graphs["decoder"] = onnxfile.describe(folder, decoder.path, decoder.precision)
            written = written.with_manifest(graphs=graphs)
        write_manifest(folder, written.manifest)
        check_form(written)
        drifted = drift.measure(source, written)
        report = _report(source, precision, reports, drifted, tuning)
        drift.draw({precision: drifted}, folder / "drift.png")
        if search is not None:
            seconds = round(time.perf_counter() - began, 1)
            report = replace(report, search=search, seconds=seconds, peak_rss_mb=peak_rss_mb())
            pareto.draw(search, folder / "pareto.png")
        write_report(folder, report)
        write_bundle_sums(folder, written.manifest)
    progress(
        f"{precision}: {report.bytes_before / 1e6:.1f} MB -> {report.bytes / 1e6:.1f} MB, "
        f"{report.bits_per_weight:.2f} bits a weight"
    )
    seconds = round(time.perf_counter() - began, 1)
    return replace(report, seconds=seconds, peak_rss_mb=peak_rss_mb())


def check_precision(precision: str) -> None:
    """Raises UsageError for a precision that an fp32 bundle cannot be written in."""
    if precision == "exact":
        raise UsageError(
            "precision exact: is written from the checkpoint, whose 4-bit base an fp32 bundle no "
            "longer has (`lvr-lite export`)"
        )
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision!r} is not known; quantize writes {', '.join(PRECISIONS)}"
        )


def check_source(source: Bundle, target: Path, precision: str) -> None:
    """Raises UsageError and BundleError as `quantize_bundle`."""
    check_precision(precision)
    if source.manifest.precision != "fp32":
        raise BundleError(
            f"{source.folder}: its precision is {source.manifest.precision}; quantize starts from "
            "an fp32 bundle (`lvr-lite export`)"
        )
    if target.resolve() == source.folder.resolve():
        raise BundleError(
            f"{target}: is the source itself; choose another folder for the quantized bundle"
        )


def write_report(folder: Path, report: QuantizationReport) -> None:
    text = json.dumps(report.to_json(), indent=1)
    (folder / "report.json").write_text(text, encoding="utf-8", newline="\n")


def _write_graph(
    source: Bundle,
    name: str,
    folder: Path,
    converter: Converter,
) -> Conversion:
    file = source.path(name)
    path = folder / source.manifest.graphs[name].path
    model = onnxfile.load(file)
    read = partial(onnxfile.read, folder=file.parent)
    with onnxfile.data_file(path) as data:
        conversion = converter.convert(name, model, read, data)
    path.write_bytes(model.SerializeToString())
    return conversion


def _manifest(manifest: Manifest, graphs: dict[str, Graph], precision: str) -> Manifest:
    """The source's manifest with other graphs, and the hashes of those that they come from."""
    origin = {name: next(iter(graph.files.values())) for name, graph in manifest.graphs.items()}
    return replace(
        manifest,
        precision=precision,
        graphs=graphs,
        source={**manifest.source, "quantized_from": origin},
    )


def _report(
    source: Bundle,
    precision: str,
    graphs: dict[str, GraphReport],
    drifted: Drift,
    tuning: TuningReport | None,
) -> QuantizationReport:
    counted = [graph.conversion for name, graph in graphs.items() if name != "vision_encoder"]
    # A head that reads the embedding's bytes has no weights of its own.
    weights = sum(conversion.weights for conversion in counted if not conversion.shared)
    bits = 8 * sum(conversion.bytes_of_weights for conversion in counted) / max(weights, 1)
    return QuantizationReport(
        precision=precision,
        bytes_before=source.bytes,
        bytes=sum(graph.bytes for graph in graphs.values()),
        bits_per_weight=round(bits, 3),
        graphs=graphs,
        drift=drifted,
        parity=source.manifest.parity,
        tuning=tuning,
    )
