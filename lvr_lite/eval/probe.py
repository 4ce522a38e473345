"""Do the latents carry the answer? A model answers the same items again and again, and nothing
differs but what its latent steps are fed.

May import: numpy and what stands above `eval`.

The model answers once as it is, then under each intervention in the same batches
(`decode(..., latents=)`). A model that ignores its latents answers alike whatever they are
(arXiv 2605.18445, 2602.22766). In one whose latents carry the answer, noise costs accuracy, and the
latents of another picture bring that picture's answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lvr_lite.data.boxes import visual_tokens_in_boxes
from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item, Pictures
from lvr_lite.errors import UsageError
from lvr_lite.eval import score
from lvr_lite.eval.interventions import INTERVENTIONS, Feed, Subject, intervene
from lvr_lite.eval.measures import Answer, geometry, measure, retrieval
from lvr_lite.eval.plan import load_suite, tokens_for
from lvr_lite.eval.statistics import RESAMPLES
from lvr_lite.eval.verdict import COSTLY, FLIPPED, LIFTED, verdict
from lvr_lite.files import JsonObject
from lvr_lite.generate.ask import median_and_most, prepare_prompt, visual_tokens
from lvr_lite.generate.decode import Options, Result, decode
from lvr_lite.generate.records import Look
from lvr_lite.generate.runtime import Runtime

# Called with the number of answers that are there, and of all that there will be.
Progress = Callable[[int, int], None]


def load_items(
    data: str,
    limit: int,
    seed: int,
    special_tokens: Iterable[str] = (),
) -> Iterator[Item]:
    """Held-out scenes (data "scenes") or the first `limit` items of a file.

    special_tokens: what no sample of a file may hold.

    Raises DataError, UsageError.
    """
    if data != "scenes" and not Path(data).is_file():
        raise UsageError(f"--data {data}: neither scenes nor a file of samples")
    return load_suite(data, limit, seed, special_tokens)


def probe(
    runtime: Runtime,
    items: Iterable[Item],
    names: Sequence[str] = INTERVENTIONS,
    seed: int = 0,
    batch: int = 16,
    progress: Progress | None = None,
    look: Look = "auto",
) -> JsonObject:
    """Answer all items under each of the interventions `names`; the `probe` JSON
    (docs/evaluation.md) without "data".

    Interventions concern the items in whose answer the model opened the latent loop; `opened`
    counts them.

    seed: of noise, orders, donors and the bootstrap.
    batch: questions decoded together.
    look: "auto", or "always" to open the loop in every answer.

    Raises UsageError for a model without latents, for no items, for look "never", and where the
    loop was never opened.
    """
    if not runtime.latent.steps:
        reason = "so there is nothing to probe; give a model tuned with latents"
        raise UsageError(f"{runtime.name}: has no latent steps, {reason}")
    if look == "never":
        raise UsageError("look never leaves nothing to probe; use look auto or always")
    everyone = [_subject(runtime, sample, pictures) for sample, pictures in items]
    if not everyone:
        raise UsageError("no items to probe: give a file with samples")
    tokens = tokens_for(runtime.processor, (s.sample.answer for s in everyone))
    options = Options(max_tokens=tokens, look=look)
    rounds = Rounds(
        runtime=runtime,
        subjects=everyone,
        batch=batch,
        options=options,
        progress=progress,
        count=len({"none", *names}),
    )
    own, results = rounds.ask()
    rows = [i for i, result in enumerate(results) if result.latents]
    if not rows:
        reason = "so there is nothing to probe"
        none = f"opened the latent loop in none of {len(everyone)} answers"
        raise UsageError(f"{runtime.name}: {none}, {reason}; --look always opens it")
    latents = np.stack([np.stack(results[i].latents) for i in rows])
    subjects = [everyone[i] for i in rows]
    feeds = {"none": Feed(list(latents))}
    answers = {"none": [own[i] for i in rows]}
    for number, name in enumerate(INTERVENTIONS):
        if name in names and name != "none":
            rng = np.random.default_rng([seed, number])
            feeds[name] = intervene(
                name=name, subjects=subjects, latents=latents, spec=runtime.latent, rng=rng
            )
            answers[name] = rounds.ask_rows(rows, feeds[name], forbidden=name == "k0")
    effects = {name: measure(subjects, answers, name, feed, seed) for name, feed in feeds.items()}
    width = latents.shape[2]
    features = [subject.prompt.features[:, :width] for subject in subjects]
    pointing = retrieval(
        latents=latents, features=features, boxes=[subject.boxes for subject in subjects], seed=seed
    )
    right = sum(answer.right for answer in own)
    report: JsonObject = {
        "schema": "lvr-lite/probe",
        "version": 1,
        "model": runtime.name,
        "latent": runtime.latent.to_json(),
        "n": len(everyone),
        "opened": len(rows),
        "look": look,
        "looked": len(rows) / len(everyone),
        "visual_tokens": median_and_most([n for s in everyone for n in s.visual_tokens]),
        "max_pixels": runtime.processor.image.max_pixels,
        "seeds": {"interventions": seed, "bootstrap": seed},
        "criteria": {
            "noise_costs": COSTLY,
            "flips_to_donor": FLIPPED,
            "lift": LIFTED,
            "interval": 0.95,
            "resamples": RESAMPLES,
        },
        "baseline": {
            "accuracy": right / len(everyone),
            "interval": score.wilson(right, len(everyone)),
        },
        "interventions": {name: effect.to_json() for name, effect in effects.items()},
        "retrieval": pointing.to_json(),
        "geometry": geometry(latents).to_json(),
        "verdict": verdict(effects, pointing.ratio, runtime.latent),
        "items": [
            _item(subjects=subjects, answers=answers, feeds=feeds, i=i)
            for i in range(len(subjects))
        ],
    }
    return {name: _rounded(value) for name, value in report.items()}


def _subject(runtime: Runtime, sample: Sample, pictures: Pictures) -> Subject:
    prompt, _ = prepare_prompt(runtime, pictures, sample.question)
    boxes: list[np.ndarray] = []
    # Boxes lie in the first picture, whose tokens come first.
    if sample.boxes and pictures:
        grid = runtime.processor.grid_of(pictures[0].height, pictures[0].width)
        boxes = visual_tokens_in_boxes(sample.boxes, grid, runtime.processor)
    digest = hashlib.sha256(prompt.features.tobytes()).hexdigest()
    return Subject(
        sample=sample,
        prompt=prompt,
        boxes=boxes,
        picture=digest,
        visual_tokens=visual_tokens(runtime, pictures),
    )


@dataclass
class Rounds:
    """Asks all subjects once a round, in fixed batches, so that under every intervention a row has
    the same companions.

    options: how to decode.
    count: of all rounds, for `progress`.
    completed: answers so far.
    """

    runtime: Runtime
    subjects: list[Subject]
    batch: int
    options: Options
    progress: Progress | None
    count: int
    completed: int = 0

    def ask(
        self, latents: Sequence[np.ndarray | None] | None = None, options: Options | None = None
    ) -> tuple[list[Answer], list[Result]]:
        """Answers and decodings of all subjects. Each is fed its entry of `latents`, or its own
        latents where that is None.
        """
        options = options or self.options
        answers: list[Answer] = []
        results: list[Result] = []
        for start in range(0, len(self.subjects), self.batch):
            group = slice(start, start + self.batch)
            prompts = [subject.prompt for subject in self.subjects[group]]
            vectors = None
            if latents is not None:
                vectors = list(latents[group])
            results += decode(
                runtime=self.runtime, prompts=prompts, options=options, latents=vectors
            )
            self.completed += len(prompts)
            if self.progress is not None:
                self.progress(self.completed, len(self.subjects) * self.count)
        for subject, result in zip(self.subjects, results, strict=True):
            text = self.runtime.processor.text(result.tokens)
            right = score.is_correct(text, subject.sample.answer)
            answers.append(Answer(text, result.tokens, right))
        return answers, results

    def ask_rows(self, rows: Sequence[int], feed: Feed, forbidden: bool) -> list[Answer]:
        """What the subjects `rows` answer when they are fed `feed`, one entry for each, or when
        latents are forbidden.
        """
        if forbidden:
            answers, _ = self.ask(options=replace(self.options, look="never"))
        else:
            latents = dict(zip(rows, feed.latents, strict=True))
            answers, _ = self.ask([latents.get(i) for i in range(len(self.subjects))])
        return [answers[i] for i in rows]


def _item(
    subjects: Sequence[Subject],
    answers: Mapping[str, Sequence[Answer]],
    feeds: Mapping[str, Feed],
    i: int,
) -> JsonObject:
    """One item's answers under each intervention that applies to it, so that every number can be
    counted again.
    """
    sample = subjects[i].sample
    donors = {
        name: subjects[int(feed.donors[i])].sample.id
        for name, feed in feeds.items()
        if feed.donors is not None and feed.donors[i] >= 0
    }
    texts = {
        name: answers[name][i].text for name, feed in feeds.items() if feed.latents[i] is not None
    }
    return {
        "id": sample.id,
        "type": sample.type,
        "expected": sample.answer,
        "donors": donors,
        "answers": texts,
    }


def _rounded(value: object) -> object:
    """A value as JSON takes it, numbers with four significant digits."""
    if isinstance(value, dict):
        return {name: _rounded(field) for name, field in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.4g}")
    return value
