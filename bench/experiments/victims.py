"""Commands that are to be disturbed: small jobs, each in a process forked from one that has
imported everything, so that a thousand of them take an hour and not a day.

What a command does is what a user's would do: its own main is called. Models are small, steps few,
and torch runs on one thread. May import: all that stands above `bench.experiments`.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Before what reads them is imported: the process that forks must have no threads, and the bar of a
# training shows each step.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ["TQDM_MININTERVAL"] = "0"

import lvr_lite
from lvr_lite.bench.experiments.runner import overrides
from lvr_lite.model.bundle import MANIFEST, Bundle
from lvr_lite.toy.make import write_scenes
from lvr_lite.train.run_folder import COMPLETE

STEPS = 10
SAVE_EVERY = 2
ANSWERS = 60
TRAINING = (
    f"train.steps={STEPS}", f"train.save_every={SAVE_EVERY}", "train.eval_every=1000",
    "train.batch=1", "train.log_every=1", "train.precision=fp32", "train.accumulation=1",
    "train.gradient_checkpointing=false", "data.eval_count=1", "lora.rank=4",
)  # fmt: skip
OF_FINETUNE = (*TRAINING, "latent.steps=2", "data.replay=null")
OF_GRPO = (*TRAINING, "grpo.group=4")
# Pictures of two sizes: what an earlier bundle has, and what the next one has.
SIZES = (200_704, 100_352)
# Of a sound run, in seconds.
PATIENCE = 300.0
BAR = re.compile(rf"(\d+)/{STEPS} \[")


@dataclass(frozen=True)
class Ended:
    """What a command left.

    code: its exit code; negative: the signal that ended it.
    text: what it said.
    seconds: that it took.
    """

    code: int
    text: str
    seconds: float

    @property
    def error(self) -> str | None:
        """The one line of an error; None where it is not one line, or none at all."""
        lines = self.text.replace("\r", "\n").strip().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        clean = "Traceback" not in self.text and len(errors) == 1 and lines[-1] == errors[0]
        return errors[0] if clean else None


@dataclass
class Job:
    """A command with its folder.

    name: of the command.
    folder: holds the target and nothing else.
    target: what the command writes.
    arguments: of a run that begins; given the number of the try.
    going_on: arguments of the run after a kill.
    state: raises AssertionError where the target is not whole; else what is there, such as the
        number of the last step. None for nothing.
    begin: makes what is there before a try; given the number of the try.
    late: a file that shows that the end is near.
    """

    name: str
    folder: Path
    target: Path
    arguments: Callable[[int], list[str]]
    going_on: Callable[[int], list[str]]
    state: Callable[[], Any]
    begin: Callable[[int], None]
    late: Callable[[], bool]
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder.parent / f"{self.name}.log"

    @property
    def beside(self) -> list[str]:
        """What lies beside the target."""
        return sorted(p.name for p in self.folder.iterdir() if p != self.target)

    def reached(self) -> int:
        """Of a training, the last step that its bar shows."""
        steps = BAR.findall(self.log.read_text(encoding="utf-8", errors="replace"))
        return int(steps[-1]) if steps else 0


# ------------------------------------------------------------------------------------- processes


def import_all() -> None:
    """All that commands import."""
    for module in pkgutil.walk_packages(lvr_lite.__path__, "lvr_lite."):
        if not module.name.startswith(("lvr_lite.bench.experiments", "lvr_lite.__main__")):
            importlib.import_module(module.name)
    for name in ("bitsandbytes", "peft", "typer._adapters", "matplotlib.pyplot", "tensorboard"):
        importlib.import_module(name)
    importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")


def start(arguments: Sequence[object], log: Path) -> int:
    """Run `lvr-lite` with these arguments in a forked process, whose id is returned."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        code = _main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(arguments: Sequence[object]) -> int:
    """What `python -m lvr_lite` does."""
    sys.argv = ["lvr-lite", *map(str, arguments)]
    try:
        runpy.run_module("lvr_lite", run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001
        import traceback

        traceback.print_exc()
        return 70
    return 0


def wait(child: int, seconds: float) -> int | None:
    """The exit code of a process; None where it still runs after so long."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def run(job: Job, arguments: Sequence[object]) -> Ended:
    """Run a command to its end."""
    began = time.monotonic()
    child = start(arguments, job.log)
    code = wait(child, PATIENCE)
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        code = -int(signal.SIGKILL)
    return Ended(
        code, job.log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - began
    )


def must_end_well(job: Job, arguments: Sequence[object]) -> Ended:
    """`run`; raises AssertionError where the command fails."""
    ended = run(job, arguments)
    line = " ".join(map(str, arguments))
    assert ended.code == 0, f"lvr-lite {line}: exit code {ended.code}: {ended.text[-3000:]}"
    return ended


# ------------------------------------------------------------------------------------------ jobs


@dataclass(frozen=True)
class Materials:
    """What the jobs work on: a small base model, its tuned checkpoint, its bundle, samples."""

    base: Path
    tuned: Path
    fp32: Path
    int8: Path
    samples: Path


def make_materials(folder: Path) -> Materials:
    """Make them in `folder`; a model of one layer in each tower is exported in seconds."""
    base, tuned, fp32, int8 = (folder / name for name in ("base", "tuned", "fp32", "int8"))
    found = Materials(base, tuned, fp32, int8, folder / "s.jsonl")
    if (folder / "ready").exists():
        return found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_scenes(folder / "scenes", ANSWERS, 0, "test")
    lines = (
        (folder / "scenes" / "test.jsonl")
        .read_text(encoding="utf-8")
        .replace("images/", "scenes/images/")
    )
    found.samples.write_text(lines, encoding="utf-8")
    log = folder / "log"
    child = os.fork()
    if child == 0:
        _small_base(found.base)
        os._exit(0)
    os.waitpid(child, 0)
    training = ("--data", found.samples, *overrides(*OF_FINETUNE))
    for arguments in (
        ("finetune", "--model", found.base, "--out", found.tuned, *training),
        ("export", found.tuned, found.fp32, "--precision", "fp32"),
        ("quantize", found.fp32, found.int8),
    ):
        if wait(start(arguments, log), PATIENCE) != 0:
            raise SystemExit(f"{arguments}: {log.read_text(encoding='utf-8')[-3000:]}")
    (folder / "ready").touch()
    return found


def _small_base(folder: Path) -> None:
    """Random weights of the embedded model's making, one layer in each tower."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from lvr_lite.toy import build

    config = build.make_config(build.make_tokenizer())
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 1, [0]
    torch.manual_seed(5)
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    build.save(model, build.make_tokenizer(), folder, torch.float32)


def jobs(materials: Materials, folder: Path) -> dict[str, Job]:
    """{command: its job}, each in a folder of its own in `folder`."""
    made = [
        _training("finetune", ("--model", materials.base), OF_FINETUNE, materials, folder),
        _training("grpo", ("--checkpoint", materials.tuned), OF_GRPO, materials, folder),
        _bundle("export", partial(_export, materials), folder),
        _bundle("quantize", partial(_quantize, materials), folder),
        _eval(materials, folder),
    ]
    return {job.name: job for job in made}


def _training(
    name: str,
    model: tuple[object, ...],
    settings: tuple[str, ...],
    materials: Materials,
    folder: Path,
) -> Job:
    out = folder / name / "run"
    line = [name, *map(str, model), "--data", str(materials.samples), "--out", str(out)]
    line += overrides(*settings)

    def begin(number: int) -> None:  # noqa: ARG001
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)

    def late() -> bool:
        # A checkpoint is being written.
        return any(not (path / COMPLETE).exists() for path in _checkpoints(out))

    return Job(
        name=name,
        folder=out.parent,
        target=out,
        arguments=lambda number: line,  # noqa: ARG005
        going_on=lambda number: [*line, "--resume"],  # noqa: ARG005
        state=lambda: last_step(out),
        begin=begin,
        late=late,
    )


def _checkpoints(out: Path) -> list[Path]:
    return [path for path in out.glob("*checkpoint-*") if path.is_dir()] if out.is_dir() else []


def last_step(out: Path) -> int:
    """The step of the last whole checkpoint in the folder of a run, which must be readable; 0 where
    there is none.
    """
    from lvr_lite.commands.inspect import CheckpointContents, inspect
    from lvr_lite.train.run_folder import last_whole_checkpoint, steps_of

    last = last_whole_checkpoint(out) if out.is_dir() else None
    if last is None:
        return 0
    for path in (last, out) if (out / COMPLETE).is_file() else (last,):
        contents = inspect(path)
        assert isinstance(contents, CheckpointContents)
        assert contents.weights, f"{path}: has no weights"
    return steps_of(last)


def _bundle(name: str, line: Callable[[int, Path], list[str]], folder: Path) -> Job:
    target = folder / name / "bundle"

    def begin(number: int) -> None:
        """The bundle of the try before, so that it can be told from this one's."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            child = start(line(number - 1, target), folder / f"{name}.log")
            assert wait(child, PATIENCE) == 0, (folder / f"{name}.log").read_text(encoding="utf-8")[
                -3000:
            ]

    def state() -> str:
        return mark_of(target)

    def late() -> bool:
        # The manifest is written last.
        return any(target.parent.glob(f".*/**/{MANIFEST}"))

    def arguments(number: int) -> list[str]:
        return line(number, target)

    return Job(name, target.parent, target, arguments, arguments, state, begin, late)


def mark_of(target: Path) -> str:
    """What tells a bundle from the one before, all of whose files are whole."""
    manifest = Bundle.open(target).manifest
    return f"{manifest.precision} {manifest.image.max_pixels}"


def _export(materials: Materials, number: int, target: Path) -> list[str]:
    size = SIZES[number % 2]
    line = ["export", materials.tuned, target, "--precision", "fp32", "--max-pixels", size]
    return [str(word) for word in line]


def _quantize(materials: Materials, number: int, target: Path) -> list[str]:
    precision = ("int8", "fp16")[number % 2]
    return ["quantize", str(materials.fp32), str(target), "--precision", precision]


def _eval(materials: Materials, folder: Path) -> Job:
    target = folder / "eval" / "answers.jsonl"
    line = ["eval", materials.int8, "--suite", materials.samples, "--answers", target, "--batch", 2]
    words = [str(word) for word in line]

    def begin(number: int) -> None:
        # One try in two begins with the answers of the one before.
        target.parent.mkdir(parents=True, exist_ok=True)
        if number % 2 == 0:
            target.unlink(missing_ok=True)
        elif target.exists():
            lines = target.read_bytes().splitlines(keepends=True)
            target.write_bytes(b"".join(lines[: 1 + ANSWERS // 3]))

    return Job(
        name="eval",
        folder=target.parent,
        target=target,
        arguments=lambda number: words,  # noqa: ARG005
        going_on=lambda number: words,  # noqa: ARG005
        state=lambda: whole_answers(target),
        begin=begin,
        late=lambda: whole_answers(target) > 0,
    )


def whole_answers(path: Path) -> int:
    """How many answers a file holds: every line but a torn last one is JSON, no answer is there
    twice.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")[:-1]
    answers = [json.loads(line) for line in lines[1:]]
    ids = [answer["id"] for answer in answers]
    assert len(set(ids)) == len(ids), f"{path}: an answer is there twice"
    return len(ids)
