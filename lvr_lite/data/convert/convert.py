"""Other formats -> the project's JSONL (`lvr_lite/data/convert/formats.py` reads them): questions
where there are none, the split, the writing.

Pictures stay where they are; the file names them relative to itself. May import: the standard
library and the core.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from lvr_lite.data.convert.detections import questions
from lvr_lite.data.convert.formats import READERS
from lvr_lite.data.convert.reading import Found
from lvr_lite.data.rows import Problem
from lvr_lite.data.samples import Sample, sample_json
from lvr_lite.data.validate import Look, look_at
from lvr_lite.errors import DataError, UsageError
from lvr_lite.files import write_atomically

FORMATS = tuple(READERS)


@dataclass(frozen=True)
class Options:
    """images: folder of the pictures, beside the file unless given. boxes_are: "stored" or
    "upright" pixels, found out unless given. split: one of the source's own. test_share: of the
    pictures. per_image: most questions made of a picture's classes. absent: also ask about classes
    that are not there.
    """

    images: Path | None = None
    boxes_are: str | None = None
    split: str | None = None
    test_share: float | None = None
    per_image: int = 6
    seed: int = 0
    absent: bool = True


@dataclass(frozen=True)
class Written:
    """files: what was written, with the number of samples. pictures: in all. types: of the samples.
    skipped, told: what, how often.
    """

    files: dict[Path, int]
    pictures: int
    types: Counter[str]
    skipped: Counter[str]
    told: Counter[str]

    def __str__(self) -> str:
        files = " and ".join(f"{path}: {count} questions" for path, count in self.files.items())
        types = ", ".join(f"{kind} {n}" for kind, n in sorted(self.types.items()))
        said = [f"{files} about {self.pictures} pictures ({types})"]
        if skipped := [f"{n} {what}" for what, n in sorted(self.skipped.items()) if n]:
            said.append(f"left out: {', '.join(skipped)}")
        return "; ".join(said + [f"{n} {what}" for what, n in sorted(self.told.items())])


def convert(
    source: Path, target: Path, form: str, options: Options, skip_broken: bool = False
) -> tuple[Written | None, list[Problem]]:
    """Read `source` in one of FORMATS and write `target`, or with a test share its two parts
    (`parts`), whole or not at all.

    Also gives every broken row, named. With broken rows nothing is written (None), unless
    `skip_broken` leaves them out. Raises UsageError for options that do not fit, DataError for a
    source that cannot be read at all or gives no question.
    """
    _refuse_senseless(source, target, form, options)
    found = Found(source, options.images, options.boxes_are, options.split)
    READERS[form](found)
    sides = _sides(found, options) if skip_broken or not found.problems else []
    order = {file: i for i, file in enumerate(dict.fromkeys(p.file for p in found.problems))}
    found.problems.sort(key=lambda p: (order[p.file], p.line or p.item or 0))
    if found.problems and not skip_broken:
        return None, found.problems
    if found.problems:
        found.skipped["broken rows"] = len(found.problems)
    paths = parts(target) if options.test_share is not None else (target,)
    samples = [_asked(found, side, options) for side in sides]
    for path, side in zip(paths, samples, strict=True):
        if not side:
            raise DataError(
                f"{source}: gives no question for {path.name}: no box, class or question in it supports one; nothing was written"
            )
    _write(dict(zip(paths, samples, strict=True)))
    every = [sample for side in samples for sample in side]
    pictures = len({p for sample in every for p in sample.images})
    types = Counter(str(sample.type) for sample in every)
    counts = {path: len(side) for path, side in zip(paths, samples, strict=True)}
    return Written(counts, pictures, types, found.skipped, found.told), found.problems


def _asked(found: Found, pictures: set[Path] | None, options: Options) -> list[Sample]:
    """The samples about these pictures, or about all."""
    own = [s for s in found.samples if pictures is None or s.images[0] in pictures]
    shown = [p for p in found.pictures if pictures is None or p.path in pictures]
    return own + questions(shown, options.per_image, options.seed, options.absent)


def parts(target: Path) -> tuple[Path, Path]:
    """Where the two parts go: set.jsonl -> set-train.jsonl and set-test.jsonl beside it."""
    return target.with_name(f"{target.stem}-train{target.suffix}"), target.with_name(
        f"{target.stem}-test{target.suffix}"
    )


def _refuse_senseless(source: Path, target: Path, form: str, options: Options) -> None:
    if form not in FORMATS:
        raise UsageError(f"--from {form}: must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if options.boxes_are not in (None, "stored", "upright"):
        raise UsageError(f"--boxes-are {options.boxes_are}: must be stored or upright")
    if options.split is not None and form not in ("yolo", "viscot"):
        raise UsageError(
            f"--split is for yolo and viscot, which name theirs; {form} does not: leave it out"
        )
    if options.images is not None and form == "yolo":
        raise UsageError("--images: a YOLO set says where its pictures are; leave it out")
    if options.images is not None and not options.images.is_dir():
        raise UsageError(f"--images {options.images}: no such folder")
    if options.test_share is not None and not 0 < options.test_share < 1:
        raise UsageError(
            f"--test-share {options.test_share:g}: must be between 0 and 1, such as 0.1"
        )
    if options.per_image < 1:
        raise UsageError(f"--per-image {options.per_image}: must be 1 or more")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; name what is to be converted")
    if source.resolve() in {p.resolve() for p in (target, *parts(target))}:
        raise UsageError(f"{target}: is the source itself; choose another name")


def _write(files: dict[Path, list[Sample]]) -> None:
    """All files or none: a new training set beside an old test set would share pictures."""
    staged = {path.with_name(f".{path.name}.new-{os.getpid()}"): path for path in files}
    try:
        for (new, path), samples in zip(staged.items(), files.values(), strict=True):
            if path.is_dir():
                raise DataError(f"{path}: is a folder; give the name of a file to write")
            folder = path.parent.resolve()  # through a link "../" would lead elsewhere
            lines = [
                json.dumps(sample_json(_resolved(sample), folder), ensure_ascii=False) + "\n"
                for sample in samples
            ]
            write_atomically(new, "".join(lines))
        for new, path in staged.items():
            new.replace(path)
    finally:
        for new in staged:
            new.unlink(missing_ok=True)


def _resolved(sample: Sample) -> Sample:
    return replace(sample, images=tuple(p.parent.resolve() / p.name for p in sample.images))


def _sides(found: Found, options: Options) -> list[set[Path] | None]:
    """[None] for all together, or the pictures of the training and of the test set.

    Pictures of the same pixels are on one side, and pictures that one sample shows together. Of the
    groups, in the order of their hash with the seed, the first are the test set: the share of them,
    one at least.
    """
    if options.test_share is None:
        return [None]
    shown = [list(s.images) for s in found.samples] + [[p.path] for p in found.pictures]
    looks = look_at(path for paths in shown for path in paths)
    bad = {path for path, look in looks.items() if not isinstance(look, Look)}
    for path in sorted(bad):
        found.broken("image", str(looks[path]), file=path)
    found.samples = [s for s in found.samples if not bad & set(s.images)]
    found.pictures = [p for p in found.pictures if p.path not in bad]
    leader = {look.digest: look.digest for look in looks.values() if isinstance(look, Look)}

    def group(path: Path) -> str:
        look = looks[path]
        assert isinstance(look, Look)
        digest = look.digest
        while leader[digest] != digest:
            digest = leader[digest]
        return digest

    kept = [paths for paths in shown if not bad & set(paths)]
    for paths in kept:
        for path in paths[1:]:
            leader[max(group(path), group(paths[0]))] = min(group(path), group(paths[0]))
    groups = sorted(
        {group(p) for paths in kept for p in paths},
        key=lambda g: hashlib.sha256(f"{options.seed} {g}".encode()).digest(),
    )
    if len(groups) < 2:
        raise DataError(
            f"{found.source}: has {len(groups)} pictures that differ, which make no training and test set; leave out --test-share"
        )
    held = set(groups[: min(max(1, round(options.test_share * len(groups))), len(groups) - 1)])
    tested = {p for paths in kept for p in paths if group(p) in held}
    return [{p for paths in kept for p in paths} - tested, tested]
