"""What the probe feeds a model in place of its own latents.

May import: numpy and what stands above `eval`.

    none           its own K latents (K, H): the baseline
    zero           zeros
    noise          Gaussian directions, each at the length of the vector that it replaces
    mean           the mean over all questions, step by step
    first          the first one K times
    shuffle        the same ones in another order
    donor_*        those of another picture that asks for another answer: under another question
                   (unrelated), or under the same one
    oracle         the visual tokens in the boxes, pooled into K groups
    k0, markers    no latents: the loop is forbidden, or opened and closed at once
    self           its own again, the sham: it must change nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lvr_lite.data.boxes import pool_groups_of_boxes
from lvr_lite.data.samples import Sample
from lvr_lite.errors import UsageError
from lvr_lite.eval import score
from lvr_lite.eval.statistics import unit
from lvr_lite.generate.decode import Prompt
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


@dataclass(frozen=True)
class Subject:
    """One item ready to be asked.

    prompt: with its visual tokens.
    boxes: the visual tokens of each of the sample's boxes.
    picture: names the picture by its contents.
    visual_tokens: of each of its pictures.
    """

    sample: Sample
    prompt: Prompt
    boxes: list[np.ndarray]
    picture: str
    visual_tokens: Sequence[int] = ()


@dataclass(frozen=True)
class Feed:
    """What an intervention feeds to each of N subjects.

    latents: of each (K_i, H) float32, or None where the intervention does not apply.
    donors: (N,) whose latents they are, or -1; None where there are no donors.
    """

    latents: list[np.ndarray | None]
    donors: np.ndarray | None = None


def chosen(only: str | None) -> list[str]:
    """The interventions of a list such as "noise,k0", in their usual order, "none" with them; all
    for None. Raises UsageError.
    """
    if only is None:
        return list(INTERVENTIONS)
    names = {name.strip() for name in only.split(",")}
    if unknown := sorted(names - set(INTERVENTIONS)):
        known = ", ".join(INTERVENTIONS)
        raise UsageError(f"--only {only}: {unknown[0]!r} is no intervention (known: {known})")
    return [name for name in INTERVENTIONS if name in names | {"none"}]


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
        if steps == 1:
            return Feed([None] * count)
        orders = other_orders(count, steps, rng)
        shuffled = np.take_along_axis(latents, orders[:, :, None], axis=1)
        return Feed(list(shuffled))
    if name in ("donor_unrelated", "donor_same_question"):
        donors = choose_donors(subjects, name == "donor_same_question", rng)
        donated = [None if donor < 0 else latents[donor] for donor in donors]
        return Feed(donated, donors)
    if name == "oracle":
        return Feed([_oracle(subject, steps, width, spec) for subject in subjects])
    if name == "markers":
        return Feed(list(latents[:, :0]))
    assert name in ("self", "k0"), name
    # Under k0 nothing is fed, and it applies to all.
    return Feed(list(latents))


def noise_like(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian directions, each at the length of the vector in its place; vectors (…, H)
    float32.
    """
    directions = unit(rng.standard_normal(vectors.shape))
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(directions * lengths, np.float32)


def other_orders(count: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """(count, steps) random orders of 0 … steps - 1, steps >= 2, none of them that order itself."""
    own = np.arange(steps)
    orders = rng.permuted(np.tile(own, (count, 1)), axis=1)
    while True:
        unchanged = (orders == own).all(1)
        same = np.flatnonzero(unchanged)
        if not len(same):
            return orders
        orders[same] = rng.permuted(orders[same], axis=1)


def choose_donors(
    subjects: Sequence[Subject], same_question: bool, rng: np.random.Generator
) -> np.ndarray:
    """(N,) int64: for each subject a random one of another picture and another expected answer,
    whose question is the same one or another one; -1 where there is none.
    """
    questions = _numbered([subject.sample.question.strip() for subject in subjects])
    answers = _numbered([score.normalized(subject.sample.answer) for subject in subjects])
    pictures = _numbered([subject.picture for subject in subjects])
    donors = np.full(len(subjects), -1, np.int64)
    for i in range(len(subjects)):
        right_question = (questions == questions[i]) == same_question
        other_answer = answers != answers[i]
        other_picture = pictures != pictures[i]
        fitting = np.flatnonzero(right_question & other_answer & other_picture)
        if len(fitting):
            donors[i] = rng.choice(fitting)
    return donors


def _numbered(texts: Sequence[str]) -> np.ndarray:
    """(N,): the same number for the same text."""
    _, numbers = np.unique(texts, return_inverse=True)
    return np.asarray(numbers)


def _oracle(subject: Subject, steps: int, width: int, spec: LatentSpec) -> np.ndarray | None:
    """The K means (K, H) of the visual tokens in the boxes that training pulls latents towards, as
    feedback would feed them.
    """
    if not subject.boxes:
        return None
    features = subject.prompt.features[:, :width]
    groups = pool_groups_of_boxes(subject.boxes, steps)
    pooled = np.stack([features[group].mean(0) for group in groups])
    if spec.feedback == "norm-matched":
        pooled = spec.fed(pooled)
    return np.asarray(pooled, np.float32)
