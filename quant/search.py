"""mixed: which weights get 8 bits and which 4, under a budget, by what that costs on calibration
prompts. May import: onnx, numpy and what stands above `quant`.

All weights begin with 4 bits, rounded with GPTQ. Each unit (a weight, or in deep models that of
neighbouring layers) is given 8 bits alone, and what this gains is measured: KL of the answers, and
drift of the latents through all their steps. Units enter by gain a byte; along that path some
candidates are measured whole, and the best within the budget is written.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnx

from lvr_lite import terminal
from lvr_lite.errors import UsageError
from lvr_lite.export import onnxfile
from lvr_lite.generate.decode import Prompt
from lvr_lite.generate.onnx import open_session
from lvr_lite.quant.answers import answer_loss, reference_answers
from lvr_lite.quant.calibration import Calibration
from lvr_lite.quant.products import Products
from lvr_lite.quant.quantize import Converter, quantize_bundle
from lvr_lite.quant.reports import Candidate, Conversion, QuantizationReport, SearchReport
from lvr_lite.quant.schemes import COMPACT, RoundingPlan, Scheme
from lvr_lite.quant.tune import Tuner

# Units that are measured one by one, at most.
UNITS = 72
UNITS_LARGE = 40
# Larger blocks, or none of the zero points, leave more room for 8 bits, and ended worse on real
# weights (docs/results/quant.md).
FOUR = Scheme(bits=4, block=32, symmetric=False)
# Points of the path from 4 to 8 bits that are measured whole.
POINTS = 10
# Prompts that each candidate of a large bundle answers.
SCORED_LARGE = 8
HEAD = "embedding and head"
SMALL_GRAPHS = ("embed_tokens", "lm_head")
# In the order of layers, as products come.
GRAPHS = ("decoder", *SMALL_GRAPHS)


def write_mixed(
    search: Search,
    target: Path,
    budget: float,
    tuner: Tuner | None,
) -> QuantizationReport:
    """Write what the search finds best within `budget` bits a weight; returns what report.json
    says, the search included. Raises as `quantize_bundle` does, and UsageError for a budget below
    what 4 bits take.
    """
    result = search.choose(budget)
    chosen = result.chosen
    plan = search.plan(chosen.eight)
    progress = search.calibration.progress
    source = search.calibration.source
    written = quantize_bundle(
        source=source,
        target=target,
        precision="mixed",
        progress=progress,
        plan=plan,
        tuner=tuner,
        search=result,
    )
    assert written.bits_per_weight <= budget + 1e-3, written.bits_per_weight
    progress(
        f"{len(chosen.eight)} of {result.units} units have 8 bits: KL {chosen.loss.kl:.2e}, "
        f"drift {chosen.loss.drift:.2e}"
    )
    return written


@dataclass(frozen=True)
class _Variant:
    """All graphs but vision, every weight in so many bits.

    graphs: {name: graph}, whose weights lie in the scratch folder.
    conversions: {name: what became of its weights}.
    """

    graphs: dict[str, onnx.ModelProto]
    conversions: dict[str, Conversion]

    @property
    def decoder(self) -> onnx.GraphProto:
        return self.graphs["decoder"].graph

    def bytes(self, *graphs: str) -> int:
        """Of the weights of these graphs, scales and zero points included."""
        return sum(self.conversions[name].bytes_of_weights for name in graphs)

    @property
    def weights(self) -> int:
        return sum(c.weights for c in self.conversions.values() if not c.shared)

    def decoder_bytes(self) -> Counter[str]:
        """{weight of the decoder: its bytes}"""
        sizes: Counter[str] = Counter()
        for tensor in self.decoder.initializer:
            sizes[_weight_of(tensor)] += onnxfile.size(tensor)
        return sizes


def _weight_of(tensor: onnx.TensorProto) -> str:
    """The weight that integers, scales or zero points stand for."""
    return str(tensor.name.rpartition("_")[0])


def _weight_read(node: onnx.NodeProto) -> str:
    """Nodes are named after their weights."""
    return f"{node.name.partition('/')[0]}.weight"


class Search:
    """Units of a bundle's decoder, embedding and head in 4 and 8 bits, and what mixtures of them
    cost.

    calibration: what weights are rounded for; a search in its scratch folder replaces an earlier
        one's files.
    products: of the calibration.
    block: values that share a scale in 4 bits; None takes FOUR's.
    scored: the prompts that each candidate answers; None takes those of the calibration, of a large
        bundle the first ones.
    measured: everything measured so far.
    """

    def __init__(
        self,
        calibration: Calibration,
        products: Products,
        block: int | None = None,
        scored: list[Prompt] | None = None,
    ) -> None:
        self.calibration = calibration
        self.measured: list[Candidate] = []
        self._products = products
        self._prompts = scored or calibration.prompts[: SCORED_LARGE if calibration.large else None]
        self._references = reference_answers(calibration.runtime, self._prompts)
        choices = sum(len(reference.choices) for reference in self._references)
        latents = sum(len(r.hidden[r.latents]) for r in self._references)
        calibration.progress(
            f"calibration: {len(calibration.prompts)} prompts; {choices} choices and {latents} "
            "latents to keep"
        )
        self._four_bits = replace(FOUR, block=block or FOUR.block)
        self._cache = calibration.scratch / "rounded"
        if self._cache.exists():
            shutil.rmtree(self._cache)
        self._cache.mkdir()
        self._variants = {bits: self._write_variant(bits) for bits in (4, 8)}

    def choose(self, budget: float) -> SearchReport:
        """The best of what was measured within `budget` bits a weight, and everything measured so
        far. Raises UsageError for a budget below what 4 bits take.
        """
        base = self._measure(frozenset())
        if base.bits > budget:
            raise UsageError(
                f"--bits {budget:g}: 4 bits take {base.bits:.2f} a weight here, scales included; "
                "give at least that, or a larger --block"
            )
        gains: dict[str, float] = {}
        for unit in terminal.bar(list(self._costs), "8 bits for one unit"):
            gains[unit] = base.loss.total - self._measure(frozenset([unit])).loss.total
        mixtures = list(dict.fromkeys(self._mixtures(gains, budget)))
        for eight in terminal.bar(mixtures, "candidates"):
            self._measure(eight)
        within = [candidate for candidate in self.measured if candidate.bits <= budget]
        return SearchReport(
            chosen=min(within, key=lambda candidate: candidate.loss.total),
            budget=budget,
            units=len(self._costs),
            measured=list(self.measured),
            prompts=len(self._prompts),
        )

    def plan(self, eight: frozenset[str]) -> RoundingPlan:
        """How a bundle is rounded whose units `eight` have 8 bits."""
        small = COMPACT
        if HEAD not in eight:
            small = self._four_bits
        return RoundingPlan(
            by_graph={
                "vision_encoder": COMPACT,
                "embed_tokens": small,
                "lm_head": small,
                "decoder": self._four_bits,
            },
            by_weight={f"decoder/{weight}": COMPACT for weight in self._weights(eight)},
            products=self._products,
            cache=self._cache,
        )

    def _mixtures(self, gains: dict[str, float], budget: float) -> Iterator[frozenset[str]]:
        """Candidates: units by gain a byte as far as the budget goes, with and without those that
        still fit behind the first one that does not, and some beyond the budget.
        """
        order = sorted(gains, key=lambda unit: -gains[unit] / self._costs[unit])
        path = [frozenset(order[:n]) for n in range(1, len(order) + 1)]
        filled: frozenset[str] = frozenset()
        for unit in order:
            if gains[unit] > 0 and self._bits(filled | {unit}) <= budget:
                filled |= {unit}
        yield filled
        yield from [eight for eight in path if self._bits(eight) <= budget][-1:]
        for point in np.linspace(0, len(path) - 1, POINTS):
            yield path[int(point)]

    def _write_variant(self, bits: int) -> _Variant:
        """All graphs but vision in one precision, into the scratch folder."""
        products = self._products if bits == 4 else {}
        scheme = self._four_bits if bits == 4 else COMPACT
        plan = RoundingPlan(dict.fromkeys(GRAPHS, scheme), products=products, cache=self._cache)
        converter = Converter(plan)
        variant = _Variant({}, {})
        for name in GRAPHS:
            file = self.calibration.source.path(name)
            model = onnxfile.load(file)
            read = partial(onnxfile.read, folder=file.parent)
            with onnxfile.data_file(self.calibration.scratch / f"{name}-{bits}.onnx") as data:
                variant.conversions[name] = converter.convert(name, model, read, data)
            variant.graphs[name] = model
        return variant

    @cached_property
    def _units(self) -> dict[str, list[str]]:
        """{unit: weights of the decoder}: one; in a deep model the same one of so many neighbouring
        layers that there are no more than UNITS. A layer's own weights never go together: its
        values, a small part of it, gain several times what its largest do.
        """
        nodes = self._variants[4].decoder.node
        weights = [_weight_read(node) for node in nodes if node.op_type == "MatMulNBits"]
        most = UNITS
        if self.calibration.large:
            most = UNITS_LARGE
        span = -(-len(weights) // most)
        units: dict[str, list[str]] = {}
        for weight in weights:
            unit = weight.removeprefix("language_model.").removesuffix(".weight")
            layer = re.search(r"layers\.(\d+)", unit)
            if layer and span > 1:
                first = int(layer[1]) // span * span
                unit = unit.replace(layer[0], f"layers.{first}-{first + span - 1}")
            units.setdefault(unit, []).append(weight)
        return units

    @cached_property
    def _costs(self) -> dict[str, int]:
        """{unit: bytes that it takes more with 8 bits}"""
        four = self._variants[4]
        eight = self._variants[8]
        sizes = eight.decoder_bytes()
        sizes.subtract(four.decoder_bytes())
        costs = {}
        for unit, weights in self._units.items():
            costs[unit] = sum(sizes[weight] for weight in weights)
        costs[HEAD] = eight.bytes(*SMALL_GRAPHS) - four.bytes(*SMALL_GRAPHS)
        return costs

    def _weights(self, eight: frozenset[str]) -> set[str]:
        """The decoder's weights of these units."""
        weights: set[str] = set()
        for unit in eight:
            weights.update(self._units.get(unit, ()))
        return weights

    def _bits(self, eight: frozenset[str]) -> float:
        """A weight, scales included."""
        four = self._variants[4]
        size = four.bytes(*GRAPHS) + sum(self._costs[unit] for unit in eight)
        return 8 * size / four.weights

    def _measure(self, eight: frozenset[str]) -> Candidate:
        for candidate in self.measured:
            if candidate.eight == eight:
                return candidate
        bits = 8 if HEAD in eight else 4
        small = self._variants[bits].graphs
        scratch = self.calibration.scratch
        runtime = self.calibration.runtime.with_graphs(
            decoder=open_session(self._mixture(eight).SerializeToString(), scratch),
            embed=open_session(small["embed_tokens"].SerializeToString(), scratch),
            head=open_session(small["lm_head"].SerializeToString(), scratch),
        )
        loss = answer_loss(runtime, self._prompts, self._references)
        candidate = Candidate(eight, self._bits(eight), loss)
        self.measured.append(candidate)
        return candidate

    def _mixture(self, eight: frozenset[str]) -> onnx.ModelProto:
        """The decoder with the nodes of these units from the 8-bit graph and all others from the
        4-bit one.
        """
        wide = self._weights(eight)
        four_bits = self._variants[4].decoder
        eight_bits = self._variants[8].decoder
        model = onnx.ModelProto()
        model.CopyFrom(self._variants[4].graphs["decoder"])
        graph = model.graph
        for node, wide_node in zip(graph.node, eight_bits.node, strict=True):
            if _weight_read(node) in wide:
                node.CopyFrom(wide_node)
        del graph.initializer[:]
        graph.initializer.extend(t for t in four_bits.initializer if _weight_of(t) not in wide)
        graph.initializer.extend(t for t in eight_bits.initializer if _weight_of(t) in wide)
        return model
