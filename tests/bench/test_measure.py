"""The bench on a model made of numpy: what is measured and how it is told, never how long it
takes.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lvr_lite.bench import machine, measure, report
from lvr_lite.errors import UsageError
from lvr_lite.generate.ask import Seconds
from lvr_lite.generate.decode import Event, Prompt, Result
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.model.processor import Processor
from lvr_lite.model.spec import LatentSpec, TokenIds

IMAGE, END, START, LATENT, LVR_END, WORD, VOCABULARY, WIDTH = 0, 1, 2, 3, 4, 5, 8, 4


@dataclass
class FakeRuntime:
    """Says <|lvr_start|> where it was tuned for latents, then one word and the end of the turn, for
    as long as that is allowed.
    """

    name: str = "fake"
    latent: LatentSpec = field(default_factory=lambda: LatentSpec(steps=3))
    word: int = WORD
    noise: float = 0.0
    processor: Processor = field(
        default_factory=lambda: replace(
            read_checkpoint("tiny").processor,
            tokens=TokenIds(IMAGE, (END,), START, LATENT, LVR_END),
        )
    )
    hidden_size: int = WIDTH
    asked: list[str] = field(default_factory=list)
    said: int = 0

    def encode(self, pixel_values: np.ndarray, grids: list[tuple[int, int]]) -> np.ndarray:
        raise AssertionError("the bench prepares prompts through ask.prepare_prompt")

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return np.repeat(ids[..., None].astype(np.float32), WIDTH, axis=-1)

    def start(self, batch: int, capacity: int) -> None:
        self.said = 0

    def prefill(self, embeds: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._state(len(embeds))

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self._state(len(embeds))

    def head(self, hidden: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(hidden), VOCABULARY), np.float32)
        logits[:, START] = 3 if self.latent.steps else -1
        logits[:, END] = 2 if self.said > bool(self.latent.steps) else 0
        logits[:, self.word] = 1
        self.said += 1
        return logits

    def _state(self, rows: int) -> np.ndarray:
        state = np.ones((rows, WIDTH), np.float32)
        state[:, 0] += self.noise
        return state


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture is prepared and no memory is read."""

    def prepare(
        runtime: FakeRuntime, pictures: list[Image.Image], question: str
    ) -> tuple[Prompt, Seconds]:
        assert len(pictures) == 1
        runtime.asked.append(question)
        positions = np.tile(np.arange(2), (3, 1))
        prompt = Prompt(np.array([6, 7]), np.zeros((0, WIDTH), np.float32), positions)
        return prompt, Seconds(preprocess=0.001, vision=0.002)

    class FakePictureCache:
        def __init__(self, runtime: FakeRuntime) -> None:
            self.runtime = runtime

        def prepare_prompt(
            self, pictures: list[Image.Image], question: str
        ) -> tuple[Prompt, Seconds]:
            return prepare(self.runtime, pictures, question)

    monkeypatch.setattr(measure, "prepare_prompt", prepare)
    monkeypatch.setattr(measure, "PictureCache", FakePictureCache)
    monkeypatch.setattr(measure, "read_bandwidth", lambda *_: 40.0)
    monkeypatch.setattr(measure, "read_compute", lambda *_: 1.0)


REQUESTS = [measure.Request(Image.new("RGB", (28, 28)), question) for question in ("a", "b")]
PLAN = measure.Plan(rounds=4, warmup=1, tokens=5, seed=7)


def system(name: str = "fp32", precision: str = "fp32", **more: Any) -> measure.System:
    return measure.System(
        name, precision, FakeRuntime(name, **more), {"decoder": 4_000_000, "lm_head": 1000}
    )


def run(*systems: measure.System) -> measure.Run:
    return measure.measure(list(systems) or [system()], REQUESTS, PLAN)


def test_percentiles_are_numpys() -> None:
    samples = [float(v) for v in np.random.default_rng(0).exponential(size=37)]
    for q in (0, 50, 90, 99, 100):
        assert measure.percentile(samples, q) == pytest.approx(np.percentile(samples, q))
    assert measure.percentile([3.0], 99) == 3.0


def test_a_summary_keeps_the_raw_samples_in_their_order() -> None:
    told = measure.summary([3.0, 1.0, 2.0])
    assert told["samples_ms"] == [3.0, 1.0, 2.0]
    assert (told["p50_ms"], told["std_ms"]) == (2.0, 1.0)
    assert measure.summary([5.0])["std_ms"] == 0.0


def test_what_never_occurred_has_no_percentiles() -> None:
    assert measure.summary([]) == {
        "p50_ms": None,
        "p90_ms": None,
        "p99_ms": None,
        "std_ms": None,
        "samples_ms": [],
    }


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
    asked: list[tuple[str, str]] = []
    timed = measure.time_round

    def spy(
        runtime: FakeRuntime,
        requests: list[measure.Request],
        plan: measure.Plan,
        setting: measure.Setting,
    ) -> measure.Timing:
        asked.append((runtime.name, requests[0].question))
        return timed(runtime, requests, plan, setting)

    monkeypatch.setattr(measure, "time_round", spy)
    run(system("a"), system("b"), system("c"))
    rounds = [asked[i : i + 3] for i in range(3 * PLAN.warmup, len(asked), 3)]
    assert len(rounds) == PLAN.rounds
    for number, turns in enumerate(rounds):
        assert sorted(name for name, _ in turns) == ["a", "b", "c"]
        assert {question for _, question in turns} == {REQUESTS[number % 2].question}


def test_every_stage_has_its_samples_of_every_request() -> None:
    (measured,) = run().systems
    counts = {stage: len(measured.stage(stage)) / PLAN.rounds for stage in measure.STAGES}
    # Steps, of the even request: <|lvr_start|>, five latents, <|lvr_end|>, four of five tokens; the
    # head speaks before and at the end.
    assert counts == {
        "preprocess": 1, "vision": 1, "embed": 1, "prefill": 1, "latent_step": 5, "hand_over": 0, "text_step": 6, "lm_head": 6,
        "sampling": 6,
    }  # fmt: skip
    assert measured.stage("vision") == pytest.approx([2.0] * PLAN.rounds)


def test_a_whole_request_has_the_models_own_latents_and_a_step_is_measured_over_as_many_as_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(
        time, "perf_counter", lambda: float(next(ticks))
    )  # one second passes between any two looks
    for timing in run().systems[0].timings:
        assert timing.latencies["tpls"] == [1e3] * PLAN.tokens
        assert timing.spent["latent_step"] == 3e3


def test_latencies_are_counted_from_the_arrival_and_nest() -> None:
    for timing in run().systems[0].timings:
        (ttft,), (ttfa,), (whole,) = (
            timing.latencies["ttft"],
            timing.latencies["ttfa"],
            timing.latencies["end_to_end"],
        )
        assert 0 < ttft <= ttfa <= whole
        assert timing.latencies["tpls"] == timing.stages["latent_step"]
        assert len(timing.latencies["tpot"]) == PLAN.tokens - 1


def test_a_one_word_answer_is_made_to_go_on_while_it_is_timed() -> None:
    assert all(timing.tokens == [WORD] * PLAN.tokens for timing in run().systems[0].timings)


def test_latents_between_two_tokens_are_no_time_per_token() -> None:
    def at(kind: str, second: float) -> Event:
        return Event(0, kind, at=second)

    events = [
        at("token", 1),
        at("start", 2),
        at("latent", 3),
        at("end", 4),
        at("token", 5),
        at("token", 7),
        at("done", 7),
    ]
    assert measure._between_tokens(events) == [2]


def test_a_model_without_latents_has_no_time_per_latent_step_and_is_measured_by_its_text_steps() -> (
    None
):
    (measured,) = run(system(latent=LatentSpec())).systems
    assert measured.latency("tpls") == []
    assert measured.latency("ttfa") == measured.latency("ttft")
    assert measured.bandwidth_fraction(40.0) == pytest.approx(
        4e6 / (np.median(measured.stage("text_step")) / 1e3) / 40e9
    )


def test_the_share_of_the_bandwidth_is_the_decoders_bytes_over_a_latent_step() -> None:
    measured = measure.Measured(system())
    measured.timings = [measure.Timing({"latent_step": [1.0, 2.0, 9.0]}, {}, {}, [])]
    assert measured.bandwidth_fraction(40.0) == pytest.approx(4e6 / 2e-3 / 40e9)


def test_the_same_answers_have_the_same_md5_and_others_another() -> None:
    a, b, c = run(system("a"), system("b"), system("c", word=WORD + 1)).systems
    assert a.output_md5() == b.output_md5() != c.output_md5()


def test_quality_is_told_against_the_exact_system() -> None:
    exact, same, other = run(
        system("fp32"), system("int8", "int8", noise=0.5), system("int4", "int4", word=WORD + 1)
    ).systems
    assert exact.quality and same.quality and other.quality
    assert (exact.quality.reference, exact.quality.token_agreement, exact.quality.n) == (
        "fp32",
        1.0,
        2,
    )
    assert exact.quality.latent_cosine == pytest.approx([1.0, 1.0, 1.0])
    assert same.quality.token_agreement == 1.0
    assert all(0.9 < cosine < 0.999 for cosine in same.quality.latent_cosine)
    assert other.quality.token_agreement == 0.0


def test_without_an_exact_system_no_quality_is_claimed() -> None:
    assert run(system("int4", "int4")).systems[0].quality is None


def test_a_missing_token_is_no_agreement() -> None:
    assert (
        measure.compare("r", [Result(tokens=[5, 6])], [Result(tokens=[5])]).token_agreement == 0.5
    )


def test_a_system_measured_in_its_own_process_keeps_its_own_peak() -> None:
    alone = measure.System("a", "fp32", FakeRuntime("a"), {}, peak_rss_mb=123.0)
    first, second = run(alone, system("b")).systems
    assert (first.peak_rss_mb, first.rss_is_shared) == (123.0, False)
    assert second.rss_is_shared
    assert second.peak_rss_mb is None or second.peak_rss_mb > 1


def test_bandwidth_is_a_positive_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert machine.read_bandwidth(threads=2, megabytes=2, repeats=1) > 0
    assert machine.read_compute(repeats=1) > 0


def settings_run(*settings: measure.Setting, systems: int = 2) -> measure.Run:
    plan = measure.Plan(rounds=4, warmup=0, tokens=5, settings=settings)
    return measure.measure([system(f"s{i}") for i in range(systems)], REQUESTS, plan)


def test_every_system_is_measured_in_every_setting() -> None:
    found = settings_run(measure.Setting(steps=0), measure.Setting(steps=4)).systems
    assert [m.name for m in found] == ["s0, K 0", "s1, K 0", "s0, K 4", "s1, K 4"]
    assert [len(m.latency("end_to_end")) for m in found] == [4] * 4
    assert found[0].latency("tpls") == []
    assert [m.latency("ttfa") != [] for m in found] == [True] * 4


def test_a_batch_decodes_its_requests_together_and_counts_the_tokens_of_all() -> None:
    alone, together = settings_run(
        measure.Setting(batch=1), measure.Setting(batch=2), systems=1
    ).systems
    assert together.name == "s0, batch 2"
    assert len(together.timings[0].tokens) == 2 * len(alone.timings[0].tokens)
    assert (len(alone.latency("ttft_again")), together.latency("ttft_again")) == (4, [])
    together.timings = [measure.Timing({}, {"tpot": [20.0, 20.0, 10.0]}, {}, [])]
    assert together.throughput() == pytest.approx(100.0)


def test_only_the_first_row_of_a_batch_tells_the_time_between_tokens() -> None:
    events = [Event(row, "token", at=second) for second in (1.0, 3.0) for row in (0, 1)]
    assert measure._between_tokens(events) == [2.0]


def test_energy_is_that_of_the_packages_and_absent_where_it_is_not_told(tmp_path: Path) -> None:
    assert machine.read_joules(tmp_path) is None
    for zone, micro in (
        ("intel-rapl:0", 3_000_000),
        ("intel-rapl:1", 2_000_000),
        ("intel-rapl:0:0", 1_000_000),
    ):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{micro}\n")
    assert machine.read_joules(tmp_path) == 5.0
    measured = measure.Measured(system())
    measured.timings = [
        measure.Timing({}, {}, {}, [], joules) for joules in (None, -4.0, 1.0, 3.0)
    ]  # one without, one that wrapped round
    assert measured.joules() == 2.0


def test_systems_that_answer_differently_are_not_compared_in_silence() -> None:
    assert not run(system("a"), system("b", "int8")).warnings
    (warning,) = run(system("a"), system("b", "int8", word=WORD + 1)).warnings
    assert "b answers differently: 0%" in warning
    (warning,) = run(
        system("a", "int8"), system("b", "int4", word=WORD + 1)
    ).warnings  # with nothing exact beside them too
    assert "those of a" in warning


@pytest.mark.parametrize(
    ("wanted", "size"),
    [(64, (224, 224)), (256, (448, 448)), (6, (84, 56)), (7, (84, 56)), (1, (28, 28))],
)
def test_pictures_are_scaled_to_a_number_of_visual_tokens(
    wanted: int, size: tuple[int, int]
) -> None:
    runtime = FakeRuntime()
    assert measure._scaled(REQUESTS[0], runtime, wanted).picture.size == size
    assert measure._scaled(REQUESTS[0], runtime, None).picture.size == (28, 28)


def test_a_number_of_visual_tokens_that_a_model_does_not_give_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"image_tokens 64: s0 gives such a picture 0 visual tokens"
    ):
        plan = measure.Plan(rounds=1, settings=(measure.Setting(image_tokens=64),))
        measure.measure(
            [measure.System("s0", "fp32", FakeRuntime(), {})],
            REQUESTS,
            plan,
        )


def test_a_run_goes_on_until_its_seconds_have_passed() -> None:
    told: list[tuple[int, int]] = []
    plan = replace(PLAN, seconds=0.5)
    began = time.perf_counter()
    found = measure.measure([system("a")], REQUESTS, plan, lambda done, of: told.append((done, of)))
    assert time.perf_counter() - began > 0.5
    rounds = len(found.compute)
    assert rounds == len(found.systems[0].timings) > PLAN.rounds
    assert told[-1][0] == rounds <= told[-1][1]
    assert (
        found.systems[0].output_md5(PLAN.rounds)
        == measure.measure([system("a")], REQUESTS, PLAN).systems[0].output_md5()
    )
    assert report.to_json(found, {})["rounds"] == rounds


def test_progress_is_told_up_to_the_end() -> None:
    told: list[tuple[int, int]] = []
    measure.measure(
        [system("a"), system("b")], REQUESTS, PLAN, lambda done, of: told.append((done, of))
    )
    assert told == [(i, 8) for i in range(1, 9)]


@pytest.mark.parametrize(
    ("systems", "requests", "word"),
    [
        ([], REQUESTS, "nothing to measure"),
        ([system()], [], "nothing to ask"),
        ([system("x"), system("x")], REQUESTS, "'x'"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(
    systems: list[measure.System], requests: list[measure.Request], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        measure.measure(systems, requests, PLAN)


@pytest.mark.parametrize("option", ["rounds", "threads", "tokens", "warmup"])
def test_a_plan_names_the_option_that_is_wrong(option: str) -> None:
    with pytest.raises(UsageError, match=option):
        measure.Plan(**{option: -1})


@pytest.mark.parametrize("option", ["steps", "image_tokens", "batch"])
def test_so_does_a_setting(option: str) -> None:
    with pytest.raises(UsageError, match=option):
        measure.Setting(**{option: -1})


def measured_json() -> dict[str, Any]:
    return report.to_json(
        run(system("fp32"), system("int4", "int4", latent=LatentSpec())),
        {"cpu": "<a CPU>", "flags": ["avx2"], "governor": None},
    )


def test_the_json_has_every_field_of_the_design() -> None:
    data = json.loads(json.dumps(measured_json(), allow_nan=False))
    assert (data["schema"], data["version"], data["bandwidth_gb_s"]) == ("lvr-lite/bench", 1, 40.0)
    assert data["machine"]["cpu"] == "<a CPU>"
    values = {"p50_ms", "p90_ms", "p99_ms", "std_ms", "samples_ms"}
    for told in data["systems"]:
        assert set(told["stages"]) == set(measure.STAGES)
        assert all(set(stage) == values for stage in told["stages"].values())
        assert all(
            set(told[key]) == values
            for key in ("ttft_ms", "ttfa_ms", "tpls_ms", "tpot_ms", "end_to_end_ms")
        )
        assert {
            "name",
            "precision",
            "peak_rss_mb",
            "bytes",
            "bandwidth_fraction",
            "output_md5",
        } <= set(told)
        assert len(told["ttft_ms"]["samples_ms"]) == PLAN.rounds


def test_the_terminal_shows_every_system_and_stage() -> None:
    out = io.StringIO()
    report.show(measured_json(), Console(file=out, width=160))
    assert all(
        word in out.getvalue()
        for word in ("fp32", "int4", "TTFA", *measure.STAGES, "4 interleaved rounds")
    )


def test_a_machine_that_changed_its_speed_is_reported() -> None:
    outcome = run()
    outcome.bandwidth_after = 80.0
    assert not outcome.steady
    out = io.StringIO()
    report.show(report.to_json(outcome, {}), Console(file=out, width=160))
    assert "speed changed" in out.getvalue()


def test_the_csv_has_every_sample(tmp_path: Path) -> None:
    data = measured_json()
    report.write_csv(data, tmp_path / "samples.csv")
    with (tmp_path / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for told in data["systems"]:
        mine = [
            float(r["ms"]) for r in rows if r["system"] == told["name"] and r["measure"] == "tpot"
        ]
        assert mine == pytest.approx(told["tpot_ms"]["samples_ms"], rel=1e-5)
    assert len(rows) == sum(
        len(v["samples_ms"])
        for s in data["systems"]
        for v in [*s["stages"].values(), *(s[f"{n}_ms"] for n in measure.LATENCIES)]
    )


def test_the_page_shows_how_times_grow() -> None:
    grown = report.to_json(settings_run(measure.Setting(steps=0), measure.Setting(steps=4)), {})
    titles = [title for title, _ in report._scaling(grown["systems"])]
    assert "end to end by steps: s0" in " ".join(titles)
    assert report._scaling(measured_json()["systems"]) == []


def test_the_page_is_one_file_without_anything_from_elsewhere(tmp_path: Path) -> None:
    report.write_html(measured_json(), tmp_path / "bench.html")
    html = (tmp_path / "bench.html").read_text()
    assert Counter(
        {
            "<html": 1,
            "<title>lvr-lite bench</title>": 1,
            "http": 0,
            "<script": 0,
            "<a CPU>": 0,
            "&lt;a CPU&gt;": 1,
        }
    ) == Counter(
        {
            word: html.count(word)
            for word in (
                "<html",
                "<title>lvr-lite bench</title>",
                "http",
                "<script",
                "<a CPU>",
                "&lt;a CPU&gt;",
            )
        }
    )
    assert all(stage in html for stage in measure.STAGES)
