"""`lvr-lite data`: make, convert, check and look at samples. May import: all that stands above
`commands`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lvr_lite.data import validate
from lvr_lite.data.convert import convert
from lvr_lite.data.rows import Problem
from lvr_lite.data.sample_files import read_samples
from lvr_lite.errors import UsageError
from lvr_lite.model.checkpoint import processor_of
from lvr_lite.toy.make import write_scenes
from lvr_lite.views.preview import preview

# What `convert_data` reads and makes.
ConvertOptions = convert.Options


@dataclass(frozen=True)
class MakeOptions:
    """What `make_data` draws.

    count: questions; with "coco" pictures.
    seed: of the scenes, 0 to 999,999.
    split: "train" or "test".
    form: "samples", or "coco": a detection set, to try `convert_data` on.
    """

    count: int = 1000
    seed: int = 0
    split: str = "train"
    form: str = "samples"

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise UsageError(f"--split {self.split}: must be train or test")
        if self.form not in ("samples", "coco"):
            raise UsageError(f"--as {self.form}: must be samples or coco")


@dataclass(frozen=True)
class Conversion:
    """What came of a data set in another format.

    summary: of what was written; None where broken rows kept it from being written.
    problems: the broken rows.
    """

    summary: convert.Summary | None
    problems: list[Problem]


@dataclass(frozen=True)
class Validation:
    """What was found in one file.

    good: samples without a problem.
    problems: in the order of the file, notes among them.
    """

    file: Path
    good: int
    problems: list[Problem]

    @property
    def notes(self) -> int:
        """How many of `problems` are worth knowing and no mistake."""
        return sum(problem.note for problem in self.problems)

    @property
    def valid(self) -> bool:
        return self.notes == len(self.problems)


def make_data(out: str | Path, options: MakeOptions | None = None) -> Path:
    """Write drawn scenes with questions and boxes as PNG and JSONL into the folder `out`; returns
    the file of samples.
    """
    options = options or MakeOptions()
    coco = options.form == "coco"
    return write_scenes(
        folder=Path(out), count=options.count, seed=options.seed, split=options.split, coco=coco
    )


def convert_data(
    source: str | Path,
    target: str | Path,
    form: str,
    options: ConvertOptions | None = None,
    skip_broken: bool = False,
) -> Conversion:
    """Turn another data set into samples; where it has only boxes with classes, questions are made
    of these.

    source: COCO, Label Studio, LVR: JSON; Visual-CoT: JSONL; YOLO: folder or data.yaml.
    target: JSONL to write; pictures stay where they are.
    form: "coco", "yolo", "labelstudio", "viscot" or "lvr".
    skip_broken: leave broken rows out, instead of writing nothing.

    Raises UsageError for options that do not fit, DataError for a source that cannot be read.
    """
    options = options or ConvertOptions()
    summary, problems = convert.convert(Path(source), Path(target), form, options, skip_broken)
    return Conversion(summary, problems)


def validate_data(
    files: Sequence[str | Path], against_test: str | Path | None = None, model: str = "tiny"
) -> Iterator[Validation]:
    """Check files of samples, pictures included, one after another; those given together may share
    no picture.

    against_test: a test set none of whose pictures may be in them.
    model: whose visual tokens boxes are measured by.
    """
    paths = [Path(file) for file in files]
    test = None
    if against_test is not None:
        test = Path(against_test)
    results = validate.validate(paths, processor_of(model), test)
    for path, (good, problems) in zip(paths, results, strict=True):
        yield Validation(path, good, problems)


def preview_data(
    file: str | Path, out: str | Path = "preview.png", count: int = 12, model: str = "tiny"
) -> tuple[int, int]:
    """Draw samples as a model sees them, with their boxes and the visual tokens that these select.

    out: PNG to write.
    count: samples to show.
    model: whose resizing and visual tokens.

    Returns how many were drawn, and how many the file holds.
    """
    samples = read_samples(Path(file))
    preview(samples, count, Path(out), processor_of(model))
    return min(count, len(samples)), len(samples)
