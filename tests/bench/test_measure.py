"""The bench on a model made of numpy: what is measured and how it is told, never how long it
takes.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lvr_lite.bench import machine, measure, quality, report
from lvr_lite.bench.plan import Plan, Request, Setting, System
from lvr_lite.bench.record import LATENCIES, STAGES, Benchmark, Summary, percentile
from lvr_lite.bench.timing import Timing, between_tokens, time_round
from lvr_lite.errors import UsageError
from lvr_lite.generate.decode import Event, Result
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.spec import LatentSpec
from tests.fakes import NeverLooks, OneWord

WORD = 300


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory is read."""
    monkeypatch.setattr(measure, "read_bandwidth", lambda *_: 40.0)
    monkeypatch.setattr(measure, "read_compute", lambda *_: 1.0)


REQUESTS = [Request(Image.new("RGB", (56, 56)), question) for question in ("a", "b")]
PLAN = Plan(rounds=4, warmup=1, tokens=5, seed=7)


def system(name: str = "fp32", precision: str = "fp32", **more: Any) -> System:
    return System(name, precision, OneWord(name, **more), {"decoder": 4_000_000, "lm_head": 1000})


def run(*systems: System) -> measure.Run:
    return measure.measure(list(systems) or [system()], REQUESTS, PLAN)


def test_percentiles_are_numpys() -> None:
    samples = [float(v) for v in np.random.default_rng(0).exponential(size=37)]
    for q in (0, 50, 90, 99, 100):
        assert percentile(samples, q) == pytest.approx(np.percentile(samples, q))
    assert percentile([3.0], 99) == 3.0


def test_a_summary_keeps_the_raw_samples_in_their_order() -> None:
    summary = Summary.of([3.0, 1.0, 2.0])
    assert summary.samples_ms == [3.0, 1.0, 2.0]
    assert (summary.p50_ms, summary.std_ms) == (2.0, 1.0)
    assert Summary.of([5.0]).std_ms == 0.0


def test_what_never_occurred_has_no_percentiles() -> None:
    assert Summary.of([]) == Summary(None, None, None, None, [])


def test_every_system_has_one_turn_in_every_round() -> None:
    rounds = list(itertools.islice(measure.shuffled_rounds(systems=4, seed=3), 20))
    assert all(sorted(order) == [0, 1, 2, 3] for order in rounds)


def test_the_order_of_turns_is_shuffled_and_comes_from_the_seed() -> None:
    rounds, again, others = (
        list(itertools.islice(measure.shuffled_rounds(4, seed), 20)) for seed in (3, 3, 4)
    )
    assert rounds == again != others
    assert len({tuple(order) for order in rounds}) > 5


def test_rounds_are_interleaved_and_ask_every_system_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[tuple[str, str]] = []

    def spy(runtime: Runtime, requests: list[Request], plan: Plan, setting: Setting) -> Timing:
        turns.append((runtime.name, requests[0].question))
        return time_round(runtime, requests, plan, setting)

    monkeypatch.setattr(measure, "time_round", spy)
    run(system("a"), system("b"), system("c"))
    rounds = [turns[i : i + 3] for i in range(3 * PLAN.warmup, len(turns), 3)]
    assert len(rounds) == PLAN.rounds
    for number, round_ in enumerate(rounds):
        assert sorted(name for name, _ in round_) == ["a", "b", "c"]
        assert {question for _, question in round_} == {REQUESTS[number % 2].question}


def test_every_stage_has_its_samples_of_every_request() -> None:
    (measured,) = run().systems
    counts = {stage: len(measured.stage(stage)) / PLAN.rounds for stage in STAGES}
    # Steps, of the even request: <|lvr_start|>, five latents, <|lvr_end|>, four of five tokens; the
    # head speaks before and at the end.
    assert counts == {
        "preprocess": 1,
        "vision": 1,
        "embed": 1,
        "prefill": 1,
        "latent_step": 5,
        "hand_over": 0,
        "text_step": 6,
        "lm_head": 6,
        "sampling": 6,
    }


def test_a_whole_request_has_the_models_own_latents_and_a_step_is_measured_over_as_many_as_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One second passes between any two readings of the clock.
    ticks = itertools.count()
    monkeypatch.setattr("lvr_lite.generate.decode.perf_counter", lambda: float(next(ticks)))
    for timing in run().systems[0].timings:
        assert timing.latencies["tpls"] == [1e3] * PLAN.tokens
        assert timing.spent["latent_step"] == 3e3


def test_latencies_are_counted_from_the_arrival_and_nest() -> None:
    for timing in run().systems[0].timings:
        (ttft,) = timing.latencies["ttft"]
        (ttfa,) = timing.latencies["ttfa"]
        (whole,) = timing.latencies["end_to_end"]
        assert 0 < ttft <= ttfa <= whole
        assert timing.latencies["tpls"] == timing.stages["latent_step"]
        assert len(timing.latencies["tpot"]) == PLAN.tokens - 1


def test_a_one_word_answer_is_made_to_go_on_while_it_is_timed() -> None:
    assert all(timing.tokens == [WORD] * PLAN.tokens for timing in run().systems[0].timings)


def test_latents_between_two_tokens_are_no_time_per_token() -> None:
    events = [Event(0, "token", at=1), Event(0, "start", at=2), Event(0, "latent", at=3)]
    events += [Event(0, "end", at=4), Event(0, "token", at=5), Event(0, "token", at=7)]
    assert between_tokens([*events, Event(0, "done", at=7)]) == [2]


def test_a_model_without_latents_is_measured_by_its_text_steps() -> None:
    (measured,) = run(system(latent=LatentSpec())).systems
    assert measured.latency("tpls") == []
    assert measured.latency("ttfa") == measured.latency("ttft")
    assert measured.bandwidth_fraction(40.0) == pytest.approx(
        4e6 / (np.median(measured.stage("text_step")) / 1e3) / 40e9
    )


def test_the_share_of_the_bandwidth_is_the_decoders_bytes_over_a_latent_step() -> None:
    measured = measure.Measured(system())
    measured.timings = [Timing({"latent_step": [1.0, 2.0, 9.0]}, {}, {}, [])]
    assert measured.bandwidth_fraction(40.0) == pytest.approx(4e6 / 2e-3 / 40e9)


def test_the_same_answers_have_the_same_md5_and_others_another() -> None:
    a, b, c = run(system("a"), system("b"), system("c", word=WORD + 1)).systems
    assert a.output_md5() == b.output_md5() != c.output_md5()


def test_quality_is_told_against_the_exact_system() -> None:
    exact, same, other = run(
        system("fp32"), system("int8", "int8", noise=0.5), system("int4", "int4", word=WORD + 1)
    ).systems
    assert exact.quality and same.quality and other.quality
    assert exact.quality.reference == "fp32"
    assert exact.quality.token_agreement == 1.0
    assert exact.quality.n == 2
    assert exact.quality.latent_cosine == pytest.approx([1.0, 1.0, 1.0])
    assert same.quality.token_agreement == 1.0
    assert all(0.9 < cosine < 0.999 for cosine in same.quality.latent_cosine)
    assert other.quality.token_agreement == 0.0


def test_without_an_exact_system_no_quality_is_claimed() -> None:
    assert run(system("int4", "int4")).systems[0].quality is None


def test_a_missing_token_is_no_agreement() -> None:
    outcome = quality.compare_answers("r", [Result(tokens=[5, 6])], [Result(tokens=[5])])
    assert outcome.token_agreement == 0.5


def test_a_system_measured_in_its_own_process_keeps_its_own_peak() -> None:
    alone = System("a", "fp32", OneWord("a"), {}, peak_rss_mb=123.0)
    first, second = run(alone, system("b")).systems
    assert (first.peak_rss_mb, first.rss_is_shared) == (123.0, False)
    assert second.rss_is_shared
    assert second.peak_rss_mb is None or second.peak_rss_mb > 1


def test_bandwidth_is_a_positive_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert machine.read_bandwidth(threads=2, megabytes=2, repeats=1) > 0
    assert machine.read_compute(repeats=1) > 0


def settings_run(*settings: Setting, systems: int = 2) -> measure.Run:
    plan = Plan(rounds=4, warmup=0, tokens=5, settings=settings)
    return measure.measure([system(f"s{i}") for i in range(systems)], REQUESTS, plan)


def test_every_system_is_measured_in_every_setting() -> None:
    systems = settings_run(Setting(steps=0), Setting(steps=4)).systems
    assert [m.name for m in systems] == ["s0, K 0", "s1, K 0", "s0, K 4", "s1, K 4"]
    assert [len(m.latency("end_to_end")) for m in systems] == [4] * 4
    assert systems[0].latency("tpls") == []
    assert all(m.latency("ttfa") for m in systems)


def test_a_batch_decodes_its_requests_together_and_counts_the_tokens_of_all() -> None:
    alone, together = settings_run(Setting(batch=1), Setting(batch=2), systems=1).systems
    assert together.name == "s0, batch 2"
    assert len(together.timings[0].tokens) == 2 * len(alone.timings[0].tokens)
    assert (len(alone.latency("ttft_again")), together.latency("ttft_again")) == (4, [])
    together.timings = [Timing({}, {"tpot": [20.0, 20.0, 10.0]}, {}, [])]
    assert together.throughput() == pytest.approx(100.0)


def test_only_the_first_row_of_a_batch_tells_the_time_between_tokens() -> None:
    events = [Event(row, "token", at=second) for second in (1.0, 3.0) for row in (0, 1)]
    assert between_tokens(events) == [2.0]


def test_energy_is_that_of_the_packages_and_absent_where_it_is_not_told(tmp_path: Path) -> None:
    assert machine.read_joules(tmp_path) is None
    joules = {"intel-rapl:0": 3, "intel-rapl:1": 2, "intel-rapl:0:0": 1}
    for zone, value in joules.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{value}000000\n")
    assert machine.read_joules(tmp_path) == 5.0
    measured = measure.Measured(system())
    # One without, one whose counter started again.
    samples = (None, -4.0, 1.0, 3.0)
    measured.timings = [Timing({}, {}, {}, [], value) for value in samples]
    assert measured.joules() == 2.0


def test_systems_that_answer_differently_are_not_compared_in_silence() -> None:
    assert not run(system("a"), system("b", "int8")).warnings
    (warning,) = run(system("a"), system("b", "int8", word=WORD + 1)).warnings
    assert "b answers differently: 0%" in warning
    # With nothing exact beside them too.
    (warning,) = run(system("a", "int8"), system("b", "int4", word=WORD + 1)).warnings
    assert "those of a" in warning


@pytest.mark.parametrize(
    ("wanted", "size"),
    [(64, (224, 224)), (256, (448, 448)), (6, (84, 56)), (7, (84, 56)), (1, (28, 28))],
)
def test_pictures_are_scaled_to_a_number_of_visual_tokens(
    wanted: int, size: tuple[int, int]
) -> None:
    runtime = OneWord("a")
    assert REQUESTS[0].scaled(runtime, wanted).picture.size == size
    assert REQUESTS[0].scaled(runtime, None).picture.size == (56, 56)


def test_a_number_of_visual_tokens_that_a_model_does_not_give_is_refused() -> None:
    runtime = OneWord("s0")
    runtime.processor = runtime.processor.with_max_pixels(28 * 28 * 16)
    plan = Plan(rounds=1, settings=(Setting(image_tokens=64),))
    with pytest.raises(UsageError, match="image_tokens 64: s0 gives such a picture 16 visual"):
        measure.measure([System("s0", "fp32", runtime, {})], REQUESTS, plan)


def test_a_run_goes_on_until_its_seconds_have_passed() -> None:
    steps: list[tuple[int, int]] = []
    plan = replace(PLAN, seconds=0.5)
    began = time.perf_counter()
    outcome = measure.measure(
        [system("a")], REQUESTS, plan, lambda timed, total: steps.append((timed, total))
    )
    assert time.perf_counter() - began > 0.5
    rounds = len(outcome.compute)
    (measured,) = outcome.systems
    assert rounds == len(measured.timings) > PLAN.rounds
    timed, total = steps[-1]
    assert timed == rounds <= total
    (short,) = measure.measure([system("a")], REQUESTS, PLAN).systems
    assert measured.output_md5(PLAN.rounds) == short.output_md5()
    assert outcome.result({}).rounds == rounds


def of_steps(steps: int | None, look: Any = None, latent: LatentSpec | None = None) -> Any:
    """The only system of a run of a model that never looks by itself, as the JSON has it."""
    model = System("s", "fp32", NeverLooks("s", latent), {"decoder": 4_000_000})
    plan = replace(PLAN, settings=(Setting(steps),), look=look)
    (outcome,) = measure.measure([model], REQUESTS, plan).result({}).systems
    return outcome


@pytest.mark.parametrize(("steps", "taken"), [(None, 3), (2, 2), (0, 0)])
def test_latent_steps_that_are_measured_are_taken(steps: int | None, taken: int) -> None:
    outcome = of_steps(steps)
    assert (outcome.latent_steps, outcome.looked) == (taken, float(taken > 0))
    assert bool(outcome.latencies["tpls"].samples_ms) == (taken > 0)
    assert outcome.look == ("always" if taken else "auto")


def test_a_run_that_leaves_the_look_to_the_model_says_what_it_did() -> None:
    assert (of_steps(None, "auto").latent_steps, of_steps(None, "auto").looked) == (0, 0)
    assert of_steps(None, "never").latent_steps == 0
    (free,) = measure.measure([system()], REQUESTS, replace(PLAN, look="auto")).result({}).systems
    assert (free.latent_steps, free.looked) == (3, 1)


def test_latent_steps_that_were_asked_for_and_not_taken_are_an_error() -> None:
    with pytest.raises(UsageError, match="s: 2 latent steps were asked for, and an answer took 0"):
        of_steps(2, "auto")


@pytest.mark.parametrize(
    ("steps", "look", "latent", "words"),
    [
        (None, "always", LatentSpec(), "s was not tuned for latent steps and cannot look"),
        (0, "always", None, "look always needs latent steps"),
        (2, "never", None, "look never forbids latent steps"),
    ],
)
def test_a_look_that_cannot_be_is_refused(
    steps: int | None, look: Any, latent: LatentSpec | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        of_steps(steps, look, latent)


def test_sizes_of_pictures_are_told() -> None:
    pictures = [Image.new("RGB", (56, 28 * n)) for n in (2, 2, 5)]
    requests = [Request(picture, "a") for picture in pictures]
    (measured,) = measure.measure([system()], requests, PLAN).result({}).systems
    assert measured.visual_tokens == {"p50": 4.0, "max": 10}
    assert measured.setting.visual_tokens == 10


def test_progress_is_told_up_to_the_end() -> None:
    steps: list[tuple[int, int]] = []
    measure.measure(
        [system("a"), system("b")],
        REQUESTS,
        PLAN,
        lambda timed, total: steps.append((timed, total)),
    )
    assert steps == [(i, 8) for i in range(1, 9)]


@pytest.mark.parametrize(
    ("systems", "requests", "word"),
    [
        ([], REQUESTS, "nothing to measure"),
        ([system()], [], "nothing to ask"),
        ([system("x"), system("x")], REQUESTS, "'x'"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(
    systems: list[System], requests: list[Request], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        measure.measure(systems, requests, PLAN)


@pytest.mark.parametrize("option", ["rounds", "threads", "tokens", "warmup"])
def test_a_plan_names_the_option_that_is_wrong(option: str) -> None:
    with pytest.raises(UsageError, match=option):
        Plan(**{option: -1})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["steps", "image_tokens", "batch"])
def test_so_does_a_setting(option: str) -> None:
    with pytest.raises(UsageError, match=option):
        Setting(**{option: -1})


def result() -> Benchmark:
    card = {"cpu": "<a CPU>", "flags": ["avx2"], "governor": None}
    return run(system("fp32"), system("int4", "int4", latent=LatentSpec())).result(card)


def shown(benchmark: Benchmark) -> str:
    out = io.StringIO()
    report.show(benchmark, Console(file=out, width=160))
    return out.getvalue()


def test_the_json_has_every_field_of_the_design() -> None:
    data = json.loads(json.dumps(result().to_json(), allow_nan=False))
    assert (data["schema"], data["version"], data["bandwidth_gb_s"]) == ("lvr-lite/bench", 1, 40.0)
    assert data["machine"]["cpu"] == "<a CPU>"
    numbers = {"p50_ms", "p90_ms", "p99_ms", "std_ms", "samples_ms"}
    others = {"name", "precision", "peak_rss_mb", "bytes", "bandwidth_fraction", "output_md5"}
    for one in data["systems"]:
        assert others <= set(one)
        assert set(one["stages"]) == set(STAGES)
        assert all(set(stage) == numbers for stage in one["stages"].values())
        assert all(set(one[f"{name}_ms"]) == numbers for name in LATENCIES)
        assert len(one["ttft_ms"]["samples_ms"]) == PLAN.rounds


def test_the_terminal_shows_every_system_and_stage() -> None:
    text = shown(result())
    for word in ("fp32", "int4", "TTFA", *STAGES, "4 interleaved rounds"):
        assert word in text


def test_a_machine_that_changed_its_speed_is_reported() -> None:
    outcome = run()
    outcome.bandwidth_after = 80.0
    assert not outcome.steady
    assert "speed changed" in shown(outcome.result({}))


def test_the_csv_has_every_sample(tmp_path: Path) -> None:
    benchmark = result()
    report.write_csv(benchmark, tmp_path / "samples.csv")
    with (tmp_path / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    count = 0
    for one in benchmark.systems:
        for name, summary in (one.stages | one.latencies).items():
            samples = [
                float(row["ms"])
                for row in rows
                if row["system"] == one.name and row["measure"] == name
            ]
            assert samples == pytest.approx(summary.samples_ms, rel=1e-5)
            count += len(samples)
    assert count == len(rows)


def test_the_page_shows_how_times_grow() -> None:
    grown = settings_run(Setting(steps=0), Setting(steps=4)).result({})
    titles = [title for title, _ in report._scaling(grown.systems)]
    assert any(title.startswith("end to end by steps: s0") for title in titles)
    assert report._scaling(result().systems) == []


def test_the_page_is_one_file_without_anything_from_elsewhere(tmp_path: Path) -> None:
    report.write_html(result(), tmp_path / "bench.html")
    html = (tmp_path / "bench.html").read_text()
    for word in ("http", "<script", "<a CPU>"):
        assert word not in html
    for word in ("&lt;a CPU&gt;", *STAGES):
        assert word in html
