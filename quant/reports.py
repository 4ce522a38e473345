"""What report.json says of a quantized bundle, one class an object. May import: what stands above
`quant`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lvr_lite.files import JsonObject


@dataclass(frozen=True)
class Conversion:
    """What became of the weights of one graph.

    precision: "int8", "int4", "mixed" (both) or "fp16".
    what: the same for people, such as "34 × 4 bits and 8 × 8 bits".
    schemes: how weights were rounded, such as "4 bits, block 128".
    replaced: number of weights that were.
    kept: {weight: why it stayed in float}.
    shared: True where a head reads the embedding's bytes.
    weights: values of the weights that were replaced.
    bytes_of_weights: what these take now, scales and zero points included.
    weight_error: norm of all rounding errors / norm of all weights replaced.
    errors: {node: relative error of its weight}.
    layers: {"layers.3": root mean square of its errors}.
    bits: {node: bits of its weight}.
    """

    precision: str
    what: str
    schemes: list[str]
    replaced: int
    kept: dict[str, str]
    shared: bool
    weights: int
    bytes_of_weights: int
    weight_error: float
    errors: dict[str, float]
    layers: dict[str, float]
    bits: dict[str, int]

    def to_json(self) -> JsonObject:
        return asdict(self)


@dataclass(frozen=True)
class GraphReport:
    """One graph before and after; bytes: of its files."""

    conversion: Conversion
    bytes_before: int
    bytes: int

    def to_json(self) -> JsonObject:
        sizes = {"bytes_before": self.bytes_before, "bytes": self.bytes}
        return self.conversion.to_json() | sizes

    def line(self, name: str) -> str:
        """For people; name: of the graph."""
        done = self.conversion
        kept = ", ".join(f"{weight} ({why})" for weight, why in done.kept.items())
        floats = f"kept: {kept}" if kept else "none kept in float"
        return (
            f"{name}: {done.replaced} weights to {done.what}, {floats}, "
            f"error {done.weight_error:.2%}, {self.bytes / 1e6:.2f} MB"
        )


@dataclass(frozen=True)
class StepDrift:
    """Hidden states of the latent steps against fp32's, one number a step.

    relative: norm of the difference / norm of the reference.
    cosine: mean over prompts.
    norm: norm / norm of the reference, mean over prompts.
    """

    relative: list[float]
    cosine: list[float]
    norm: list[float]


@dataclass(frozen=True)
class DecoderDrift:
    """Hidden states of the decoder against fp32's.

    prompts: number of questions.
    prefill: relative error of the states after the prompts.
    fed_back: both models go on from their own states, so that errors may add up.
    token_fed: both are fed the embedding of <|lvr|>.
    """

    prompts: int
    prefill: float
    fed_back: StepDrift
    token_fed: StepDrift


@dataclass(frozen=True)
class Drift:
    """Relative errors of a quantized bundle: norm of the difference / norm of the reference.

    graphs: {vision_encoder, embed_tokens, lm_head: error on the same input}.
    layers: of what each decoder layer adds to the states, on the same input.
    decoder: None, like an empty `graphs`, for a bundle that is too large to compare whole.
    """

    graphs: dict[str, float]
    layers: list[float]
    decoder: DecoderDrift | None

    def to_json(self) -> JsonObject:
        decoder = None if self.decoder is None else asdict(self.decoder)
        return {**self.graphs, "layers": self.layers, "decoder": decoder}

    @classmethod
    def from_json(cls, data: JsonObject) -> Drift:
        graphs = {name: data[name] for name in data if name not in ("layers", "decoder")}
        decoder = data["decoder"]
        if decoder is not None:
            steps = {name: StepDrift(**decoder[name]) for name in ("fed_back", "token_fed")}
            decoder = DecoderDrift(**{**decoder, **steps})
        return cls(graphs, data["layers"], decoder)


@dataclass(frozen=True)
class TuningReport:
    """What training scales and norms after rounding came to.

    steps: of the optimizer.
    loss_before, loss_after: on the readings that were not trained on.
    kept: True where the trained values were written, since they were better.
    held_out: number of readings that were not trained on.
    """

    steps: int
    loss_before: float
    loss_after: float
    kept: bool
    held_out: int


@dataclass(frozen=True)
class AnswerLoss:
    """How far answers are from the reference.

    kl: divergence of the distributions from fp32's, in nats, mean over all choices.
    drift: 1 - cosine of the latents to fp32's, mean over all latent steps.
    """

    kl: float
    drift: float

    @property
    def total(self) -> float:
        return self.kl + self.drift


@dataclass(frozen=True)
class Candidate:
    """A mixture of 4 and 8 bits, and what a bundle of it costs.

    eight: units of 8 bits.
    bits: a weight of decoder, embedding and head, scales included.
    """

    eight: frozenset[str]
    bits: float
    loss: AnswerLoss

    def to_json(self) -> JsonObject:
        bits = round(self.bits, 4)
        costs = {**asdict(self.loss), "loss": self.loss.total}
        return {"eight": sorted(self.eight), "bits": bits, **costs}


@dataclass(frozen=True)
class SearchReport:
    """A search for the best mixture of 4 and 8 bits.

    chosen: the one of the least loss within the budget.
    budget: bits a weight.
    units: number of units that could have 8 bits.
    measured: everything measured so far.
    prompts: number of prompts that each candidate answered.
    """

    chosen: Candidate
    budget: float
    units: int
    measured: list[Candidate]
    prompts: int

    def to_json(self) -> JsonObject:
        return {
            "chosen": self.chosen.to_json(),
            "budget": self.budget,
            "units": self.units,
            "measured": [candidate.to_json() for candidate in self.measured],
            "calibration": {"prompts": self.prompts},
        }


@dataclass(frozen=True)
class QuantizationReport:
    """report.json of a quantized bundle.

    bytes_before, bytes: of all graphs.
    bits_per_weight: of decoder, embedding and head, scales included.
    graphs: {name: what became of it}.
    drift: errors against fp32.
    parity: what the fp32 bundle's export measured against torch.
    tuning: None where nothing was trained.
    seconds, peak_rss_mb: of writing this bundle; None before it is written.
    search: of "mixed".
    search_seconds: of calibration, search and writing together.
    """

    precision: str
    bytes_before: int
    bytes: int
    bits_per_weight: float
    graphs: dict[str, GraphReport]
    drift: Drift
    parity: JsonObject
    tuning: TuningReport | None = None
    seconds: float | None = None
    peak_rss_mb: float | None = None
    search: SearchReport | None = None
    search_seconds: float | None = None

    def to_json(self) -> JsonObject:
        report: JsonObject = {
            **vars(self),
            "graphs": {name: graph.to_json() for name, graph in self.graphs.items()},
            "drift": self.drift.to_json(),
        }
        if self.tuning is not None:
            report["tuning"] = asdict(self.tuning)
        if self.search is not None:
            report["search"] = self.search.to_json()
        # Of a bundle that is written the peak stands there even where the system does not tell it.
        always = {"peak_rss_mb"} if self.seconds is not None else set()
        return {k: v for k, v in report.items() if v is not None or k in always}
