"""The real files that are changed: a model, a tuned checkpoint and a bundle, samples, data sets of
every format that is read, answers, benchmarks and pictures.

May import: Pillow, the standard library, and commands in processes of their own.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lvr_lite.model.checkpoint import resolve
from lvr_lite.toy.make import write_scenes

# What a base is not given: sums over its files, which whoever changes a file writes anew.
SUMS = "SHA256SUMS"
MODELS = ("checkpoint", "tuned", "fp32")
TUNED = (
    *("train.steps=2", "train.batch=2", "train.save_every=2", "train.eval_every=100"),
    *("data.count=8", "data.eval_count=1", "lora.rank=4"),
)
MODES = {"PNG": ("RGB", "L", "1", "P", "LA", "RGBA", "I;16"), "TIFF": ("RGB", "CMYK", "F", "I;16")}
# Formats beside those that are read, which must be refused, whatever they are called.
FOREIGN = ("EPS", "PDF", "PPM", "ICO", "TGA", "PCX", "ICNS", "DDS", "JPEG2000", "IM", "SGI")
READ = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
SIZE = (64, 48)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Originals:
    """What cases are made of.

    bases: {name: a folder that cases are laid over}.
    files: {name: content} of what is small enough to be changed in memory.
    pictures: {name: content}; the ending says which format it is in.
    """

    bases: dict[str, Path]
    files: dict[str, bytes]
    pictures: dict[str, bytes]

    def __repr__(self) -> str:
        # Hypothesis prints what it was given: megabytes.
        return "originals"


def make_models(folder: Path) -> None:
    """checkpoint/, tuned/ and fp32/ in `folder`, from the embedded model; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "checkpoint").exists():
        shutil.copytree(resolve("tiny"), folder / "checkpoint")
    _unless_there(folder / "tuned", "finetune", "--model", "tiny", "--data", "scenes", "--out")
    _unless_there(folder / "fp32", "export", "--precision", "fp32", folder / "tuned")


def _unless_there(target: Path, command: str, *arguments: object) -> None:
    if (target / "complete").exists() or (target / "lvr.json").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    settings = [part for setting in TUNED for part in ("--set", setting)]
    _run(command, *arguments, target, *(settings if command == "finetune" else []))


def _run(*line: object) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lvr_lite", *map(str, line)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")


def make(folder: Path, models: Path, world: Path) -> Originals:
    """Everything beside the models, and all of it as bases and bytes.

    folder: for the bases; made anew.
    models: holds MODELS.
    world: where cases will lie.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    scenes = write_scenes(folder / "scenes", 6, 0, "test")
    write_scenes(folder / "coco", 4, 0, "train", coco=True)
    bases = {"scenes": folder / "scenes", "coco": folder / "coco"}
    for name in MODELS:
        bases[name] = _base(folder / name, models / name, scenes.parent)
    bases["data"] = folder / "data"
    bases["benchmarks"] = _base(folder / "benchmarks", models / "fp32", scenes.parent)
    files = _model_files(models)
    files |= {f"data/{name}": data for name, data in _data_files(bases["data"]).items()}
    files |= {f"benchmarks/{n}": data for n, data in _benchmarks(bases["benchmarks"]).items()}
    files["samples.jsonl"] = scenes.read_bytes()
    files["coco.json"] = (folder / "coco" / "train.json").read_bytes()
    files |= _results(folder, models / "fp32", scenes, world)
    files["bench.json"] = next((ROOT / "bench" / "results").glob("*.json")).read_bytes()
    return Originals(bases, files, pictures())


def _base(base: Path, model: Path, scenes: Path) -> Path:
    """A folder of a model (as hard links: it may be large) with samples beside it."""
    for path in model.rglob("*"):
        inner = path.relative_to(model)
        if path.is_dir() or path.name == SUMS or inner.parts[0].startswith(("checkpoint-", "runs")):
            continue
        (base / "model" / inner).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(path, base / "model" / inner)
    shutil.copytree(scenes, base / "scenes")
    return base


def _link_or_copy(path: Path, place: Path) -> None:
    try:
        os.link(path, place)
    except OSError:
        # Another disk.
        shutil.copyfile(path, place)


def _model_files(models: Path) -> dict[str, bytes]:
    """{"checkpoint/config.json": content, …} of every file that is not weights of megabytes."""
    files = {}
    for name in MODELS:
        for path in sorted((models / name).rglob("*")):
            inner = path.relative_to(models / name)
            small = path.is_file() and path.stat().st_size < 1 << 20
            if (
                small
                and path.name != SUMS
                and not inner.parts[0].startswith(("checkpoint-", "runs"))
            ):
                files[f"{name}/{inner.as_posix()}"] = path.read_bytes()
    return files


def _results(folder: Path, bundle: Path, scenes: Path, world: Path) -> dict[str, bytes]:
    """What `eval` writes: its answers, as if the samples lay where cases do, and its report."""
    names = ("answers.jsonl", "eval.json")
    files = ("--answers", folder / names[0], "--json", folder / names[1])
    _run("eval", bundle, "--suite", scenes, "--limit", 2, *files)
    place = str(world.resolve() / "in" / "scenes" / scenes.name).encode()
    there = str(scenes.resolve()).encode()
    return {name: (folder / name).read_bytes().replace(there, place) for name in names}


# --------------------------------------------------------------------------------------- pictures


def pictures() -> dict[str, bytes]:
    """{name: content} of small pictures in every format and mode that is read, and in others."""
    drawn = Image.linear_gradient("L").resize(SIZE).convert("RGB")
    files = {}
    for form in (*READ, *FOREIGN):
        for mode in MODES.get(form, ("RGB",)):
            if (data := _saved(drawn, form, mode)) is not None:
                files[f"{form}-{mode.replace(';', '')}.{form.lower()}"] = data
    frames = [drawn.rotate(turn) for turn in range(0, 80, 2)]
    for form in ("GIF", "WEBP", "TIFF", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, form, save_all=True, append_images=frames[1:])
        files[f"{form}-frames.{form.lower()}"] = file.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    drawn.save(file, "JPEG", exif=exif)
    files["JPEG-turned.jpeg"] = file.getvalue()
    return files


def _saved(picture: Image.Image, form: str, mode: str) -> bytes | None:
    """None where this Pillow writes no such picture."""
    data = io.BytesIO()
    try:
        picture.convert("L" if mode == "I;16" else mode).convert(mode).save(data, form)
    except (OSError, ValueError, KeyError):
        return None
    return data.getvalue()


def _jpeg() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", SIZE, (90, 40, 10)).save(data, "JPEG")
    return data.getvalue()


# -------------------------------------------------------------------------------------- data sets


def _data_files(folder: Path) -> dict[str, bytes]:
    """Sets in the formats of others about a.jpg and b.jpg, written to `folder`."""
    files = {"a.jpg": _jpeg(), "b.jpg": _jpeg(), "images/a.jpg": _jpeg(), "images/b.jpg": _jpeg()}
    files["labelstudio.json"] = _json([_task(1, "a.jpg"), _task(2, "b.jpg")])
    files["viscot.jsonl"] = b"\n".join(_json(_row(name)) for name in ("a.jpg", "b.jpg"))
    files["lvr.json"] = _json([_item(1, "a.jpg"), _item(2, "b.jpg")])
    files["data.yaml"] = b"path: .\ntrain: images\nnames:\n  0: cat\n  1: red dog\n"
    files["labels/a.txt"] = b"0 0.5 0.5 0.25 0.5\n1 0.2 0.2 0.1 0.1\n"
    files["labels/b.txt"] = b"1 0.1 0.1 0.4 0.1 0.4 0.6 0.2 0.7\n"
    _write(folder, files)
    return {name: data for name, data in files.items() if not name.endswith(".jpg")}


def _task(number: int, name: str) -> dict[str, Any]:
    value = {"x": 10, "y": 20.5, "width": 30, "height": 40, "rotation": 15}
    rectangle = {
        "id": "r1",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": SIZE[0],
        "original_height": SIZE[1],
        "image_rotation": 0,
        "value": value | {"rectanglelabels": ["cat"]},
    }
    answers = [
        {
            "id": name,
            "type": "textarea",
            "from_name": name,
            "to_name": "image",
            "value": {"text": ["Is it red?"]},
        }
        for name in ("question", "answer")
    ]
    results = [rectangle, *answers]
    return {
        "id": number,
        "data": {"image": f"/data/local-files/?d={name}"},
        "annotations": [{"id": 70 + number, "result": results, "was_cancelled": False}],
    }


def _row(name: str) -> dict[str, Any]:
    sizes = {"width": SIZE[0], "height": SIZE[1], "bboxs": [[1, 2, 30, 40]]}
    words = {"question": "What is red?", "answer": "A box.", "image": name}
    return words | sizes | {"dataset": "flickr", "split": "train"}


def _item(number: int, name: str) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "<lvr>\n<answer> A box. </answer>"},
    ]
    own = {"dataset": "flickr", "split": "train", "question_id": number}
    return own | {"image": [name], "conversations": turns, "bboxes": [[0.1, 0.2, 0.5, 0.75]]}


def _benchmarks(folder: Path) -> dict[str, bytes]:
    """Public benchmarks as they are published, of a few questions each."""
    files = {f"mmvp/MMVP Images/{number}.jpg": _jpeg() for number in (1, 2)}
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["Index", "Question", "Options", "Correct Answer"])
    rows.writerows([n, 'Is it "open", or not?', "(a) Yes (b) No", "(a)"] for n in (1, 2))
    files["mmvp/Questions.csv"] = table.getvalue().encode()
    files["vstar/direct/sa.jpg"] = _jpeg()
    star = {"image": "direct/sa.jpg", "text": "What?\n(A) a\n(B) b", "label": "A"}
    files["vstar/test_questions.jsonl"] = _json(star | {"category": "direct", "question_id": 0})
    files["blink/Counting/a.jpg"] = _jpeg()
    row = {"idx": "val_1", "question": "which?", "sub_task": "Counting", "choices": ["l", "r"]}
    answer = {"answer": "(A)", "image_1": "a.jpg", "image_2": None}
    files["blink/Counting/val.jsonl"] = _json(row | answer)
    files["hrbench/hr_bench_4k.tsv"] = _rotations()
    if (data := _parquet(row | answer)) is not None:
        files["blink-parquet/Counting/val-00000-of-00001.parquet"] = data
    _write(folder, files)
    return {name: data for name, data in files.items() if not name.endswith(".jpg")}


def _rotations() -> bytes:
    picture = base64.b64encode(_jpeg()).decode()
    lines = ["index\tquestion\tanswer\tcategory\tA\tB\tC\tD\tcycle_category\timage"]
    for turn in range(4):
        options = "\t".join("abcd"[turn:] + "abcd"[:turn])
        lines.append(f"{turn}\twhat?\t{'ADCB'[turn]}\tsingle\t{options}\t{turn}\t{picture}")
    return "\n".join(lines).encode()


def _parquet(row: Mapping[str, Any]) -> bytes | None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return None
    picture = {"bytes": _jpeg(), "path": None}
    data = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([dict(row) | {"image_1": picture}] * 2), data)
    return data.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
