"""Do the latents carry the answer? Interventions on them, retrieval of what they point at, and a
verdict. May import: the core, numpy.

The model answers once as it is. Then it answers the same items in the same batches again and again,
and nothing differs but what its latent steps are fed (`decode(..., latents=)`). A model that
ignores its latents answers alike whatever that is (arXiv 2605.18445, 2602.22766); in one whose
latents carry the answer, noise costs accuracy, and the latents of another picture bring that
picture's answer.

    what is fed in place of a question's own K latents (K, H)
    zero           zeros
    noise          Gaussian directions, each at the length of the vector that it replaces
    mean           the mean over all questions, step by step
    first          the first one K times
    shuffle        the same ones in another order
    donor_*        those of another picture that asks for another answer: under another question (unrelated), or under the same one
    oracle         the visual tokens in the boxes, pooled into K groups
    k0, markers    none: the loop is forbidden, or opened and closed at once
    self           its own again, the sham: it must change nothing
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvr_lite.data.boxes import pool_groups_of_boxes, visual_tokens_in_boxes
from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item
from lvr_lite.errors import UsageError
from lvr_lite.eval import score
from lvr_lite.eval.statistics import (
    RESAMPLES,
    bootstrap_mean,
    mcnemar,
    mean_cosine,
    participation_ratio,
    unit,
)
from lvr_lite.eval.suite import MAX_TOKENS, load_suite
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, Prompt, Result, decode
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.latents import near
from lvr_lite.model.spec import LatentSpec

INTERVENTIONS = (
    "none",
    "zero",
    "noise",
    "mean",
    "first",
    "shuffle",
    "donor_unrelated",
    "donor_same_question",
    "oracle",
    "k0",
    "markers",
    "self",
)
COSTLY, FLIPPED, LIFTED = 0.20, 0.40, 0.10  # criteria of the verdict: see `verdict`


@dataclass(frozen=True)
class Subject:
    """One item ready to be asked: its prompt (with its visual tokens), the visual tokens of each of
    its boxes, and its picture's name.
    """

    sample: Sample
    prompt: Prompt
    boxes: list[np.ndarray]
    picture: str


@dataclass(frozen=True)
class Said:
    """What the model answered to one subject."""

    text: str
    tokens: list[int]
    right: bool


@dataclass(frozen=True)
class Feed:
    """What an intervention feeds to each of N subjects: (K_i, H) float32, or None where it does not
    apply. donors (N,): whose, or -1.
    """

    latents: list[np.ndarray | None]
    donors: np.ndarray | None = None


def load_items(data: str, limit: int, seed: int) -> Iterator[Item]:
    """Held-out scenes (data "scenes") or the first `limit` items of a file. Raises DataError,
    UsageError.
    """
    if data != "scenes" and not Path(data).is_file():
        raise UsageError(f"--data {data}: neither scenes nor a file of samples")
    return load_suite(data, limit, seed)


def chosen(only: str | None) -> list[str]:
    """The interventions of a list such as "noise,k0", in their usual order, "none" with them; all
    for None. Raises UsageError.
    """
    if only is None:
        return list(INTERVENTIONS)
    names = {name.strip() for name in only.split(",")}
    if unknown := sorted(names - set(INTERVENTIONS)):
        raise UsageError(
            f"--only {only}: {unknown[0]!r} is no intervention (known: {', '.join(INTERVENTIONS)})"
        )
    return [name for name in INTERVENTIONS if name in names | {"none"}]


def probe(
    runtime: Runtime,
    items: Iterable[Item],
    names: Sequence[str] = INTERVENTIONS,
    seed: int = 0,
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Answer all items under each of the interventions `names`; the `probe` JSON (docs/design.md)
    without "data".

    Interventions concern the items in whose answer the model opened the latent loop; `opened`
    counts them. seed: of noise, orders, donors and the bootstrap. progress: is told (items done,
    all there are to do). Raises UsageError for a model without latents, for no items, and where the
    loop was never opened.
    """
    if not runtime.latent.steps:
        raise UsageError(
            f"{runtime.name}: has no latent steps, so there is nothing to probe; give a model tuned with latents"
        )
    subjects = [_subject(runtime, *item) for item in items]
    if not subjects:
        raise UsageError("no items to probe: give a file with samples")
    asked = _Asked(runtime, subjects, batch, progress, len(subjects) * len({"none", *names}))
    own, results = asked.answers()
    opened = np.array([i for i, result in enumerate(results) if result.latents], np.int64)
    if not len(opened):
        raise UsageError(
            f"{runtime.name}: opened the latent loop in none of {len(subjects)} answers, so there is nothing to probe"
        )
    latents = np.stack([results[i].latents for i in opened])
    those = [subjects[i] for i in opened]
    feeds, said = {"none": Feed(list(latents))}, {"none": [own[i] for i in opened]}
    for number, name in enumerate(INTERVENTIONS):
        if name in names and name != "none":
            feeds[name] = intervene(
                name, those, latents, runtime.latent, np.random.default_rng([seed, number])
            )
            said[name] = asked.answers_of(opened, feeds[name], forbidden=name == "k0")
    interventions = {name: measure(those, said, name, feed, seed) for name, feed in feeds.items()}
    everyone = np.array([s.right for s in own])
    found = retrieval(
        latents,
        [s.prompt.features[:, : latents.shape[2]] for s in those],
        [s.boxes for s in those],
        seed,
    )
    data: dict[str, Any] = {
        "schema": "lvr-lite/probe",
        "version": 1,
        "model": runtime.name,
        "latent": runtime.latent.to_json(),
        "n": len(subjects),
        "opened": len(opened),
        "seeds": {"interventions": seed, "bootstrap": seed},
        "criteria": {
            "noise_costs": COSTLY,
            "flips_to_donor": FLIPPED,
            "lift": LIFTED,
            "interval": 0.95,
            "resamples": RESAMPLES,
        },
        "baseline": {
            "accuracy": everyone.mean(),
            "interval": score.wilson(int(everyone.sum()), len(subjects)),
        },
        "interventions": interventions,
        "retrieval": found,
        "geometry": geometry(latents),
        "verdict": verdict(interventions, found, runtime.latent),
        "items": [_item(those, said, feeds, i) for i in range(len(those))],
    }
    return dict(_plain(data))


# -------------------------------------------------------------------------------------------------------------
# asking


def _subject(runtime: Runtime, sample: Sample, pictures: tuple[Any, ...]) -> Subject:
    prompt, _ = prepare_prompt(runtime, pictures, sample.question)
    boxes: list[np.ndarray] = []
    if sample.boxes and pictures:  # boxes lie in the first picture, whose tokens come first
        grid = runtime.processor.grid_of(pictures[0].height, pictures[0].width)
        boxes = visual_tokens_in_boxes(sample.boxes, grid, runtime.processor)
    return Subject(sample, prompt, boxes, hashlib.sha256(prompt.features.tobytes()).hexdigest())


class _Asked:
    """The subjects in fixed batches, so that under every intervention a row has the same
    companions.
    """

    def __init__(
        self,
        runtime: Runtime,
        subjects: list[Subject],
        batch: int,
        progress: Callable[[int, int], None] | None,
        total: int,
    ) -> None:
        self.runtime, self.subjects, self.batch = runtime, subjects, batch
        self.progress, self.done, self.total = progress, 0, total

    def answers(
        self, latents: Sequence[np.ndarray | None] | None = None, options: Options | None = None
    ) -> tuple[list[Said], list[Result]]:
        """Answers and decodings of all subjects, each fed its entry of `latents`, or its own
        latents where that is None.
        """
        said, results = [], []
        for start in range(0, len(self.subjects), self.batch):
            group = self.subjects[start : start + self.batch]
            given = None if latents is None else list(latents[start : start + self.batch])
            found = decode(
                self.runtime,
                [s.prompt for s in group],
                options or Options(max_tokens=MAX_TOKENS),
                given,
            )
            for subject, result in zip(group, found, strict=True):
                text = self.runtime.processor.text(result.tokens)
                said.append(
                    Said(text, result.tokens, score.is_correct(text, subject.sample.answer))
                )
            results += found
            self.done += len(group)
            if self.progress is not None:
                self.progress(self.done, self.total)
        return said, results

    def answers_of(self, rows: np.ndarray, feed: Feed, forbidden: bool) -> list[Said]:
        """What the subjects `rows` answer when they are fed `feed`, one entry for each, or when
        latents are forbidden.
        """
        given = dict(zip(rows.tolist(), feed.latents, strict=True))
        if forbidden:
            said, _ = self.answers(options=Options(max_tokens=MAX_TOKENS, steps=0))
        else:
            said, _ = self.answers([given.get(i) for i in range(len(self.subjects))])
        return [said[i] for i in rows]


# ------------------------------------------------------------------------------------------------------
# interventions


def intervene(
    name: str,
    subjects: Sequence[Subject],
    latents: np.ndarray,
    spec: LatentSpec,
    rng: np.random.Generator,
) -> Feed:
    """What the intervention `name` feeds. latents (N, K, H) float32: the subjects' own, as they
    were fed.
    """
    count, steps, width = latents.shape
    if name == "zero":
        return Feed(list(np.zeros_like(latents)))
    if name == "noise":
        return Feed(list(noise_like(latents, rng)))
    if name == "mean":
        return Feed([latents.mean(0)] * count)
    if name == "first":
        return Feed(list(np.repeat(latents[:, :1], steps, axis=1)))
    if name == "shuffle":
        return Feed(
            [
                own[order]
                for own, order in zip(latents, other_orders(count, steps, rng), strict=True)
            ]
            if steps > 1
            else [None] * count
        )
    if name in ("donor_unrelated", "donor_same_question"):
        donors = choose_donors(subjects, name == "donor_same_question", rng)
        return Feed([latents[d] if d >= 0 else None for d in donors], donors)
    if name == "oracle":
        return Feed([_oracle(subject, steps, width, spec) for subject in subjects])
    if name == "markers":
        return Feed(list(latents[:, :0]))
    assert name in ("self", "k0"), name
    return Feed(list(latents))  # under k0 nothing is fed, and it concerns all


def noise_like(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian directions, each at the length of the vector in its place; vectors (…, H)
    float32.
    """
    drawn = unit(rng.standard_normal(vectors.shape))
    return np.asarray(drawn * np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def other_orders(count: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """(count, steps) random orders of 0 … steps - 1, steps >= 2, none of them that order itself."""
    orders = rng.permuted(np.tile(np.arange(steps), (count, 1)), axis=1)
    while len(same := np.flatnonzero((orders == np.arange(steps)).all(1))):
        orders[same] = rng.permuted(orders[same], axis=1)
    return orders


def choose_donors(
    subjects: Sequence[Subject], same_question: bool, rng: np.random.Generator
) -> np.ndarray:
    """(N,) int64: for each subject a random one of another picture and another expected answer,
    whose question is the same one or another one; -1 where there is none.
    """
    texts = (
        [s.sample.question.strip() for s in subjects],
        [score.normalized(s.sample.answer) for s in subjects],
        [s.picture for s in subjects],
    )
    questions, answers, pictures = (np.unique(t, return_inverse=True)[1] for t in texts)
    donors = np.full(len(subjects), -1, np.int64)
    for i in range(len(subjects)):
        fit = (
            ((questions == questions[i]) == same_question)
            & (answers != answers[i])
            & (pictures != pictures[i])
        )
        if fit.any():
            donors[i] = rng.choice(np.flatnonzero(fit))
    return donors


def _oracle(subject: Subject, steps: int, width: int, spec: LatentSpec) -> np.ndarray | None:
    """The K means (K, H) of the visual tokens in the boxes that training pulls latents towards, as
    feedback would feed them.
    """
    if not subject.boxes:
        return None
    features = subject.prompt.features[:, :width]
    pooled = np.stack(
        [features[group].mean(0) for group in pool_groups_of_boxes(subject.boxes, steps)]
    )
    return np.asarray(spec.fed(pooled) if spec.feedback == "norm-matched" else pooled, np.float32)


# ----------------------------------------------------------------------------------------------------------
# measuring


def measure(
    subjects: Sequence[Subject], said: dict[str, list[Said]], name: str, feed: Feed, seed: int
) -> dict[str, Any]:
    """One intervention against the baseline on the same subjects, those that it applies to; no
    subject gives n 0 and None.
    """
    rows = [i for i, vectors in enumerate(feed.latents) if vectors is not None]
    now, before = [said[name][i] for i in rows], [said["none"][i] for i in rows]
    right, was_right = (np.array([s.right for s in answers], bool) for answers in (now, before))
    changed = sum(a.tokens != b.tokens for a, b in zip(now, before, strict=True))
    types = [subjects[i].sample.type for i in rows]
    found: dict[str, Any] = {
        "n": len(rows),
        "accuracy": _share(right),
        "interval": score.wilson(int(right.sum()), len(rows)) if rows else None,
        "baseline_accuracy": _share(was_right),
        "difference": _share(right.astype(int) - was_right),
        "difference_interval": bootstrap_mean(right.astype(int) - was_right, seed)
        if rows
        else None,
        "mcnemar_p": mcnemar(int((was_right & ~right).sum()), int((right & ~was_right).sum()))
        if rows
        else None,
        "changed": changed / len(rows) if rows else None,
        "changed_count": changed,
        "by_type": {
            kind: {"n": types.count(kind), "accuracy": _share(right[[t == kind for t in types]])}
            for kind in sorted({t for t in types if t is not None})
        },
        "flips_to_donor": None,
    }
    return found | (flips(said, name, feed.donors) if feed.donors is not None else {})


def flips(said: dict[str, list[Said]], name: str, donors: np.ndarray) -> dict[str, Any]:
    """How often the answer under donated latents is the one that the donor itself gave.

    Pairs under one question count where the two gave different answers. lift: over the share whose
    answer was the donor's before. flips_by_noise: the share of the same pairs whose answer is the
    donor's under noise, which is what mere disturbance brings.
    """
    own = [score.normalized(s.text) for s in said["none"]]
    now = [score.normalized(s.text) for s in said[name]]
    pairs = [
        (i, int(d))
        for i, d in enumerate(donors)
        if d >= 0 and (name != "donor_same_question" or own[i] != own[d])
    ]
    noise = [score.normalized(s.text) for s in said["noise"]] if "noise" in said else None
    flipped = np.array([now[i] == own[d] for i, d in pairs], bool)
    lifted = flipped.astype(int) - np.array([own[i] == own[d] for i, d in pairs], int)
    return {
        "pairs": len(pairs),
        "flips_to_donor": _share(flipped),
        "flips_interval": score.wilson(int(flipped.sum()), len(pairs)) if pairs else None,
        "lift": _share(lifted),
        "flips_by_noise": _share(np.array([noise[i] == own[d] for i, d in pairs]))
        if noise is not None
        else None,
    }


def _share(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def retrieval(
    latents: np.ndarray,
    features: Sequence[np.ndarray],
    boxes: Sequence[list[np.ndarray]],
    seed: int,
) -> dict[str, Any]:
    """R@1: how often the visual token of its own picture that a latent is nearest to, by cosine,
    lies in the boxes.

    latents (N, K, H), free-running; features: N times (T, H); boxes: N times the token indices of
    each box, [] where there are none. What all share is taken off first: of a latent the mean over
    the set at its step, of a visual token the mean of all in the set. chance is area-matched: the
    share of the picture's visual tokens that lie in the boxes. own_box: the nearest lies in the
    very group of tokens that the step stands for in training. None where nothing has boxes, or the
    latents do not vary.
    """
    steps = latents.shape[1]
    centred = latents.astype(np.float64) - latents.mean(0, dtype=np.float64)
    there = [i for i, found in enumerate(boxes) if found]
    same = 1e-5 * np.linalg.norm(latents, axis=-1).mean()
    if not there or np.linalg.norm(centred, axis=-1).max() <= same:
        return dict.fromkeys(
            ("r_at_1", "interval", "chance", "ratio", "own_box", "own_box_chance")
        ) | {"n": 0, "by_step": []}
    middle = np.sum([f.sum(0, dtype=np.float64) for f in features], axis=0) / sum(
        map(len, features)
    )
    hits, own_hits, chances, own_chances = (np.zeros((len(there), steps)) for _ in range(4))
    for row, i in enumerate(there):
        nearest = near(centred[i], features[i], middle)
        nearest[
            np.linalg.norm(centred[i], axis=1) <= same
        ] = -1  # a latent that is the mean points at nothing
        union, groups = np.unique(np.concatenate(boxes[i])), pool_groups_of_boxes(boxes[i], steps)
        hits[row] = np.isin(nearest, union)
        own_hits[row] = [token in group for token, group in zip(nearest, groups, strict=True)]
        chances[row] = len(union) / len(features[i])
        own_chances[row] = [len(group) / len(features[i]) for group in groups]
    return {
        "n": len(there),
        "r_at_1": hits.mean(),
        "interval": bootstrap_mean(hits.mean(1), seed),
        "chance": chances.mean(),
        "ratio": hits.mean() / chances.mean(),
        "own_box": own_hits.mean(),
        "own_box_chance": own_chances.mean(),
        "by_step": [
            {
                "r_at_1": hits[:, k].mean(),
                "own_box": own_hits[:, k].mean(),
                "own_box_chance": own_chances[:, k].mean(),
            }
            for k in range(steps)
        ],
    }


def geometry(latents: np.ndarray) -> dict[str, Any]:
    """Shape of the set of latents (N, K, H): participation ratio (number of directions in use) and
    mean cosine between items, by step and then averaged; of all steps together too. Ignored latents
    were alike to 0.8 … 0.98 (arXiv 2605.18445).
    """
    by_step = [participation_ratio(latents[:, k]) for k in range(latents.shape[1])]
    centred = latents - latents.mean(0, dtype=np.float64)
    return {
        "participation_ratio": _mean(by_step),
        "participation_ratio_by_step": by_step,
        "participation_ratio_all": participation_ratio(latents.reshape(-1, latents.shape[2])),
        "similarity": _mean([mean_cosine(latents[:, k]) for k in range(latents.shape[1])]),
        "similarity_centred": _mean([mean_cosine(centred[:, k]) for k in range(latents.shape[1])]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


# ------------------------------------------------------------------------------------------------------------
# verdict


def verdict(
    interventions: dict[str, dict[str, Any]], found: dict[str, Any], spec: LatentSpec
) -> str:
    """One sentence with its numbers. The latents

    carry the answer: noise costs at least COSTLY, its interval clear of 0, and same-question donors
    flip at least FLIPPED of their pairs; matter in part: noise's cost is clear of 0, or the flips'
    lift is at least LIFTED; are ignored: neither. A sham that changed anything makes the probe
    itself unsound; latents that are all the same token carry nothing whatever it costs. In
    bottleneck mode the question and the donor's latents are all that the text sees, but for the
    places that these take in the picture, so that the donor's answer, right or wrong, comes nearly
    by construction: there lift proves nothing, and noise decides.
    """
    noise, donor = interventions.get("noise"), interventions.get("donor_same_question")
    numbers = ", ".join(_numbers(noise, donor, found, spec))
    if sham := interventions.get("self", {}).get("changed_count"):
        return f"the probe itself is unsound: {numbers}; the sham changed {sham} answers"
    if spec.feedback == "token":
        return f"the latents carry nothing by construction, the same token is fed whatever the picture: {numbers}"
    if noise is None or donor is None:
        return f"not judged, which takes noise and donor_same_question: {numbers}"
    clear = noise["difference_interval"][1] < 0
    flipped, lift = donor["flips_to_donor"] or 0, donor["lift"] or 0
    if spec.mode == "bottleneck":
        lift = 0
    if clear and -noise["difference"] >= COSTLY and flipped >= FLIPPED:
        return f"the latents carry the answer: {numbers}"
    if clear or lift >= LIFTED:
        return f"the latents matter in part: {numbers}"
    return f"the latents are ignored: {numbers}"


def _numbers(
    noise: dict[str, Any] | None,
    donor: dict[str, Any] | None,
    found: dict[str, Any],
    spec: LatentSpec,
) -> Iterator[str]:
    if noise is not None:
        low, high = noise["difference_interval"]
        yield f"noise costs {_points(-noise['difference'])} points ({_points(-high)} to {_points(-low)}, n = {noise['n']})"
    if donor is not None and donor["pairs"]:
        told = f"{_points(donor['flips_to_donor'])} % of {donor['pairs']} pairs (lift {_points(donor['lift'])} points"
        told += f"; under noise {_points(donor['flips_by_noise'])} %)" if noise is not None else ")"
        yield f"the same-question donor's answer comes in {told}" + (
            ", nearly by construction" if spec.mode == "bottleneck" else ""
        )
    elif donor is not None:
        yield "no item has a same-question donor"
    yield (
        f"R@1 is {found['ratio']:.1f} times chance"
        if found["ratio"] is not None
        else "R@1 is not defined"
    )


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0:.1f}"  # + 0: no minus before a zero


def _item(
    subjects: Sequence[Subject], said: dict[str, list[Said]], feeds: dict[str, Feed], i: int
) -> dict[str, Any]:
    """One item's answers under each intervention that applies to it, so that every number can be
    counted again.
    """
    sample = subjects[i].sample
    donors = {
        name: subjects[int(f.donors[i])].sample.id
        for name, f in feeds.items()
        if f.donors is not None and f.donors[i] >= 0
    }
    answers = {
        name: said[name][i].text for name, feed in feeds.items() if feed.latents[i] is not None
    }
    return {
        "id": sample.id,
        "type": sample.type,
        "expected": sample.answer,
        "donors": donors,
        "answers": answers,
    }


def _plain(value: Any) -> Any:
    """A value as JSON takes it, numbers with four significant digits."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, (float, np.floating)) else value
