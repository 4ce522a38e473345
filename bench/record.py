"""What a run of the bench says, as `lvr-lite bench --json` writes it. May import: numpy,
errors, files.

Tables and pages are made from these results alone, so that a saved file can be shown again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from lvr_lite.errors import DataError
from lvr_lite.files import JsonObject

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")

SCHEMA = "lvr-lite/bench"
VERSION = 1
# Of numbers in a file; beyond it sums overflow.
LARGEST = 1e15
STAGES = (
    "preprocess",
    "vision",
    "embed",
    "prefill",
    "latent_step",
    "hand_over",
    "text_step",
    "lm_head",
    "sampling",
)
# {latency: its title for people}
LATENCIES = {
    "ttft": "TTFT",
    "ttft_again": "TTFT again",
    "ttfa": "TTFA",
    "tpls": "TPLS",
    "tpot": "TPOT",
    "end_to_end": "end to end",
}


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile, q in 0…100, of one or more samples, linear between neighbours (numpy's
    default, type 7 of Hyndman and Fan).
    """
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Summary:
    """Samples of one duration, and what they come to, all in ms; None where there are no samples.

    std_ms: sample standard deviation, 0 of one sample.
    """

    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    std_ms: float | None
    samples_ms: list[float]

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Summary:
        samples = list(samples_ms)
        if not samples:
            return cls(None, None, None, None, [])
        p50, p90, p99 = (percentile(samples, q) for q in (50, 90, 99))
        std = 0.0
        if len(samples) > 1:
            std = float(np.std(samples, ddof=1))
        return cls(p50, p90, p99, std, samples)


@dataclass(frozen=True)
class Accuracy:
    """A suite's score: accuracy in 0…1 over n samples, with its 95 % interval.

    looked: the share of answers that looked; None in files of older releases.
    """

    suite: str
    n: int
    accuracy: float
    interval: list[float]
    looked: float | None = None


@dataclass(frozen=True)
class Quality:
    """A system's free answers to the requests beside those of `reference`, greedy, untimed.

    n: requests.
    token_agreement: share of places (the longer answer's length) with the same token.
    latent_cosine: mean cosine of latent k with the reference's, for k = 1…K.
    """

    reference: str
    n: int
    token_agreement: float
    latent_cosine: list[float]


@dataclass(frozen=True)
class SettingResult:
    """A setting (`plan.Setting`), and the longest prompt in it as the model saw it, in tokens."""

    steps: int | None
    image_tokens: int | None
    batch: int
    visual_tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class SystemResult:
    """One system in one setting. What has a default may be missing in files of older releases.

    name: the system's, with what its setting changes; system: its own.
    stages, latencies: {name: samples of one}; in JSON a latency is `<name>_ms`.
    output_md5: of the timed answers' token ids.
    request_ms: {stage: mean ms that a request spends in it}.
    joules: of one request, or one batch.
    peak_rss_mb: MiB; peak_rss_shared: of the one process that held every system.
    bytes: {graph: bytes on disk}.
    bandwidth_fraction: decoder bytes per latent step over its median time, as a share of the
        machine's bandwidth.
    look: whether answers looked: "auto", "always" or "never".
    looked: the share of timed answers that did.
    latent_steps: that a timed answer took, the mean.
    visual_tokens: of a picture, {"p50", "max"}.
    """

    name: str
    system: str
    precision: str
    setting: SettingResult
    stages: dict[str, Summary]
    latencies: dict[str, Summary]
    output_md5: str
    request_ms: dict[str, float] = field(default_factory=dict)
    throughput_tokens_s: float | None = None
    joules: float | None = None
    peak_rss_mb: float | None = None
    peak_rss_shared: bool = False
    bytes: dict[str, int] = field(default_factory=dict)
    bandwidth_fraction: float | None = None
    quality: Quality | None = None
    accuracy: Accuracy | None = None
    look: str | None = None
    looked: float | None = None
    latent_steps: float | None = None
    visual_tokens: JsonObject | None = None

    @property
    def megabytes(self) -> float | None:
        """Of all graphs; None for what has none."""
        if not self.bytes:
            return None
        return sum(self.bytes.values()) / 1e6

    def to_json(self) -> JsonObject:
        data = asdict(self)
        latencies: JsonObject = data.pop("latencies")
        return data | {f"{name}_ms": summary for name, summary in latencies.items()}

    @classmethod
    def from_json(cls, data: object) -> SystemResult:
        """Raises KeyError or TypeError for a missing or a wrong field."""
        if not isinstance(data, dict):
            raise TypeError("a system must be an object")
        quality = data.get("quality")
        accuracy = data.get("accuracy")
        typed = {
            "setting": _read(SettingResult, data["setting"]),
            "stages": _stages(data["stages"]),
            "latencies": {name: _summary(data.get(f"{name}_ms")) for name in LATENCIES},
            "quality": None if quality is None else _read(Quality, quality),
            "accuracy": None if accuracy is None else _read(Accuracy, accuracy),
        }
        return _read(cls, data | typed)


@dataclass(frozen=True)
class Bandwidth:
    """GB/s at which `threads` threads read memory, and the load average, beside the rounds.

    steady: whether both speeds are the same within 15 %.
    """

    before_gb_s: float
    after_gb_s: float
    threads: int
    steady: bool
    load_before: float | None
    load_after: float | None


@dataclass(frozen=True)
class Benchmark:
    """A whole run.

    machine: the card (`machine.card`), and the provider.
    bandwidth_gb_s: the mean of before and after.
    rounds: that were timed.
    plan: rounds, seconds, warmup, tokens, settings, seed, and the number of requests.
    warnings: what must be known before the systems are compared.
    core_ms: ms of a fixed computation before each round (`machine.read_compute`); [] in files of
        older releases.
    """

    machine: JsonObject
    bandwidth_gb_s: float
    rounds: int
    bandwidth: Bandwidth
    plan: JsonObject
    warnings: list[str]
    systems: list[SystemResult]
    core_ms: list[float] = field(default_factory=list)

    def to_json(self) -> JsonObject:
        systems = [system.to_json() for system in self.systems]
        return {"schema": SCHEMA, "version": VERSION} | asdict(self) | {"systems": systems}

    @classmethod
    def from_json(cls, data: JsonObject) -> Benchmark:
        """Raises KeyError or TypeError for a missing or a wrong field."""
        typed = {
            # In files of older releases the plan's rounds are those that were timed.
            "rounds": data.get("rounds", data["plan"]["rounds"]),
            "bandwidth": _read(Bandwidth, data["bandwidth"]),
            "systems": [SystemResult.from_json(system) for system in data["systems"]],
        }
        run = _read(cls, data | typed)
        if run.rounds < 1 or run.bandwidth_gb_s <= 0:
            raise TypeError("rounds and bandwidth_gb_s must be above 0")
        return run


def _read(cls: type[Record], data: object) -> Record:
    """A dataclass from the fields of it that a JSON object has; others are not read. Raises
    TypeError for a value of another type than the field's.
    """
    if not isinstance(data, dict):
        raise TypeError(f"{cls.__name__} must be an object")
    hints = get_type_hints(cls)
    given = {f.name: data[f.name] for f in fields(cls) if f.name in data}
    for name, value in given.items():
        if not _fits(value, hints[name]):
            raise TypeError(f"{name} must not be {str(value)[:40]}")
    return cls(**given)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of the type of a field; numbers must be finite."""
    of = get_args(hint)
    if hint is Any or get_origin(hint) is UnionType:
        return hint is Any or any(_fits(value, option) for option in of)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, of[0]) for item in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(item, of[1]) for item in value.values())
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (hint is float or isinstance(value, int)) and abs(value) <= LARGEST
    return bool(isinstance(value, hint))


def _summary(data: object) -> Summary:
    """A duration; what its samples come to is computed anew."""
    if data is None:
        return Summary.of([])
    if not isinstance(data, dict) or not _fits(data["samples_ms"], list[float]):
        raise TypeError("samples_ms must be numbers")
    return Summary.of(data["samples_ms"])


def _stages(data: object) -> dict[str, Summary]:
    if not isinstance(data, dict):
        raise TypeError("stages must be an object")
    return {name: _summary(data.get(name)) for name in STAGES}


def read(path: Path) -> Benchmark:
    """A file that `lvr-lite bench --json` wrote. Raises DataError for another one."""
    hint = "name a file that `lvr-lite bench --json` wrote"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {hint}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); {hint}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise DataError(f"{path}: not a run of the bench (no schema {SCHEMA}); {hint}")
    if data.get("version") != VERSION:
        raise DataError(
            f"{path}: written in version {data.get('version')} of the format; "
            f"this lvr-lite reads version {VERSION}"
        )
    try:
        return Benchmark.from_json(data)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: a field is missing or unknown ({error}); {hint}") from error
