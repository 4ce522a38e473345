"""The command line: every wrong input is one line and an exit code, and nothing is left
half-written.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import lvr_lite
from lvr_lite.cli import app as cli
from lvr_lite.toy.make import write_scenes

DATA_COMMANDS = ("make", "convert", "validate", "preview")
COMMANDS = (
    "finetune",
    "grpo",
    "export",
    "quantize",
    "run",
    "eval",
    "probe",
    "bench",
    "inspect",
    "doctor",
    "demo",
    "data",
)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a wrong input gives; what was said before it is how far the work had
        come.
        """
        lines = self.err.splitlines()
        assert [i for i, line in enumerate(lines) if line.startswith("error: ")] == [
            len(lines) - 1
        ], self.err
        assert not re.search("Traceback|Error:|Warning:", self.err), self.err
        return lines[-1].removeprefix("error: ")


Call = Callable[..., Done]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lvr-lite", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def process(*arguments: object, **environment: str) -> Done:
    command = [sys.executable, "-m", "lvr_lite", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("cli") / "scenes", 4, 0, "test")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def files(folder: Path) -> dict[str, bytes]:
    """Everything under a folder, hidden things too."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# ----------------------------------------------------------------------------------------------------
# help and version


def test_version() -> None:
    done = process("--version")
    assert (done.code, done.out, done.err) == (0, f"lvr-lite {lvr_lite.__version__}\n", "")


def test_help_names_every_command(call: Call) -> None:
    done = call("--help")
    assert done.code == 0
    for command in COMMANDS:
        assert re.search(rf"^\W*{command}\b", done.out, re.MULTILINE), command


def test_no_command_is_missing_from_these_tests() -> None:
    names = {
        c.name or str(c.callback.__name__) for c in cli.app.registered_commands if c.callback
    } | {g.name for g in cli.app.registered_groups}
    assert names == set(COMMANDS)


@pytest.mark.parametrize(
    "command", [*((c,) for c in COMMANDS if c != "data"), *(("data", c) for c in DATA_COMMANDS)]
)
def test_the_help_of_a_command_shows_an_example(call: Call, command: tuple[str, ...]) -> None:
    done = call(*command, "--help")
    assert done.code == 0
    assert f"Example: lvr-lite {' '.join(command)}" in done.out


# -------------------------------------------------------------------------------------------------
# wrong inputs, each one line


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("finetune --model nosuch --data scenes --out OUT", 1, "nosuch: no such folder"),
        (
            "finetune --model tiny --data scenes --out OUT --config none.yaml",
            2,
            "none.yaml: cannot be read",
        ),
        (
            "finetune --model tiny --data scenes --out OUT --set train.stepz=1",
            2,
            "unknown key train.stepz",
        ),
        (
            "finetune --model tiny --data scenes --out OUT --set train.steps=0",
            2,
            "train.steps must lie between",
        ),
        ("finetune --model tiny --data none.jsonl --out OUT", 1, "none.jsonl: cannot be read"),
        ("finetune --model tiny --data BROKEN --out OUT", 1, "broken.jsonl:3: not valid JSON"),
        ("finetune --model tiny --data scenes --out OUT --resume", 2, "nothing to resume"),
        ("export nosuch OUT", 1, "nosuch: no such folder"),
        (
            "export nobody/nothing OUT",
            1,
            "nobody/nothing: neither a folder here nor to be had from the hub",
        ),
        (
            "export tiny OUT --precision fp8",
            2,
            "--precision fp8: must be exact, fp32, int8, int4, mixed or fp16",
        ),
        (
            "export tiny OUT --block 32 --precision int8",
            2,
            "--block is for weights of 4 bits, which --precision int8 has none of",
        ),
        (
            "export --synthetic nope OUT",
            2,
            "--synthetic nope: not known; choose one of qwen2-vl-2b, ",
        ),
        ("export --synthetic smolvlm-256m tiny OUT", 2, "--synthetic takes no checkpoint"),
        (
            "export --synthetic smolvlm-256m OUT --precision mixed",
            2,
            "random weights have nothing to search or to keep",
        ),
        ("export tiny", 2, "export needs a checkpoint and the folder to write"),
        ("quantize nosuch OUT", 1, "nosuch: no such folder"),
        ("quantize EMPTY OUT", 1, "not a bundle (lvr.json is missing)"),
        (
            "quantize FP32 OUT --precision fp8",
            2,
            "precision 'fp8' is not known; quantize writes int8, int4, mixed, fp16",
        ),
        (
            "quantize FP32 OUT --precision exact",
            2,
            "precision exact: is written from the checkpoint",
        ),
        (
            "quantize FP32 OUT --precision int4 --block 48",
            2,
            "block 48: must be a power of two, 16 or more",
        ),
        (
            "quantize FP32 OUT --precision mixed --block 48",
            2,
            "block 48: must be a power of two, 16 or more",
        ),
        (
            "quantize FP32 OUT --block 32 --precision int8",
            2,
            "--block is for weights of 4 bits, which --precision int8 has none of",
        ),
        ("quantize FP32 OUT --precision mixed --bits 3", 2, "--bits 3: 4 bits take 4."),
        (
            "quantize FP32 OUT --precision mixed --calibration none.jsonl",
            2,
            "--calibration none.jsonl: no such file",
        ),
        (
            "quantize FP32 OUT --tune-steps 5",
            2,
            "--tune-steps is for weights of 4 bits, which --precision int8 has none of",
        ),
        (
            "quantize FP32 OUT --precision int4 --calibration none --tune-steps 5",
            2,
            "--tune-steps trains on what --calibration gives",
        ),
        (
            "export --synthetic smolvlm-256m OUT --precision int4 --tune-steps 5",
            2,
            "--tune-steps: random weights have nothing",
        ),
        ("quantize INT8 OUT --precision mixed", 1, "its precision is int8"),
        ("quantize INT8 OUT", 1, "its precision is int8"),
        ("quantize FP32 FP32", 1, "is the source itself"),
        ("run INT8 nosuch.png question", 1, "nosuch.png: no such picture"),
        ("run INT8 EMPTY question", 1, "is a folder, not a picture"),
        ("run INT8 TRUNCATED question", 1, "truncated.png: a damaged picture"),
        ("run INT8 TEXT question", 1, "text.png: not a picture"),
        ("run INT8 PICTURE ''", 2, "the question is empty"),
        ("run INT8 PICTURE", 2, "write the question after the pictures"),
        ("run nosuch PICTURE question", 1, "nosuch: no such folder"),
        ("run EMPTY PICTURE question", 1, "neither a bundle (lvr.json) nor a checkpoint"),
        ("run PICTURE PICTURE question", 1, "picture.png: no such folder"),
        ("run INT8 PICTURE question --top-p 2", 2, "top_p must lie in (0, 1], not 2"),
        ("run INT8 PICTURE 'what <|image_pad|> is'", 1, "the question contains <|image_pad|>"),
        (
            "run INT8 PICTURE question --temperature 1 --seed -1",
            2,
            "seed must be 0 or more, not -1",
        ),
        ("run INT8 PICTURE question --json EMPTY", 1, "cannot be written"),
        ("eval nosuch --limit 1", 1, "nosuch: no such folder"),
        ("eval INT8 --suite mmmu", 2, "--suite mmmu: neither a suite"),
        ("eval INT8 --limit 0", 2, "--limit must be 1 or more"),
        ("eval INT8 --suite BROKEN", 1, "broken.jsonl:3: not valid JSON"),
        ("eval INT8 --limit 2 --against nosuch", 1, "nosuch: no such folder"),
        (
            "eval INT8 --limit 2 --against none.json",
            1,
            "--against none.json: cannot be read (No such file or directory)",
        ),
        (
            "eval INT8 --limit 2 --against TEXT",
            1,
            "text.png: not what `lvr-lite eval --json` writes",
        ),
        (
            "eval INT8 --limit 2 --against EMPTY",
            1,
            "config.json: missing; this folder is not a complete checkpoint",
        ),
        (
            "eval INT8 --suite mmvp",
            2,
            "--suite mmvp needs --path DIR, a folder that holds Questions.csv",
        ),
        (
            "eval INT8 --suite mmvp --path EMPTY",
            1,
            "is not mmvp as it is published; the folder must hold Questions.csv",
        ),
        (
            "eval INT8 --suite vstar --path nosuch",
            1,
            "--path nosuch: no such folder; it must hold test_questions.jsonl",
        ),
        ("eval INT8 --path EMPTY", 2, "is for --suite mmvp, vstar, blink, hrbench"),
        ("eval INT8 --steps four", 2, "--steps four: give whole numbers"),
        ("eval INT8 --steps 0,-1", 2, "--steps -1: latent steps must be 0 or more"),
        ("eval INT8 --limit 1 --answers TEXT", 1, "text.png: exists and holds something else"),
        ("eval INT8 --suite skills --skills 3", 2, "--skills 3: --suite skills asks them already"),
        ("bench nosuch", 1, "nosuch: no such folder"),
        ("bench INT8 --image nosuch.png", 1, "nosuch.png: no such picture"),
        ("bench INT8 --vs nosuch", 1, "nosuch: no such folder"),
        ("run INT8 PICTURE question --provider cuda", 2, "provider cuda: the onnxruntime"),
        (
            "run INT8 PICTURE question --provider abacus",
            2,
            "provider 'abacus': not known; choose one of cpu, cuda",
        ),
        ("bench INT8 --provider coreml --runs 1", 2, "provider coreml: the onnxruntime"),
        ("bench INT8 --steps four", 2, "--steps four: give whole numbers"),
        ("bench INT8 --batch 2,2", 2, "--batch 2,2: a number is there twice"),
        ("bench INT8 --batch 0", 2, "batch must be 1 or more, not 0"),
        (
            "bench INT8 --image-tokens 4000 --runs 1 --warmup 0",
            2,
            "image_tokens 4000: int8 gives such a picture",
        ),
        ("bench INT8 INT8", 2, "one bundle is measured; name others with --vs"),
        ("bench table", 2, "bench table takes files"),
        ("bench compare INT8", 2, "bench compare takes two files"),
        ("bench compare nosuch.json nosuch.json", 1, "nosuch.json: No such file"),
        ("bench compare PICTURE PICTURE", 1, "picture.png: not JSON"),
        ("inspect nosuch", 1, "nosuch: no such folder"),
        ("inspect EMPTY", 1, "neither a bundle (lvr.json) nor a checkpoint"),
        ("demo --out OTHERS", 2, "exists and is not an earlier demo"),
        ("data make --out OUT --split dev", 2, "--split dev: must be train or test"),
        ("data make --out OTHERS", 1, "others: "),
        ("data make --out PICTURE/under", 1, "cannot be written"),
        (
            "data convert --from voc SCENES OUT",
            2,
            "--from voc: must be coco, yolo, labelstudio, viscot or lvr",
        ),
        ("data convert --from coco none.json OUT", 1, "none.json: no such file or folder"),
        ("data convert --from coco BROKEN OUT", 1, "broken.jsonl: not valid JSON"),
        ("data convert --from yolo EMPTY OUT", 1, "its classes have no names"),
        ("data convert --from viscot EMPTY OUT", 1, "empty: Is a directory"),
        ("data validate SCENES --model nosuch", 1, "nosuch: no such folder"),
        ("data validate SCENES --against-test none.jsonl", 1, "none.jsonl: cannot be read"),
        ("data preview SCENES --model EMPTY", 1, "config.json: missing"),
        ("data preview none.jsonl", 1, "none.jsonl: cannot be read"),
        ("data preview BROKEN --out OUT", 1, "broken.jsonl:3: not valid JSON"),
        ("data preview SCENES --out PICTURE/under.png", 1, "cannot be written"),
        ("doctor --json EMPTY", 1, "cannot be written"),
    ],
)
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    call: Call, small_fp32: Path, small_int8: Path, scenes: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: str, code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    named = {
        "FP32": small_fp32,
        "INT8": small_int8,
        "SCENES": scenes,
        "PICTURE": picture,
        "OUT": tmp_path / "out",
    }
    named |= {n: tmp_path / f"{n.lower()}" for n in ("EMPTY", "OTHERS")}
    named |= {
        "TRUNCATED": tmp_path / "truncated.png",
        "TEXT": tmp_path / "text.png",
        "BROKEN": tmp_path / "broken.jsonl",
    }
    named["EMPTY"].mkdir()
    named["OTHERS"].mkdir()
    (named["OTHERS"] / "mine.txt").write_text("mine")
    named["TRUNCATED"].write_bytes(picture.read_bytes()[:90])
    named["TEXT"].write_text("no picture")
    good = [json.loads(line) for line in scenes.read_text().splitlines()]
    lines = [json.dumps(g | {"image": str(scenes.parent / g["image"])}) for g in good]
    named["BROKEN"].write_text("\n".join([*lines[:2], '{"id": "x", ', *lines[2:]]))
    before, bundle = files(tmp_path), files(small_fp32)
    words = [("" if w == "''" else w.strip("'")) for w in re.findall(r"'[^']*'|\S+", arguments)]
    filled = [
        re.sub(r"^([A-Z0-9]+)(?=/|$)", lambda m: str(named.get(m.group(1), m.group(1))), w)
        for w in words
    ]
    done = call(*filled)
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert said in done.error
    assert files(tmp_path) == before
    assert not named["OUT"].exists()
    assert files(small_fp32) == bundle


@pytest.mark.parametrize(
    "arguments",
    [
        "run bundle picture.png question --steps -1",
        "run bundle picture.png question --max-tokens 0",
        "run bundle",
        "run bundle picture.png question --temperature nan",
        "eval bundle --batch 0",
        "eval bundle --seed -1",
        "eval bundle --threads 0",
        "eval bundle --skills -1",
        "bench bundle --runs 0",
        "bench bundle --runs many",
        "data make --count 3",
        "data make --out here --count 0",
        "data make --out here --seed 1000000",
        "finetune --data scenes --out here",
        "data validate some.jsonl --nosuch",
        "nosuch",
        "--nosuch",
    ],
)
def test_a_call_that_cannot_be_understood_shows_usage_and_the_reason(
    call: Call, arguments: str
) -> None:
    done = call(*arguments.split())
    assert done.code == 2
    assert "Usage: lvr-lite" in done.err
    assert "Error" in done.err
    assert "Traceback" not in done.err


def test_an_error_in_a_process_of_its_own_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = process("run", tmp_path / "nosuch", tmp_path / "p.png", "q")
    assert done.code == 1
    assert "no such picture" in done.error
    assert done.out == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = process("inspect", tmp_path / "nosuch", "--debug")
    assert done.code == 1
    assert done.err.startswith("Traceback (most recent call last):")
    assert "BundleError" in done.err.splitlines()[-1]


def test_a_file_without_permission_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", "secret")

    monkeypatch.setattr("lvr_lite.model.bundle.is_bundle", denied)
    done = call("inspect", "secret")
    assert (done.code, done.error) == (
        1,
        "secret: Permission denied; check the path, the permissions and the free space",
    )


def test_a_bundle_in_the_place_of_someones_files_is_refused(
    call: Call, small_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for precision in ("fp32", "int8"):
        done = call("export", small_checkpoint, tmp_path / "mine", "--precision", precision)
        assert (done.code, "exists and is not an earlier result" in done.err.splitlines()[-1]) == (
            1,
            True,
        )
    done = call("export", small_checkpoint, tmp_path / "mine" / "thesis.txt")
    assert done.code == 1
    assert files(tmp_path) == {"mine/thesis.txt": b"mine"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "grpo needs --data and --out; only --plan goes without"),
        (
            ("--data", "scenes", "--out", "out"),
            "was not tuned with latents; tune it with `lvr-lite finetune` first",
        ),
        (("--vram", "12"), "--vram is for --plan"),
    ],
)
def test_stage_2_without_what_it_needs_is_one_line(
    call: Call, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = call(
        "grpo", "--checkpoint", "tiny", *(tmp_path / a if a == "out" else a for a in arguments)
    )
    assert done.code in (1, 2)
    assert said in done.error
    assert not (tmp_path / "out").exists()


def test_a_tuned_checkpoint_is_not_tuned_again(
    call: Call, small_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "tuned"))
    (folder / "lvr_config.json").write_text(
        json.dumps({"base": str(small_checkpoint), "latent": {"steps": 2}})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"")
    done = call("finetune", "--model", folder, "--data", "scenes", "--out", tmp_path / "out")
    assert (done.code, f"give its base ({small_checkpoint})" in done.error) == (2, True)


# ---------------------------------------------------------------------------------------------------
# damaged bundles


def removed(bundle: Path) -> str:
    (bundle / "onnx" / "decoder.onnx_data").unlink()
    return "onnx/decoder.onnx_data: missing"


def truncated(bundle: Path) -> str:
    path = bundle / "onnx" / "decoder.onnx_data"
    path.write_bytes(path.read_bytes()[:-100])
    return "onnx/decoder.onnx_data: changed or truncated"


def changed(bundle: Path) -> str:
    path = bundle / "onnx" / "lm_head.onnx_data"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    return "onnx/lm_head.onnx_data: changed or truncated"


def other_tokenizer(bundle: Path) -> str:
    path = bundle / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    return "tokenizer.json: changed or truncated"


def half_a_manifest(bundle: Path) -> str:
    path = bundle / "lvr.json"
    path.write_text(path.read_text()[:200])
    return "lvr.json: not valid JSON"


def later_version(bundle: Path) -> str:
    path = bundle / "lvr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    return "lvr.json: bundle version 2, this lvr-lite reads version 1"


@pytest.mark.parametrize(
    "damage", [removed, truncated, changed, other_tokenizer, half_a_manifest, later_version]
)
@pytest.mark.parametrize("command", ["run", "eval", "bench", "inspect", "quantize"])
def test_a_damaged_bundle_is_refused_by_the_name_of_its_file(
    call: Call,
    copied: Callable[[Path], Path],
    small_fp32: Path,
    picture: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], str],
) -> None:
    bundle = copied(small_fp32)
    said = damage(bundle)
    more = {
        "run": [picture, "q"],
        "eval": ["--limit", 1],
        "bench": ["--runs", 1],
        "quantize": [tmp_path / "out"],
    }.get(command, [])
    done = call(command, bundle, *more)
    assert done.code == 1
    assert said in done.error
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------
# full disks


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights find no room where they are written."""
    from lvr_lite.export import onnxfile

    @contextmanager
    def no_room(path: Path) -> Iterator[onnxfile.DataFile]:
        with Path("/dev/full").open("wb") as file:
            yield onnxfile.DataFile(file, path.name)

    monkeypatch.setattr(onnxfile, "data_file", no_room)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_no_quantized_bundle(
    call: Call, small_fp32: Path, tmp_path: Path
) -> None:
    done = call("quantize", small_fp32, tmp_path / "out")
    assert (done.code, "cannot be written (No space left on device)" in done.error) == (1, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_full_disk_leaves_no_exported_bundle(
    call: Call, small_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    done = call("export", small_checkpoint, tmp_path / "out", "--precision", precision)
    assert done.code == 1
    assert "No space left on device" in done.error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_bundle_that_was_there(
    call: Call,
    small_fp32: Path,
    copied: Callable[[Path], Path],
    small_int8: Path,
    request: pytest.FixtureRequest,
) -> None:
    earlier = copied(small_int8)
    before = files(earlier)
    request.getfixturevalue("full_disk")
    assert call("quantize", small_fp32, earlier).code == 1
    assert files(earlier) == before
    assert [p.name for p in earlier.parent.iterdir()] == [earlier.name]


def test_a_full_disk_leaves_no_scenes(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "save", full)
    done = call("data", "make", "--out", tmp_path / "scenes", "--count", 2)
    assert (done.code, "No space left on device" in done.error) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_half_written_json(
    call: Call, small_int8: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.json").write_text("earlier")
    monkeypatch.setattr(Path, "write_text", full)
    done = call("run", small_int8, picture, "what is here", "--json", tmp_path / "run.json")
    assert done.code == 1
    assert "No space left on device" in done.err.splitlines()[-1]
    assert files(tmp_path) == {"run.json": b"earlier", "picture.png": picture.read_bytes()}


# -------------------------------------------------------------------------------------------------------
# what works


def test_scenes_are_made_validated_and_shown(call: Call, tmp_path: Path) -> None:
    made = call(
        "data", "make", "--out", tmp_path / "scenes", "--count", 3, "--seed", 2, "--split", "test"
    )
    path = tmp_path / "scenes" / "test.jsonl"
    assert (made.code, made.err) == (0, f"{path}: 3 questions\n")
    checked = call("data", "validate", path)
    assert (checked.code, checked.out, checked.err) == (
        0,
        "",
        f"{path}: 3 good samples, 0 problems\n",
    )
    shown = call("data", "preview", path, "--out", tmp_path / "sheet.png", "--count", 2)
    assert shown.code == 0, shown.err
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 320


def test_a_detection_set_is_converted_split_validated_and_shown(call: Call, tmp_path: Path) -> None:
    images, annotations = [], []
    for i in range(4):
        picture = Image.new("RGB", (60, 90), (100, 40 * i, 30))
        picture.save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 60, "height": 90})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 30, 40]})
    source = tmp_path / "coco.json"
    source.write_text(
        json.dumps(
            {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
        )
    )
    train, test = tmp_path / "set-train.jsonl", tmp_path / "set-test.jsonl"
    done = call(
        "data",
        "convert",
        "--from",
        "coco",
        source,
        tmp_path / "set.jsonl",
        "--test-share",
        0.25,
        "--seed",
        3,
    )
    assert (done.code, done.out) == (0, "")
    assert re.fullmatch(
        rf"{train}: \d questions and {test}: \d questions about 4 pictures \(.*exactly \d.*\)\n",
        done.err,
    )
    assert call("data", "validate", train, "--against-test", test).code == 0
    assert call("data", "preview", test, "--out", tmp_path / "sheet.png").code == 0
    leaking = call("data", "validate", train, "--against-test", train)
    assert (leaking.code, "a picture may be in one of them only" in leaking.out) == (1, True)
    annotations[2]["bbox"] = [10, 10, 0, 40]
    source.write_text(
        json.dumps(
            {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
        )
    )
    refused = call("data", "convert", "--from", "coco", source, tmp_path / "new.jsonl")
    assert (refused.code, (tmp_path / "new.jsonl").exists()) == (1, False)
    assert (
        refused.out
        == f"{source}: annotations[2] (id 2): bbox: [10, 10, 10, 50] is empty or inverted; width and height must be more than 0\n"
    )
    assert (
        refused.err
        == f"{source}: 1 broken rows, nothing was written; mend them, or leave them out with --skip-broken\n"
    )
    skipped = call(
        "data", "convert", "--from", "coco", source, tmp_path / "new.jsonl", "--skip-broken"
    )
    assert (skipped.code, skipped.out, "1 broken rows" in skipped.err) == (0, refused.out, True)


def test_notes_are_told_and_do_not_fail(call: Call, scenes: Path, tmp_path: Path) -> None:
    line = json.loads(scenes.read_text().splitlines()[0])
    path = tmp_path / "some.jsonl"
    path.write_text(
        json.dumps(line | {"image": str(scenes.parent / line["image"]), "boxes": [[0, 0, 1, 1]]})
    )
    done = call("data", "validate", path)
    assert (done.code, done.err) == (0, f"{path}: 1 good samples, 0 problems, 1 notes\n")
    assert done.out == f"{path}:1: note: boxes[0]: is the whole picture: no place to look at\n"


def test_every_problem_of_a_file_is_listed(call: Call, scenes: Path, tmp_path: Path) -> None:
    lines = [
        json.loads(line) | {"image": str(scenes.parent / json.loads(line)["image"])}
        for line in scenes.read_text().splitlines()
    ]
    lines[1]["boxes"] = [[0, 0, 300, 2]]
    lines[2].pop("answer")
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n{\n")
    done = call("data", "validate", path)
    assert done.code == 1
    assert [line.split(": ")[0] for line in done.out.splitlines()] == [
        f"{path}:{n}" for n in (2, 3, 5)
    ]
    assert done.err == f"{path}: 2 good samples, 3 problems\n"


def test_an_answer_streams_the_text_that_it_prints_at_once(
    call: Call, small_int8: Path, picture: Path, tmp_path: Path
) -> None:
    plain = call(
        "run",
        small_int8,
        picture,
        "what is here",
        "--max-tokens",
        5,
        "--json",
        tmp_path / "run.json",
    )
    streamed = call("run", small_int8, picture, "what is here", "--max-tokens", 5, "--stream")
    assert plain.code == streamed.code == 0, plain.err
    assert plain.out == streamed.out
    told = json.loads((tmp_path / "run.json").read_text())
    assert (told["schema"], told["version"], told["answer"]) == (
        "lvr-lite/run",
        1,
        plain.out.strip("\n"),
    )
    assert len(told["tokens"]) <= 5


def test_other_questions_about_a_picture_are_answered_as_if_asked_alone(
    call: Call, small_int8: Path, picture: Path, tmp_path: Path
) -> None:
    questions = ("what colour is the star", "where heart", "how many are red")
    alone = [call("run", small_int8, picture, q, "--max-tokens", 4).out.strip() for q in questions]
    more = [option for q in questions[1:] for option in ("--also", q)]
    done = call(
        "run",
        small_int8,
        picture,
        questions[0],
        "--max-tokens",
        4,
        *more,
        "--json",
        tmp_path / "run.json",
    )
    assert done.out.strip().splitlines() == alone
    told = json.loads((tmp_path / "run.json").read_text())
    assert [told["answer"], *(a["answer"] for a in told["also"])] == alone


def test_runs_of_the_bench_are_written_in_every_form_and_compared(
    call: Call, small_int8: Path, tmp_path: Path
) -> None:
    a, b, samples, page = (
        tmp_path / name for name in ("a.json", "b.json", "samples.csv", "page.html")
    )
    options = ("--runs", 2, "--warmup", 0, "--tokens", 2, "--steps", "0,2", "--batch", "1,2")
    assert (
        call("bench", small_int8, *options, "--json", a, "--csv", samples, "--html", page).code == 0
    )
    told = json.loads(a.read_text())
    assert [s["name"].split(", ", 1)[1] for s in told["systems"]] == [
        "K 0",
        "K 2",
        "K 0, batch 2",
        "K 2, batch 2",
    ]
    assert samples.read_text().startswith("system,precision,")
    assert "How it grows" in page.read_text()
    slow = json.loads(a.read_text())
    for system in slow["systems"]:
        system["end_to_end_ms"]["samples_ms"] = [9e3, 9e3]
        system["end_to_end_ms"]["p50_ms"] = 9e3
    b.write_text(json.dumps(slow))
    assert call("bench", "compare", a, a).code == 0
    assert call("bench", "table", a, a).out.count("batch 2") == 4
    done = call("bench", "compare", a, b, "--json", tmp_path / "changes.json")
    assert done.code == 1
    assert {
        r["measure"]
        for r in json.loads((tmp_path / "changes.json").read_text())["rows"]
        if r["verdict"] == "slower"
    } == {"end_to_end"}


def test_a_checkpoint_answers_as_its_bundle_does(
    call: Call, small_checkpoint: Path, small_fp32: Path, picture: Path, tmp_path: Path
) -> None:
    answers = []
    for model in (small_checkpoint, small_fp32):
        done = call(
            "run",
            model,
            picture,
            "what is here",
            "--steps",
            0,
            "--max-tokens",
            4,
            "--json",
            tmp_path / "run.json",
        )
        assert done.code == 0, done.err
        answers.append(json.loads((tmp_path / "run.json").read_text())["tokens"])
    assert answers[0] == answers[1]


def test_eval_writes_what_the_design_promises(
    call: Call, small_int8: Path, scenes: Path, tmp_path: Path
) -> None:
    done = call(
        "eval",
        small_int8,
        "--suite",
        scenes,
        "--limit",
        3,
        "--max-tokens",
        2,
        "--json",
        tmp_path / "eval.json",
    )
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "eval.json").read_text())
    assert (told["schema"], told["version"], told["suite"], told["n"], told["model"]) == (
        "lvr-lite/eval",
        1,
        str(scenes),
        3,
        "int8",
    )
    assert {"accuracy", "interval", "by_type", "pair_accuracy", "answers"} <= set(told)


def test_models_are_compared_on_the_same_questions(
    call: Call, small_int8: Path, small_fp32: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    done = call("eval", small_fp32, "--limit", 3, "--skills", 4, "--max-tokens", 2, "--json", one)
    assert done.code == 0, done.err
    told = json.loads(one.read_text())
    assert [told["skills"]["n"], len(told["skills"]["answers"])] == [4, 4]
    assert "outside the suite" in done.out
    told["answers"][0] |= {
        "score": 1 - told["answers"][0]["score"]
    }  # as if one answer had come out otherwise
    one.write_text(json.dumps(told))
    done = call(
        "eval",
        small_fp32,
        "--limit",
        3,
        "--skills",
        4,
        "--max-tokens",
        2,
        "--against",
        one,
        "--against",
        small_int8,
        "--json",
        two,
    )
    assert done.code == 0, done.err
    from_file, from_model = json.loads(two.read_text())["against"]
    assert (from_file["source"], from_model["source"]) == (str(one), str(small_int8))
    assert abs(from_file["difference"]) == 0.3333
    assert {"model", "n", "accuracy", "difference", "interval", "p", "by_type", "skills"} <= set(
        from_file
    )
    assert {"difference", "interval", "by_type"} <= set(from_model["skills"])
    assert "difference on the same questions" in done.out


def test_skills_are_a_suite_too_and_can_be_left_out(
    call: Call, small_int8: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"
    assert (
        call(
            "eval", small_int8, "--suite", "skills", "--limit", 3, "--max-tokens", 2, "--json", out
        ).code
        == 0
    )
    told = json.loads(out.read_text())
    assert (told["n"], sorted(told["by_type"]), "skills" in told) == (
        3,
        ["caption", "place", "short"],
        False,
    )
    done = call("eval", small_int8, "--limit", 2, "--skills", 0, "--max-tokens", 2, "--json", out)
    assert (done.code, "outside" in done.out, "skills" in json.loads(out.read_text())) == (
        0,
        False,
        False,
    )


def test_inspect_and_doctor_write_what_they_show(
    call: Call, small_int8: Path, tmp_path: Path
) -> None:
    assert call("inspect", small_int8, "--json", tmp_path / "inspect.json").code == 0
    told = json.loads((tmp_path / "inspect.json").read_text())
    assert (told["schema"], told["kind"], told["intact"]) == ("lvr-lite/inspect", "bundle", True)
    call("doctor", "--json", tmp_path / "doctor.json")
    assert json.loads((tmp_path / "doctor.json").read_text())["schema"] == "lvr-lite/doctor"


def test_an_export_is_a_bundle_that_answers(
    call: Call, small_checkpoint: Path, picture: Path, tmp_path: Path
) -> None:
    done = call(
        "export",
        small_checkpoint,
        tmp_path / "out",
        "--precision",
        "int4",
        "--json",
        tmp_path / "export.json",
    )
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "export.json").read_text())["precision"] == "int4"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export.json", "out", "picture.png"]
    assert call("run", tmp_path / "out", picture, "what is here", "--max-tokens", 2).code == 0


def test_too_little_disk_is_one_line(
    call: Call,
    small_fp32: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, used=10**12, free=0)
    )
    for done in (
        call("quantize", small_fp32, tmp_path / "out"),
        call("export", small_checkpoint, tmp_path / "out"),
    ):
        assert (done.code, " MB of free disk, 0 MB are left" in done.error) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_a_tuned_checkpoint_is_exported_as_it_was_trained(
    call: Call, small_tuned: Path, picture: Path, tmp_path: Path
) -> None:
    done = call(
        "export",
        small_tuned,
        tmp_path / "out",
        "--precision",
        "exact",
        "--json",
        tmp_path / "export.json",
    )
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "export.json").read_text())
    assert (told["precision"], told["parity"]["decoding"]["relative"] < 1e-4) == ("exact", True)
    assert call("run", tmp_path / "out", picture, "what is here", "--max-tokens", 2).code == 0


@pytest.mark.parametrize("options", ["--precision fp16", "--precision int4 --block 32"])
def test_a_bundle_is_quantized_and_asked(
    call: Call, small_fp32: Path, picture: Path, tmp_path: Path, options: str
) -> None:
    done = call(
        "quantize",
        small_fp32,
        tmp_path / "out",
        *options.split(),
        "--json",
        tmp_path / "quantize.json",
    )
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "quantize.json").read_text())
    assert (told["schema"], told["precision"], told["bundle"]) == (
        "lvr-lite/quantize",
        options.split()[1],
        str(tmp_path / "out"),
    )
    assert call("run", tmp_path / "out", picture, "what is here", "--max-tokens", 2).code == 0
    assert call("inspect", tmp_path / "out").code == 0


def test_a_model_is_tuned_exported_and_asked(
    call: Call, small_checkpoint: Path, picture: Path, tmp_path: Path
) -> None:
    settings = [
        "train.steps=1",
        "train.batch=2",
        "train.accumulation=1",
        "train.gradient_checkpointing=true",
        "data.count=8",
        "data.eval_count=1",
    ]
    settings += ["train.eval_every=1", "train.save_every=1", "latent.steps=2"]
    out, tuned, bundle = tmp_path / "finetune.json", tmp_path / "tuned", tmp_path / "bundle"
    overrides = [f"--set={s}" for s in settings]
    done = process(
        "finetune",
        "--model",
        small_checkpoint,
        "--data",
        "scenes",
        "--out",
        tuned,
        "--json",
        out,
        *overrides,
    )
    assert done.code == 0, done.err
    assert not re.search("Warning|Loading|Writing", done.err), f"a library speaks: {done.err}"
    told = json.loads(out.read_text())
    assert (told["schema"], told["out"], told["steps"]) == ("lvr-lite/finetune", str(tuned), 1)
    exported = call("export", tuned, bundle, "--precision", "fp32")
    assert exported.code == 0, exported.err
    answers = []
    for model in (tuned, bundle):
        assert (
            call(
                "run",
                model,
                picture,
                "what is here",
                "--max-tokens",
                3,
                "--json",
                tmp_path / "run.json",
            ).code
            == 0
        )
        answers.append(json.loads((tmp_path / "run.json").read_text())["tokens"])
    assert answers[0] == answers[1]
    assert json.loads((bundle / "lvr.json").read_text())["latent"]["steps"] == 2


def test_stopping_by_ctrl_c_shows_no_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: Path) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("lvr_lite.model.bundle.is_bundle", stopped)
    done = call("inspect", "x")
    assert done.code == 130
    assert "Traceback" not in done.err
