"""Other formats become the project's JSONL: reading, questions where there are none, the split,
writing.

Pictures stay where they are; the file names them relative to itself. May import: the standard
library and what stands above `data`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from lvr_lite.data.convert.coco import coco
from lvr_lite.data.convert.detections import questions
from lvr_lite.data.convert.labelstudio import labelstudio
from lvr_lite.data.convert.reading import UNITS, Import
from lvr_lite.data.convert.viscot import lvr, viscot
from lvr_lite.data.convert.yolo import yolo
from lvr_lite.data.rows import FieldError, Problem
from lvr_lite.data.samples import Sample, sample_json
from lvr_lite.data.validate import PictureFacts, inspect_pictures
from lvr_lite.errors import DataError, UsageError
from lvr_lite.files import write_all

READERS = {
    "coco": coco,
    "yolo": yolo,
    "labelstudio": labelstudio,
    "viscot": viscot,
    "lvr": lvr,
}
FORMATS = tuple(READERS)


@dataclass(frozen=True)
class Options:
    """images: folder of the pictures; by default beside the file.
    boxes_are: "stored" or "upright" pixels; found out by default.
    boxes: what they are measured in: "pixels", "fractions" of the picture or "thousandths" of it;
        the format's own by default.
    split: one of the source's own.
    test_share: share of the pictures that is held out, above 0 and below 1.
    per_image: most questions made of a picture's classes.
    seed: of these questions and of the held-out share.
    absent: also ask about classes that are not there.
    """

    images: Path | None = None
    boxes_are: str | None = None
    split: str | None = None
    test_share: float | None = None
    per_image: int = 6
    seed: int = 0
    absent: bool = True
    boxes: str | None = None


@dataclass(frozen=True)
class Summary:
    """What was written.

    files: with the number of samples of each.
    pictures: how many in all.
    types: how many samples of each type.
    omissions, remarks: what was left out, and what else the user should know; each how often.
    """

    files: dict[Path, int]
    pictures: int
    types: Counter[str]
    omissions: Counter[str]
    remarks: Counter[str]

    def __str__(self) -> str:
        files = [f"{path}: {count} questions" for path, count in self.files.items()]
        types = [f"{kind} {n}" for kind, n in sorted(self.types.items())]
        parts = [f"{' and '.join(files)} about {self.pictures} pictures ({', '.join(types)})"]
        omissions = _counted(self.omissions)
        if omissions:
            parts.append(f"left out: {', '.join(omissions)}")
        parts += [f"{n} {what}" for what, n in sorted(self.remarks.items())]
        return "; ".join(parts)


def convert(
    source: Path, target: Path, form: str, options: Options, skip_broken: bool = False
) -> tuple[Summary | None, list[Problem]]:
    """Read `source` in one of FORMATS and write `target`, or with a test share its two parts
    (`parts`), whole or not at all.

    Also returns every broken row, named. With broken rows nothing is written (None), unless
    `skip_broken` leaves them out. Raises UsageError for options that do not fit, DataError for a
    source that cannot be read at all or supports no question.
    """
    _refuse_senseless(source, target, form, options)
    imported = Import(
        source=source,
        images=options.images,
        boxes_are=options.boxes_are,
        split=options.split,
        unit=options.boxes,
    )
    READERS[form](imported)
    imported.tell_rest()
    problems = imported.problems
    sides = []
    if skip_broken or not problems:
        sides = _sides(imported, options)
    # by file, in the order in which files were read, and by place within
    order = {file: i for i, file in enumerate(dict.fromkeys(p.file for p in problems))}
    problems.sort(key=lambda p: (order[p.file], p.line or p.item or 0))
    if problems and not skip_broken:
        return None, problems
    if problems:
        imported.omissions["broken rows"] = len(problems)
    paths = parts(target) if options.test_share is not None else (target,)
    samples = [_samples_about(imported, side, options) for side in sides]
    files = dict(zip(paths, samples, strict=True))
    for path, side in files.items():
        if not side:
            raise DataError(
                f"{source}: gives no question for {path.name}: no box, class or question in it "
                f"supports one{_left_out(imported)}; nothing was written"
            )
    _write(files)
    every = [sample for side in samples for sample in side]
    pictures: set[Path] = set()
    for sample in every:
        pictures.update(sample.images)
    summary = Summary(
        files={path: len(side) for path, side in files.items()},
        pictures=len(pictures),
        types=Counter(str(sample.type) for sample in every),
        omissions=imported.omissions,
        remarks=imported.remarks,
    )
    return summary, problems


def _left_out(imported: Import) -> str:
    omissions = _counted(imported.omissions)
    if not omissions:
        return ""
    return f" (left out: {', '.join(omissions)})"


def _counted(omissions: Counter[str]) -> list[str]:
    return [f"{n} {what}" for what, n in sorted(omissions.items()) if n]


def parts(target: Path) -> tuple[Path, Path]:
    """Where the two parts go: set.jsonl -> set-train.jsonl and set-test.jsonl beside it."""
    train = target.with_name(f"{target.stem}-train{target.suffix}")
    test = target.with_name(f"{target.stem}-test{target.suffix}")
    return train, test


def _samples_about(
    imported: Import,
    side: set[Path] | None,
    options: Options,
) -> list[Sample]:
    """The samples about the pictures of one side, or about all."""
    samples = imported.samples
    pictures = imported.pictures
    if side is not None:
        samples = [sample for sample in samples if sample.images[0] in side]
        pictures = [picture for picture in pictures if picture.path in side]
    return samples + questions(
        pictures,
        options.per_image,
        options.seed,
        options.absent,
    )


def _refuse_senseless(source: Path, target: Path, form: str, options: Options) -> None:
    if form not in FORMATS:
        raise UsageError(f"--from {form}: must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if options.boxes_are not in (None, "stored", "upright"):
        raise UsageError(f"--boxes-are {options.boxes_are}: must be stored or upright")
    if options.boxes not in (None, *UNITS):
        raise UsageError(f"--boxes {options.boxes}: must be pixels, fractions or thousandths")
    if options.boxes is not None and form == "labelstudio":
        raise UsageError("--boxes: Label Studio measures in percent of the picture; leave it out")
    if options.split is not None and form not in ("yolo", "viscot"):
        raise UsageError(
            f"--split is for yolo and viscot, which name theirs; {form} does not: leave it out"
        )
    if options.images is not None and form == "yolo":
        raise UsageError("--images: a YOLO set says where its pictures are; leave it out")
    if options.images is not None and not options.images.is_dir():
        raise UsageError(f"--images {options.images}: no such folder")
    share = options.test_share
    if share is not None and not 0 < share < 1:
        raise UsageError(f"--test-share {share:g}: must be between 0 and 1, such as 0.1")
    if options.per_image < 1:
        raise UsageError(f"--per-image {options.per_image}: must be 1 or more")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; name what is to be converted")
    if source.resolve() in {path.resolve() for path in (target, *parts(target))}:
        raise UsageError(f"{target}: is the source itself; choose another name")


def _write(files: dict[Path, list[Sample]]) -> None:
    """All files or none: a new training set beside an old test set would share pictures."""
    contents: dict[Path, str] = {}
    for path, samples in files.items():
        if path.is_dir():
            raise DataError(f"{path}: is a folder; give the name of a file to write")
        # Through a link "../" would lead elsewhere.
        folder = path.parent.resolve()
        objects = [sample_json(_resolved(sample), folder) for sample in samples]
        lines = [json.dumps(data, ensure_ascii=False) + "\n" for data in objects]
        contents[path] = "".join(lines)
    write_all(contents)


def _resolved(sample: Sample) -> Sample:
    images = [path.parent.resolve() / path.name for path in sample.images]
    return replace(sample, images=tuple(images))


# ----------------------------------------------------------------------------------------------
# the split


class _Groups:
    """Pictures that must stay on one side: those of the same pixels, and those that one sample
    shows together. A union-find over digests of pixels.
    """

    def __init__(self, digests: dict[Path, str]) -> None:
        self._digests = digests
        self._leaders = {digest: digest for digest in digests.values()}

    def of(self, path: Path) -> str:
        """The name of a picture's group."""
        digest = self._digests[path]
        while self._leaders[digest] != digest:
            digest = self._leaders[digest]
        return digest

    def join(self, one: Path, other: Path) -> None:
        first, second = sorted((self.of(one), self.of(other)))
        self._leaders[second] = first


def _sides(imported: Import, options: Options) -> list[set[Path] | None]:
    """[None] for all together, or the pictures of the training and of the test set.

    The groups are put in the order of their hash with the seed. The first of them are the test set:
    the share of the groups, one at least.
    """
    if options.test_share is None:
        return [None]
    together = [list(sample.images) for sample in imported.samples]
    together += [[picture.path] for picture in imported.pictures]
    digests = _digests(imported, together)
    whole = [paths for paths in together if all(path in digests for path in paths)]
    groups = _Groups(digests)
    pictures: set[Path] = set()
    for paths in whole:
        pictures.update(paths)
        for path in paths[1:]:
            groups.join(path, paths[0])
    names = {groups.of(path) for path in pictures}
    order = sorted(names, key=lambda name: _rank(name, options.seed))
    if len(order) < 2:
        raise DataError(
            f"{imported.source}: has {len(order)} pictures that differ, which make no training "
            "and test set; leave out --test-share"
        )
    count = max(1, round(options.test_share * len(order)))
    count = min(count, len(order) - 1)
    test_groups = set(order[:count])
    test = {path for path in pictures if groups.of(path) in test_groups}
    return [pictures - test, test]


def _digests(imported: Import, together: list[list[Path]]) -> dict[Path, str]:
    """Of the pixels of each picture. Pictures that cannot be opened are reported and left out."""
    digests: dict[Path, str] = {}
    facts = inspect_pictures(itertools.chain.from_iterable(together))
    for path, fact in sorted(facts.items()):
        if isinstance(fact, PictureFacts):
            digests[path] = fact.digest
        else:
            imported.report(FieldError(fact, field="image"), file=path)
    imported.samples = [s for s in imported.samples if all(p in digests for p in s.images)]
    imported.pictures = [p for p in imported.pictures if p.path in digests]
    return digests


def _rank(group: str, seed: int) -> bytes:
    text = f"{seed} {group}"
    return hashlib.sha256(text.encode()).digest()
