"""Two runs beside each other: noise is no change, a change is seen, and what is not comparable is
said.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lvr_lite.bench.compare import TOLERANCE, compare, show
from lvr_lite.bench.record import (
    LATENCIES,
    STAGES,
    Accuracy,
    Bandwidth,
    Benchmark,
    Quality,
    SettingResult,
    Summary,
    SystemResult,
    read,
)
from lvr_lite.errors import DataError

RECORDED = Path(__file__).resolve().parents[2] / "bench" / "results"
ROUNDS = 20
TOKENS = 16
# Stages and latencies of which an answer has one sample a token.
PER_STEP = ("tpls", "tpot", "latent_step", "text_step", "lm_head", "sampling")


def a_run(
    seed: int, factor: float = 1.0, bandwidth: float = 40.0, md5: str = "a", noise: float = 0.1
) -> Benchmark:
    """A run whose times are noisy by sample and by round; of a system `factor` times as slow as
    usual in all it does.
    """
    rng = np.random.default_rng(seed)

    def summary(name: str, ms: float) -> Summary:
        each = TOKENS if name in PER_STEP else 1
        by_round = np.repeat(rng.lognormal(0, noise / 2, ROUNDS), each)
        return Summary.of(list(ms * factor * by_round * rng.lognormal(0, noise, ROUNDS * each)))

    system = SystemResult(
        name="int8",
        system="int8",
        precision="int8",
        setting=SettingResult(None, None, 1, 64, 80),
        stages={name: summary(name, 20.0) for name in STAGES},
        latencies={name: summary(name, 50.0) for name in LATENCIES},
        output_md5=md5,
    )
    return Benchmark(
        machine={"cpu": "c", "threads": 2},
        bandwidth_gb_s=bandwidth,
        rounds=ROUNDS,
        bandwidth=Bandwidth(bandwidth, bandwidth, 2, True, None, None),
        plan={"rounds": ROUNDS, "tokens": TOKENS},
        warnings=[],
        systems=[system],
    )


def verdicts(before: Benchmark, after: Benchmark, tolerance: float = TOLERANCE) -> set[str]:
    return {row.verdict for row in compare(before, after, tolerance).rows}


def changed(before: Benchmark, after: Benchmark) -> bool:
    return verdicts(before, after) != {"same"}


def test_noise_is_no_change_in_19_of_20_tries() -> None:
    assert sum(changed(a_run(2 * i), a_run(2 * i + 1)) for i in range(20)) <= 1


def test_the_rounds_of_one_moment_are_no_more_than_one_observation() -> None:
    """Speed that moves every five seconds or so: rounds within each are alike, and 200 of them are
    not 200 observations.
    """

    def drifting(seed: int) -> Benchmark:
        rng = np.random.default_rng(seed)
        speeds = np.repeat(rng.lognormal(0, 0.08, 10), 20) * rng.lognormal(0, 0.01, 200)
        summary = Summary.of(list(50 * speeds))
        run = a_run(seed)
        latencies = dict.fromkeys(LATENCIES, summary)
        stages = dict.fromkeys(STAGES, Summary.of([]))
        system = replace(run.systems[0], latencies=latencies, stages=stages)
        return replace(run, rounds=200, systems=[system])

    tries = [verdicts(drifting(2 * i), drifting(2 * i + 1), tolerance=0.01) for i in range(20)]
    assert sum(verdict != {"same"} for verdict in tries) <= 1


@pytest.mark.parametrize(("factor", "verdict"), [(1.3, "slower"), (0.7, "faster")])
def test_a_change_is_seen_in_every_measure(factor: float, verdict: str) -> None:
    rows = compare(a_run(0), a_run(1, factor)).rows
    assert {row.verdict for row in rows} == {verdict}
    assert {row.measure for row in rows} == {*LATENCIES, *STAGES} - {"latent_step"}
    assert all(row.interval[0] < row.ratio < row.interval[1] for row in rows)


def test_a_small_change_is_within_the_tolerance_however_sure_it_is() -> None:
    before = a_run(0, noise=1e-4)
    after = a_run(1, 1.03, noise=1e-4)
    assert verdicts(before, after) == {"same"}
    assert verdicts(before, after, 0.01) == {"slower"}


def test_what_the_machine_itself_moved_is_no_change_of_the_system() -> None:
    before = a_run(0, noise=1e-3)
    comparison = compare(before, a_run(1, 1.3, bandwidth=28.0, noise=1e-3))
    assert {row.verdict for row in comparison.rows} == {"same"}
    assert any("40.0 GB/s in one run, 28.0" in note for note in comparison.machine)
    slower = replace(a_run(1, 1.3, noise=1e-3), core_ms=[1.35] * ROUNDS)
    assert verdicts(replace(before, core_ms=[1.0] * ROUNDS), slower) == {"same"}
    assert verdicts(replace(before, core_ms=[1.3] * ROUNDS), slower) == {"slower"}


def test_a_stage_that_is_short_or_a_small_part_of_a_request_is_not_compared() -> None:
    def run(stage: str, ms: float) -> Benchmark:
        run = a_run(0)
        (system,) = run.systems
        stages = system.stages | {stage: Summary.of([ms] * ROUNDS)}
        return replace(run, systems=[replace(system, stages=stages, request_ms={stage: ms})])

    def measures(ms: float) -> set[str]:
        return {row.measure for row in compare(run("vision", ms), run("vision", ms)).rows}

    # A request takes 50 ms.
    assert "vision" in measures(3.0)
    assert "vision" not in measures(1.0)


def test_other_answers_are_told_where_the_same_was_asked() -> None:
    other = a_run(1, md5="b")
    assert compare(a_run(0), other).answers == ["int8"]
    assert compare(a_run(0), other).regressed
    assert compare(a_run(0), replace(other, plan=other.plan | {"tokens": 8})).answers == []


def test_what_only_one_run_has_is_left_out_and_nothing_in_common_is_an_error() -> None:
    run = a_run(1)
    other = replace(run.systems[0], name="int4")
    both = replace(run, systems=[*run.systems, other])
    assert {row.system for row in compare(a_run(0), both).rows} == {"int8"}
    message = "no system is in both runs: int8 in one, int4 in the other"
    with pytest.raises(DataError, match=message):
        compare(a_run(0), replace(run, systems=[other]))


def test_a_run_that_is_written_is_read_back_whole(tmp_path: Path) -> None:
    run = a_run(0)
    quality = Quality("fp32", 2, 0.5, [0.9])
    accuracy = Accuracy("scenes", 10, 0.5, [0.3, 0.7])
    system = replace(run.systems[0], quality=quality, accuracy=accuracy, bytes={"decoder": 3})
    run = replace(run, systems=[system], core_ms=[1.0])
    (tmp_path / "a.json").write_text(json.dumps(run.to_json()))
    assert read(tmp_path / "a.json") == run


@pytest.mark.parametrize("file", sorted(RECORDED.glob("*.json")), ids=lambda file: file.stem)
def test_runs_of_older_releases_are_read(file: Path) -> None:
    run = read(file)
    assert run.rounds > 0
    assert all(system.latencies["ttft"].samples_ms for system in run.systems)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("[]", "no schema"),
        ('{"schema": "lvr-lite/eval"}', "no schema"),
        ('{"schema": "lvr-lite/bench", "version": 9}', "version 9 of the format"),
        ('{"schema": "lvr-lite/bench", "version": 1}', "a field is missing"),
    ],
)
def test_a_file_that_is_no_run_is_named(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.json: .*{word}"):
        read(tmp_path / "a.json")
    with pytest.raises(DataError, match="nosuch"):
        read(tmp_path / "nosuch.json")


def test_people_see_what_changed() -> None:
    out = io.StringIO()
    show(compare(a_run(0), a_run(1, 1.5)), Console(file=out, width=160))
    for word in ("int8", "TPOT", "slower", "GB/s", "14 of 14 changed"):
        assert word in out.getvalue()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bandwidth_gb_s", 0),
        ("bandwidth_gb_s", "9"),
        ("rounds", 0),
        ("systems", {"a": 1}),
        ("systems", [7]),
        ("plan", []),
        ("core_ms", [[1.0]]),
        ("warnings", [1]),
    ],
)
def test_a_field_of_another_type_is_refused(tmp_path: Path, field: str, value: object) -> None:
    (file,) = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*.json"))[:1]
    run = json.loads(file.read_text(encoding="utf-8"))
    (tmp_path / "run.json").write_text(json.dumps(run | {field: value}))
    with pytest.raises(DataError, match=r"run\.json: a field is missing or unknown"):
        read(tmp_path / "run.json")


@pytest.mark.parametrize("value", [[1, None], ["1"], [[1]], [float("inf")], {"0": 1}, None, True])
def test_samples_of_a_stage_that_are_no_numbers_are_refused(tmp_path: Path, value: object) -> None:
    (file,) = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*.json"))[:1]
    run = json.loads(file.read_text(encoding="utf-8"))
    run["systems"][0]["stages"]["vision"]["samples_ms"] = value
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(DataError, match=r"run\.json: a field is missing or unknown"):
        read(tmp_path / "run.json")


def test_a_file_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"run\.json: not JSON"):
        read(tmp_path / "run.json")
