"""mixed: which layers get 8 bits and which 4, under a budget, by what that costs on a calibration
set. May import: onnx, numpy, matplotlib, the core.

All layers begin with 4 bits, rounded with GPTQ. Each unit (a weight, or in deep models that of
neighbouring layers) is then given 8 bits alone, and what this gains is measured: KL of the answers,
and drift of the latents through all their steps. Units enter by gain a byte; along that path some
candidates are measured whole, and the best within the budget is written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lvr_lite import terminal
from lvr_lite.errors import DataError, UsageError
from lvr_lite.export import onnxfile
from lvr_lite.generate.decode import Prompt
from lvr_lite.generate.onnx import OnnxRuntime, open_session
from lvr_lite.model.bundle import Bundle, Manifest
from lvr_lite.quant import calibrate
from lvr_lite.quant.calibrate import Products
from lvr_lite.quant.drift import LARGE
from lvr_lite.quant.quantize import (
    COMPACT,
    Plan,
    Scheme,
    Shared,
    check_source,
    convert,
    quantize_bundle,
    whole,
)
from lvr_lite.quant.tune import Tuning

UNITS, UNITS_LARGE = 72, 40  # measured one by one at most
# Larger blocks, or none of the zero points, leave more room for 8 bits, and ended worse on real
# weights (docs/results/quant.md).
FOUR = Scheme(bits=4, block=32, symmetric=False)
POINTS = 10  # of the path from 4 to 8 bits that are measured whole
PROMPTS, PROMPTS_LARGE = 64, 24
STEPS, STEPS_LARGE = (
    96,
    0,
)  # of training scales and norms after rounding (quant/tune.py); 80 s a step at 2B on 2 cores
SCORED_LARGE = 8  # prompts that each candidate answers
HEAD = "embedding and head"
SMALL_GRAPHS = ("embed_tokens", "lm_head")


def quantize_calibrated(
    source: Path,
    target: Path,
    precision: str,
    data: str,
    progress: Callable[[str], None],
    block: int | None = None,
    bits: float = 5.0,
    steps: int | None = None,
) -> dict[str, Any]:
    """Write the fp32 bundle `source` to `target` as "int4" or "mixed", its 4-bit weights rounded
    for what flows through them (GPTQ), scales and norms then trained.

    data: "scenes" or a file of samples to calibrate on. bits: of "mixed", a weight of decoder,
    embedding and head at most, scales included; vision has 8. steps: of that training; None takes
    STEPS, or STEPS_LARGE, and 0 leaves it out. Returns report.json. Raises UsageError for a budget
    below what 4 bits take, and as `quantize_bundle` does.
    """
    began = time.perf_counter()
    check_source(source, target, precision)
    plan = whole("int4", block)  # refuses a block that is none
    if data != "scenes" and not Path(data).is_file():
        raise UsageError(
            f"--calibration {data}: no such file; give scenes, a file of samples{', or none' if precision == 'int4' else ''}"
        )
    target.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=target.resolve().parent, prefix=f".{target.name}.tmp-{os.getpid()}-"
    ) as scratch:
        desk = Desk(source, Path(scratch), data, progress, steps=steps)
        if precision == "int4":
            progress(
                f"calibration: {len(desk.prompts)} prompts (`--calibration none` goes without: faster, and worse)"
            )
            products = desk.products()
            return quantize_bundle(
                source,
                target,
                "int4",
                progress,
                plan=replace(plan, products=products),
                tune=desk.tuning(products),
            )
        search = Search(source, desk, progress, block)
        return write_mixed(source, target, bits, search, progress) | {
            "search_seconds": round(time.perf_counter() - began, 1)
        }


class Desk:
    """What calibration works with: a runtime that reasons and answers, and prompts.

    The runtime is the fp32 bundle; of one larger than 4 GiB an int8 copy in `scratch`, since the
    fp32 one would fill a small machine.
    """

    def __init__(
        self,
        source: Path,
        scratch: Path,
        data: str,
        progress: Callable[[str], None],
        prompts: list[Prompt] | None = None,
        steps: int | None = None,
    ) -> None:
        manifest = Bundle.open(source, check=False).manifest
        self.source, self.scratch, self._progress = source, scratch, progress
        self.large = sum(graph.bytes for graph in manifest.graphs.values()) > LARGE
        self._steps = (STEPS_LARGE if self.large else STEPS) if steps is None else steps
        if self.large:
            progress(
                "calibration: an int8 copy reasons and answers, since fp32 would take too much memory"
            )
            quantize_bundle(source, scratch / "int8", "int8", lambda _: None)
        self.runtime = OnnxRuntime(Bundle.open(scratch / "int8" if self.large else source))
        self.prompts = prompts or calibrate.load_prompts(
            self.runtime, data, PROMPTS_LARGE if self.large else PROMPTS
        )

    def products(self) -> Products:
        return Products(self.runtime, self.prompts, self.source)

    def tuning(self, products: Products) -> Callable[[Path, Manifest], dict[str, Any]] | None:
        """What trains the scales and norms of a bundle that was rounded for these products; None
        where no steps are wanted. Raises DataError for a single prompt, which cannot be held out
        and trained on.
        """
        if not self._steps:
            return None
        if len(self.prompts) < 2:
            raise DataError(
                "training scales takes two prompts or more to calibrate on; give more samples, or --tune-steps 0"
            )

        def tune(folder: Path, manifest: Manifest) -> dict[str, Any]:
            done = Tuning(folder, manifest, self.runtime, products.readings()).run(self._steps)
            what = "kept" if done["kept"] else "no better, so not kept"
            self._progress(
                f"scales and norms: {self._steps} steps, loss held out {done['loss_before']:.2e} -> {done['loss_after']:.2e}, {what}"
            )
            return done

        return tune


def write_mixed(
    source: Path, target: Path, bits: float, search: Search, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Write what the search finds best within `bits` a weight; returns report.json, with "search":
    what was measured.
    """
    found = search.choose(bits)
    plan = found.pop("plan")
    report = quantize_bundle(source, target, "mixed", progress, plan=plan, tune=search.tuning)
    assert report["bits_per_weight"] <= bits + 1e-3, report["bits_per_weight"]
    chosen = found["chosen"]
    progress(
        f"{len(chosen['eight'])} of {found['units']} units have 8 bits: KL {chosen['kl']:.2e}, drift {chosen['drift']:.2e}"
    )
    report["search"] = found
    (target / "report.json").write_text(json.dumps(report, indent=1))
    draw(report["search"], target / "pareto.png")
    return report


@dataclass(frozen=True)
class Candidate:
    """Units of 8 bits, and what a bundle with these costs."""

    eight: frozenset[str]
    bits: float
    kl: float
    drift: float

    @property
    def loss(self) -> float:
        return self.kl + self.drift

    def to_json(self) -> dict[str, Any]:
        return {
            "eight": sorted(self.eight),
            "bits": round(self.bits, 4),
            "kl": self.kl,
            "drift": self.drift,
            "loss": self.loss,
        }


class Search:
    """Units of a bundle's decoder, embedding and head in 4 and 8 bits, and what mixtures of them
    cost.

    desk: its prompts are what weights are rounded for; the first `scored` of them, or those given,
    are answered by each candidate.
    """

    def __init__(
        self,
        source: Path,
        desk: Desk,
        progress: Callable[[str], None],
        block: int | None = None,
        scored: list[Prompt] | None = None,
    ) -> None:
        self._source, self._scratch, self._runtime = source, desk.scratch, desk.runtime
        self._manifest = Bundle.open(source, check=False).manifest
        self._prompts = scored or desk.prompts[: SCORED_LARGE if desk.large else None]
        self._finest = UNITS_LARGE if desk.large else UNITS
        self._reference = calibrate.listen(self._runtime, self._prompts)
        choices, latents = (
            sum(numbers)
            for numbers in zip(*((len(s.choices), s.latents) for s in self._reference), strict=True)
        )
        progress(
            f"calibration: {len(desk.prompts)} prompts; {choices} choices and {latents} latents to keep"
        )
        self._four, self._products = replace(FOUR, block=block or FOUR.block), desk.products()
        self.tuning = desk.tuning(self._products)
        self._rounded = self._scratch / "rounded"
        if self._rounded.exists():  # of an earlier search, on other prompts perhaps
            shutil.rmtree(self._rounded)
        self._rounded.mkdir()
        self._sizes: dict[
            tuple[str, int], tuple[int, int]
        ] = {}  # bytes and weights of a graph in so many bits
        self._variants = {bits: self._write(bits) for bits in (4, 8)}
        self._units = self._group()
        self._extra = self._costs()
        self.measured: list[Candidate] = []

    def _write(self, bits: int) -> dict[str, onnx.ModelProto]:
        """All graphs but vision in one precision, into the scratch folder."""
        scheme = self._four if bits == 4 else COMPACT
        plan = Plan(
            dict.fromkeys((*SMALL_GRAPHS, "decoder"), scheme),
            {},
            self._products if bits == 4 else {},
            self._rounded,
        )
        made, shared, at = {}, Shared(), self._source / "onnx"
        for name in ("decoder", *SMALL_GRAPHS):  # in the order of layers, as products come
            model = onnxfile.load(self._source / self._manifest.graphs[name].path)
            with onnxfile.data_file(self._scratch / f"{name}-{bits}.onnx") as file:
                done = convert(
                    name, model, lambda tensor: onnxfile.read(tensor, at), file, plan, shared
                )
            self._sizes[name, bits] = (
                done["bytes_of_weights"],
                0 if done["shared"] else done["weights"],
            )
            made[name] = model
        return made

    def _group(self) -> dict[str, list[str]]:
        """{unit: nodes of the decoder}: a weight; in a deep model the same weight of so many
        neighbouring layers that there are no more than UNITS. A layer's own weights never go
        together: its values, a small part of it, gain several times what its largest do.
        """
        nodes = [
            node.name
            for node in self._variants[4]["decoder"].graph.node
            if node.op_type == "MatMulNBits"
        ]
        span = -(-len(nodes) // self._finest)
        units: dict[str, list[str]] = {}
        for name in nodes:
            path = name.split("/")[0].removeprefix("language_model.")
            layer = re.search(r"layers\.(\d+)", path)
            first = int(layer[1]) // span * span if layer and span > 1 else None
            unit = (
                path
                if layer is None or first is None
                else path.replace(layer[0], f"layers.{first}-{first + span - 1}")
            )
            units.setdefault(unit, []).append(name)
        return units

    def choose(self, budget: float) -> dict[str, Any]:
        """The best of what was measured within `budget` bits a weight: its plan, and everything
        measured so far.
        """
        costs = self._extra
        base = self._measure(frozenset())
        if base.bits > budget:
            raise UsageError(
                f"--bits {budget:g}: 4 bits take {base.bits:.2f} a weight here, scales included; give at least that, or a larger --block"
            )
        gains = {}
        for unit in terminal.bar(list(costs), "8 bits for one unit"):
            gains[unit] = base.loss - self._measure(frozenset([unit])).loss
        order = sorted(costs, key=lambda unit: -gains[unit] / costs[unit])
        path = [frozenset(order[:n]) for n in range(1, len(order) + 1)]
        within = [eight for eight in path if self._bits(eight) <= budget]
        # beyond the first unit that does not fit, smaller ones may
        eight: set[str] = set()
        for unit in order:
            if gains[unit] > 0 and self._bits(frozenset(eight | {unit})) <= budget:
                eight.add(unit)
        whole = (
            [frozenset(eight)]
            + within[-1:]
            + [path[int(i)] for i in np.linspace(0, len(path) - 1, POINTS)]
        )
        for candidate in terminal.bar(list(dict.fromkeys(whole)), "candidates"):
            self._measure(candidate)
        chosen = min((c for c in self.measured if c.bits <= budget), key=lambda c: c.loss)
        return {
            "plan": self._plan(chosen.eight), "chosen": chosen.to_json(), "budget": budget, "units": len(costs),
            "measured": [c.to_json() for c in self.measured], "calibration": {"prompts": len(self._prompts)},
        }  # fmt: skip

    def _costs(self) -> dict[str, int]:
        """Bytes more that each unit takes with 8 bits."""
        taken: dict[int, dict[str, int]] = {}  # bytes of each node's weight
        for bits, graphs in self._variants.items():
            sizes = {t.name: onnxfile.size(t) for t in graphs["decoder"].graph.initializer}
            sizes |= {
                n.output[0]: sizes[n.input[0]]
                for n in graphs["decoder"].graph.node
                if n.op_type == "Cast" and n.input[0] in sizes
            }
            taken[bits] = {
                n.name: sum(sizes.get(name, 0) for name in n.input[1:])
                for n in graphs["decoder"].graph.node
            }
        costs = {
            unit: sum(taken[8][name] - taken[4][name] for name in names)
            for unit, names in self._units.items()
        }
        costs[HEAD] = sum(
            self._sizes[name, 8][0] - self._sizes[name, 4][0] for name in SMALL_GRAPHS
        )
        return costs

    def _bits(self, eight: frozenset[str]) -> float:
        small = sum(self._sizes[name, 4][0] for name in (*SMALL_GRAPHS, "decoder"))
        weights = sum(self._sizes[name, 4][1] for name in (*SMALL_GRAPHS, "decoder"))
        return 8 * (small + sum(self._extra[unit] for unit in eight)) / weights

    def _measure(self, eight: frozenset[str]) -> Candidate:
        known = next((c for c in self.measured if c.eight == eight), None)
        if known is not None:
            return known
        head = self._variants[8 if HEAD in eight else 4]
        graphs = {
            "decoder": self._mixture(eight),
            "embed": head["embed_tokens"],
            "head": head["lm_head"],
        }
        sessions = {
            name: open_session(model.SerializeToString(), self._scratch)
            for name, model in graphs.items()
        }
        lost = calibrate.loss(self._runtime.with_graphs(**sessions), self._prompts, self._reference)
        self.measured.append(Candidate(eight, self._bits(eight), lost["kl"], lost["drift"]))
        return self.measured[-1]

    def _mixture(self, eight: frozenset[str]) -> onnx.ModelProto:
        """The decoder with the nodes of these units from the 8-bit graph and all others from the
        4-bit one.
        """
        wide = {name for unit in eight for name in self._units.get(unit, ())}
        model = onnx.ModelProto()
        model.CopyFrom(self._variants[4]["decoder"])
        others = {node.name: node for node in self._variants[8]["decoder"].graph.node}
        for node in model.graph.node:
            if node.name in wide:
                node.CopyFrom(others[node.name])
        read = {
            name: 8 if node.name in wide else 4 for node in model.graph.node for name in node.input
        }
        read |= {
            node.input[0]: read[node.output[0]]
            for node in model.graph.node
            if node.op_type == "Cast" and node.output[0] in read
        }
        tensors = {
            bits: {t.name: t for t in self._variants[bits]["decoder"].graph.initializer}
            for bits in (4, 8)
        }
        del model.graph.initializer[:]
        model.graph.initializer.extend(
            tensors[bits][name] for name, bits in read.items() if name in tensors[bits]
        )
        return model

    def _plan(self, eight: frozenset[str]) -> Plan:
        wide = {name.split("/")[0] for unit in eight for name in self._units.get(unit, ())}
        by_weight = {f"decoder/{name}.weight": COMPACT for name in wide}
        small = COMPACT if HEAD in eight else self._four
        schemes = {
            "vision_encoder": COMPACT,
            "embed_tokens": small,
            "lm_head": small,
            "decoder": self._four,
        }
        return Plan(schemes, by_weight, self._products, self._rounded)


def draw(search: dict[str, Any], path: Path) -> None:
    """A figure (PNG) of size against loss: each candidate that was measured, and the best ones of
    every size.
    """
    from matplotlib.figure import Figure

    found = sorted((c["bits"], c["loss"]) for c in search["measured"])
    front, best = [], float("inf")
    for size, lost in found:
        if lost < best:
            front.append((size, lost))
            best = lost
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    bits, losses = zip(*found, strict=True)
    axes.scatter(bits, losses, s=14, color="0.6", label="measured")
    axes.plot(*zip(*front, strict=True), marker="o", label="best of its size")
    axes.scatter(
        [search["chosen"]["bits"]],
        [search["chosen"]["loss"]],
        s=90,
        facecolor="none",
        edgecolor="red",
        label="written",
        zorder=3,
    )
    axes.axvline(search["budget"], linestyle=":", color="0.5")
    axes.set(
        xlabel="bits a weight (decoder, embedding, head; scales included)",
        ylabel="KL of answers + drift of latents",
        yscale="log",
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
