"""What the probe measures: answers under an intervention, retrieval, the shape of the latents.

May import: numpy and what stands above `eval`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lvr_lite.data.boxes import pool_groups_of_boxes
from lvr_lite.eval import score
from lvr_lite.eval.interventions import Feed, Subject
from lvr_lite.eval.statistics import bootstrap_mean, mcnemar, mean_cosine, participation_ratio
from lvr_lite.files import JsonObject
from lvr_lite.model.latents import near

Interval = tuple[float, float]


@dataclass(frozen=True)
class Answer:
    """What the model answered to one subject."""

    text: str
    tokens: list[int]
    right: bool


@dataclass(frozen=True)
class Flips:
    """How often the answer under donated latents is the one that the donor itself gave.

    flips_to_donor: share of the pairs.
    pairs: subjects with a donor. Under one question those count whose two answers differed.
    flips_interval: of `flips_to_donor`, 95 %.
    lift: over the share whose answer was the donor's before.
    flips_by_noise: share of the same pairs whose answer is the donor's under noise, which is what
        mere disturbance brings; None without noise.
    """

    flips_to_donor: float | None
    pairs: int
    flips_interval: Interval | None
    lift: float | None
    flips_by_noise: float | None


@dataclass(frozen=True)
class Effect:
    """One intervention against the baseline, on the subjects that it applies to.

    n: of these subjects; without any, every share is None.
    difference: of the accuracy, less that of the baseline.
    difference_interval: 95 %, by paired bootstrap.
    mcnemar_p: exact.
    changed, changed_count: share and number of the answers that changed.
    by_type: of each type of question "n" and "accuracy".
    flips: where latents were donated.
    """

    n: int
    accuracy: float | None
    interval: Interval | None
    baseline_accuracy: float | None
    difference: float | None
    difference_interval: Interval | None
    mcnemar_p: float | None
    changed: float | None
    changed_count: int
    by_type: dict[str, JsonObject]
    flips: Flips | None

    def to_json(self) -> JsonObject:
        fields = asdict(self)
        flips: JsonObject = fields.pop("flips") or {"flips_to_donor": None}
        return fields | flips


@dataclass(frozen=True)
class StepRetrieval:
    """`Retrieval` of one latent step."""

    r_at_1: float
    own_box: float
    own_box_chance: float


@dataclass(frozen=True)
class Retrieval:
    """How often the visual token of its own picture that a latent is nearest to, by cosine, lies in
    the boxes. All but `n` and `by_step` are None where nothing has boxes, or latents do not vary.

    n: subjects with boxes.
    r_at_1: share of the latents.
    interval: of `r_at_1`, 95 %.
    chance: share of the picture's visual tokens that lie in the boxes.
    ratio: of `r_at_1` to `chance`.
    own_box: share whose nearest token lies in the group that the step stands for in training.
    own_box_chance: share of the picture's visual tokens in that group.
    """

    n: int = 0
    r_at_1: float | None = None
    interval: Interval | None = None
    chance: float | None = None
    ratio: float | None = None
    own_box: float | None = None
    own_box_chance: float | None = None
    by_step: Sequence[StepRetrieval] = ()

    def to_json(self) -> JsonObject:
        return asdict(self)


@dataclass(frozen=True)
class Geometry:
    """The shape of a set of latents. Ignored latents were alike to 0.8 … 0.98 (arXiv 2605.18445).

    participation_ratio: number of directions in use, the mean over the steps.
    participation_ratio_by_step: of each step.
    participation_ratio_all: of all steps together.
    similarity: mean cosine between items, by step and then averaged.
    similarity_centred: the same after the mean of each step is taken off.
    """

    participation_ratio: float | None
    participation_ratio_by_step: list[float | None]
    participation_ratio_all: float | None
    similarity: float | None
    similarity_centred: float | None

    def to_json(self) -> JsonObject:
        return asdict(self)


def measure(
    subjects: Sequence[Subject],
    answers: Mapping[str, Sequence[Answer]],
    name: str,
    feed: Feed,
    seed: int,
) -> Effect:
    """The effect of the intervention `name`.

    answers: by intervention, with "none"; one for each subject.
    seed: of the bootstrap.
    """
    rows = [i for i, vectors in enumerate(feed.latents) if vectors is not None]
    n = len(rows)
    now = [answers[name][i] for i in rows]
    before = [answers["none"][i] for i in rows]
    right = np.array([answer.right for answer in now], bool)
    was_right = np.array([answer.right for answer in before], bool)
    gain = right.astype(int) - was_right
    changed = sum(a.tokens != b.tokens for a, b in zip(now, before, strict=True))
    interval = None
    difference_interval = None
    p = None
    if n:
        interval = score.wilson(int(right.sum()), n)
        difference_interval = bootstrap_mean(gain, seed)
        p = mcnemar(int((gain < 0).sum()), int((gain > 0).sum()))
    return Effect(
        n=n,
        accuracy=_share(right),
        interval=interval,
        baseline_accuracy=_share(was_right),
        difference=_share(gain),
        difference_interval=difference_interval,
        mcnemar_p=p,
        changed=changed / n if n else None,
        changed_count=changed,
        by_type=_by_type([subjects[i].sample.type for i in rows], right),
        flips=None if feed.donors is None else flips(answers, name, feed.donors),
    )


def _by_type(types: list[str | None], right: np.ndarray) -> dict[str, JsonObject]:
    """Number and accuracy of the answers of each type of question. right: of each answer."""
    by_type: dict[str, JsonObject] = {}
    for kind in sorted({kind for kind in types if kind is not None}):
        of_kind = right[[kind == other for other in types]]
        by_type[kind] = {"n": len(of_kind), "accuracy": _share(of_kind)}
    return by_type


def flips(answers: Mapping[str, Sequence[Answer]], name: str, donors: np.ndarray) -> Flips:
    """Counts the flips under the intervention `name`. donors (N,): of each subject, or -1."""
    own = _texts(answers["none"])
    any_answer = name != "donor_same_question"
    pairs = []
    for i, donor in enumerate(donors.tolist()):
        if donor >= 0 and (any_answer or own[i] != own[donor]):
            pairs.append((i, donor))

    def as_donor(intervention: str) -> np.ndarray:
        """Of each pair, whether the answer is the one that the donor itself gave."""
        texts = _texts(answers[intervention])
        return np.array([texts[i] == own[donor] for i, donor in pairs], bool)

    flipped = as_donor(name)
    before = as_donor("none")
    by_noise = None
    if "noise" in answers:
        by_noise = _share(as_donor("noise"))
    interval = None
    if pairs:
        interval = score.wilson(int(flipped.sum()), len(pairs))
    return Flips(
        flips_to_donor=_share(flipped),
        pairs=len(pairs),
        flips_interval=interval,
        lift=_share(flipped.astype(int) - before),
        flips_by_noise=by_noise,
    )


def _texts(answers: Sequence[Answer]) -> list[str]:
    return [score.normalized(answer.text) for answer in answers]


def _share(values: np.ndarray) -> float | None:
    if not len(values):
        return None
    return float(values.mean())


def retrieval(
    latents: np.ndarray,
    features: Sequence[np.ndarray],
    boxes: Sequence[list[np.ndarray]],
    seed: int,
) -> Retrieval:
    """R@1 of free-running latents.

    latents: (N, K, H).
    features: of each subject its visual tokens (T, H).
    boxes: of each subject the token indices of each box; [] where there are none.
    seed: of the bootstrap.

    What all share is taken off first: from a latent the mean over the set at its step, from a
    visual token the mean of all in the set.
    """
    steps = latents.shape[1]
    centred = latents.astype(np.float64) - latents.mean(0, dtype=np.float64)
    lengths = np.linalg.norm(centred, axis=-1)
    with_boxes = [i for i, of_subject in enumerate(boxes) if of_subject]
    negligible = 1e-5 * np.linalg.norm(latents, axis=-1).mean()
    if not with_boxes or lengths.max() <= negligible:
        return Retrieval()
    total = np.sum([tokens.sum(0, dtype=np.float64) for tokens in features], axis=0)
    middle = total / sum(map(len, features))
    shape = (len(with_boxes), steps)
    hits = np.zeros(shape)
    own_hits = np.zeros(shape)
    chances = np.zeros(shape)
    own_chances = np.zeros(shape)
    for row, i in enumerate(with_boxes):
        count = len(features[i])
        nearest = near(centred[i], features[i], middle)
        # A latent that is the mean points at nothing.
        nearest[lengths[i] <= negligible] = -1
        union = np.unique(np.concatenate(boxes[i]))
        groups = pool_groups_of_boxes(boxes[i], steps)
        hits[row] = np.isin(nearest, union)
        own_hits[row] = [token in group for token, group in zip(nearest, groups, strict=True)]
        chances[row] = len(union) / count
        own_chances[row] = [len(group) / count for group in groups]
    by_step = [
        StepRetrieval(hits[:, k].mean(), own_hits[:, k].mean(), own_chances[:, k].mean())
        for k in range(steps)
    ]
    return Retrieval(
        n=len(with_boxes),
        r_at_1=hits.mean(),
        interval=bootstrap_mean(hits.mean(1), seed),
        chance=chances.mean(),
        ratio=hits.mean() / chances.mean(),
        own_box=own_hits.mean(),
        own_box_chance=own_chances.mean(),
        by_step=by_step,
    )


def geometry(latents: np.ndarray) -> Geometry:
    """The shape of latents (N, K, H)."""
    _, steps, width = latents.shape
    centred = latents - latents.mean(0, dtype=np.float64)
    by_step = [participation_ratio(latents[:, k]) for k in range(steps)]
    similarities = [mean_cosine(latents[:, k]) for k in range(steps)]
    similarities_centred = [mean_cosine(centred[:, k]) for k in range(steps)]
    together = latents.reshape(-1, width)
    return Geometry(
        participation_ratio=_mean(by_step),
        participation_ratio_by_step=by_step,
        participation_ratio_all=participation_ratio(together),
        similarity=_mean(similarities),
        similarity_centred=_mean(similarities_centred),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return sum(known) / len(known)
