"""The embedded scenes as sources of samples (`lvr_lite.data.sources`). May import: numpy, Pillow
and what stands above `toy`.

Each function always gives the same samples for the same split and seed, and a larger count only
adds to them. All raise UsageError for a count below 1, a seed outside 0 … MAX_SEED or an unknown
split.
"""

from __future__ import annotations

from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Pictures, Sizes, Source
from lvr_lite.errors import UsageError
from lvr_lite.toy import questions
from lvr_lite.toy.drawing import draw
from lvr_lite.toy.scenes import Scene

SPLITS = ("train", "test")
# The seeds above are those of the embedded model's pre-training (lvr_lite/toy/pretrain.py).
MAX_SEED = 999_999
# samples of a source, unless the caller says how many
USUAL_COUNT = 300
# skills of the train split, which tuning replays
REPLAYED = ("caption", "short")


class DrawnSource(Source):
    """Questions to scenes, planned at once; a scene is drawn when its picture is asked for.

    scenes: of each sample its scene.
    """

    def __init__(self, samples: list[Sample], scenes: list[Scene]) -> None:
        self.samples = samples
        self.scenes = scenes

    def pictures(self, index: int) -> Pictures:
        return (draw(self.scenes[index]),)

    def sizes(self, index: int) -> Sizes:
        scene = self.scenes[index]
        return ((scene.height, scene.width),)


def scenes(split: str, seed: int, count: int | None = None) -> DrawnSource:
    """Questions to scenes, with the boxes of what must be looked at."""
    count = _checked(split, seed, count)
    planned = list(questions.items(seed, split, count))
    samples = [
        scene_sample(
            name,
            scene,
            question,
            pair,
        )
        for name, scene, question, pair in planned
    ]
    return DrawnSource(samples, [scene for _, scene, _, _ in planned])


def skills(split: str, seed: int, count: int | None = None) -> DrawnSource:
    """Questions of the kinds that the scenes do not contain and the embedded model was pre-trained
    in, without boxes. The train split has only those of REPLAYED.
    """
    count = _checked(split, seed, count)
    kinds = REPLAYED if split == "train" else questions.SKILLS
    planned = list(questions.skills(seed, count, split, kinds))
    samples = [skill_sample(name, question) for name, _, question in planned]
    return DrawnSource(samples, [scene for _, scene, _ in planned])


def scene_sample(name: str, scene: Scene, question: questions.Question, pair: str | None) -> Sample:
    """A planned question as a sample without a picture."""
    boxes = tuple(scene.box(figure) for figure in question.figures)
    return Sample(
        name, (), question.text, question.answer, question.choices, boxes, question.type, pair
    )


def skill_sample(name: str, question: questions.Question) -> Sample:
    """A planned question of the skills as a sample without boxes and picture."""
    choices = question.choices or None
    return Sample(name, (), question.text, question.answer, choices, (), question.type)


def _checked(split: str, seed: int, count: int | None) -> int:
    """How many samples there will be."""
    count = USUAL_COUNT if count is None else count
    if count < 1:
        raise UsageError(f"count must be 1 or more, not {count}")
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"seed must be 0 to {MAX_SEED}, not {seed}")
    if split not in SPLITS:
        raise UsageError(f"split must be train or test, not {split}")
    return count
