"""Two runs beside each other: noise is no change, a change is seen, and what is not comparable is
said.
"""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lvr_lite.bench import compare, report
from lvr_lite.bench.measure import LATENCIES, STAGES, summary
from lvr_lite.errors import DataError

ROUNDS, TOKENS = 20, 16


def a_run(
    seed: int, factor: float = 1.0, bandwidth: float = 40.0, md5: str = "a", noise: float = 0.1
) -> dict[str, Any]:
    """A run whose times are noisy by sample and by round; of a system `factor` times as slow as
    usual in all it does.
    """
    rng = np.random.default_rng(seed)

    def samples(ms: float, each: int) -> dict[str, Any]:
        luck = np.repeat(rng.lognormal(0, noise / 2, ROUNDS), each)
        return summary(list(ms * factor * luck * rng.lognormal(0, noise, ROUNDS * each)))

    per_step = ("tpls", "tpot", "latent_step", "text_step", "lm_head", "sampling")
    return {
        "schema": "lvr-lite/bench", "version": 1, "machine": {"cpu": "c", "threads": 2}, "bandwidth_gb_s": bandwidth,
        "plan": {"rounds": ROUNDS, "tokens": TOKENS},
        "systems": [{
            "name": "int8", "output_md5": md5,
            "stages": {name: samples(20.0, TOKENS if name in per_step else 1) for name in STAGES},
            **{f"{name}_ms": samples(50.0, TOKENS if name in per_step else 1) for name in LATENCIES},
        }],
    }  # fmt: skip


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {row["verdict"] for row in compare.compare(before, after)["rows"]} - {"same"}


def test_noise_is_no_change_in_19_of_20_tries() -> None:
    assert sum(bool(changed(a_run(2 * i), a_run(2 * i + 1))) for i in range(20)) <= 1


def test_the_rounds_of_one_moment_are_no_more_than_one_observation() -> None:
    """Speed that moves every five seconds or so: rounds within each are alike, and 200 of them are
    not 200 observations.
    """

    def drifting(seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        luck = np.repeat(rng.lognormal(0, 0.08, 10), 20) * rng.lognormal(0, 0.01, 200)
        data = a_run(seed) | {"rounds": 200}
        data["systems"][0] |= {f"{name}_ms": summary(list(50 * luck)) for name in LATENCIES}
        data["systems"][0]["stages"] = {}
        return data

    tries = [
        compare.compare(drifting(2 * i), drifting(2 * i + 1), tolerance=0.01) for i in range(20)
    ]
    assert sum(any(row["verdict"] != "same" for row in data["rows"]) for data in tries) <= 1


@pytest.mark.parametrize(("factor", "verdict"), [(1.3, "slower"), (0.7, "faster")])
def test_a_change_is_seen_in_every_measure(factor: float, verdict: str) -> None:
    rows = compare.compare(a_run(0), a_run(1, factor))["rows"]
    assert {row["verdict"] for row in rows} == {verdict}
    assert {row["measure"] for row in rows} == {*LATENCIES, *STAGES} - {"latent_step"}
    assert all(row["interval"][0] < row["ratio"] < row["interval"][1] for row in rows)


def test_a_small_change_is_within_the_tolerance_however_sure_it_is() -> None:
    assert not changed(a_run(0, noise=1e-4), a_run(1, 1.03, noise=1e-4))
    assert {
        r["verdict"]
        for r in compare.compare(a_run(0, noise=1e-4), a_run(1, 1.03, noise=1e-4), 0.01)["rows"]
    } == {"slower"}


def test_what_the_machine_itself_moved_is_no_change_of_the_system() -> None:
    data = compare.compare(a_run(0, noise=1e-3), a_run(1, 1.3, bandwidth=28.0, noise=1e-3))
    assert {row["verdict"] for row in data["rows"]} == {"same"}
    assert any("40.0 GB/s in one run, 28.0" in note for note in data["machine"])
    slower = a_run(1, 1.3, noise=1e-3) | {"core_ms": [1.35] * ROUNDS}
    assert not changed(a_run(0, noise=1e-3) | {"core_ms": [1.0] * ROUNDS}, slower)
    assert changed(a_run(0, noise=1e-3) | {"core_ms": [1.3] * ROUNDS}, slower) == {"slower"}


def test_other_answers_are_told_where_the_same_was_asked() -> None:
    assert compare.compare(a_run(0), a_run(1, md5="b"))["answers"] == ["int8"]
    other = a_run(1, md5="b")
    other["plan"]["tokens"] = 8
    assert compare.compare(a_run(0), other)["answers"] == []


def test_what_only_one_run_has_is_left_out_and_nothing_in_common_is_an_error() -> None:
    more, none = copy.deepcopy(a_run(1)), copy.deepcopy(a_run(1))
    more["systems"].append(copy.deepcopy(more["systems"][0]) | {"name": "int4"})
    assert {row["system"] for row in compare.compare(a_run(0), more)["rows"]} == {"int8"}
    none["systems"][0]["name"] = "int4"
    with pytest.raises(
        DataError, match="no system is in both runs: int8 in one, int4 in the other"
    ):
        compare.compare(a_run(0), none)


@pytest.mark.parametrize(
    ("text", "word"),
    [("{", "not JSON"), ("[]", "no schema"), ('{"schema": "lvr-lite/eval"}', "no schema"),
     ('{"schema": "lvr-lite/bench", "version": 9}', "version 9 of the format")],
)  # fmt: skip
def test_a_file_that_is_no_run_is_named(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.json: .*{word}"):
        report.read(tmp_path / "a.json")
    with pytest.raises(DataError, match="nosuch"):
        report.read(tmp_path / "nosuch.json")


def test_people_see_what_changed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(a_run(0)))
    data = compare.compare(report.read(tmp_path / "a.json"), a_run(1, 1.5))
    out = io.StringIO()
    compare.show(data, Console(file=out, width=160))
    assert all(
        word in out.getvalue() for word in ("int8", "TPOT", "slower", "GB/s", "14 of 14 changed")
    )
