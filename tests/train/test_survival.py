"""What a run survives: signals, numbers that are not finite, memory and disks that are full, kills,
a second run on its folder, and files that were damaged or prepared.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lvr_lite.config import Settings, load_settings
from lvr_lite.errors import BundleError, LvrError, NotFiniteError, OutputError, StoppedError
from lvr_lite.files import locked, sync
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.sums import SUMS, check_sums, read_sums
from lvr_lite.train import run_folder
from lvr_lite.train.out_of_memory import first_to_lower, told_in_one_line
from lvr_lite.train.run_folder import COMPLETE, last_whole_checkpoint, whole_checkpoints
from lvr_lite.train.sft import LatentSFT
from lvr_lite.train.stopping import StopRequest
from lvr_lite.train.trainer import LatentTrainer
from tests.command_line import Call, two_processes
from tests.tuning import TINY_RUN, losses, tune

Run = tuple[Path, dict[str, Any]]
EVERY_STEP = ("train.save_every=1", "train.keep=9")


@pytest.fixture(scope="module")
def run(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run of four steps with two checkpoints: its folder and its metrics."""
    out = tmp_path_factory.mktemp("run") / "out"
    metrics, _ = tune(small_checkpoint, out)
    return out, metrics


@pytest.fixture
def stopped_run(run: Run, tmp_path: Path) -> Path:
    """A copy of the run as if it had been killed after its last checkpoint-N."""
    out = Path(shutil.copytree(run[0], tmp_path / "stopped"))
    for name in (COMPLETE, SUMS, "metrics.json", "adapter_model.safetensors"):
        (out / name).unlink()
    return out


def before_step(
    monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[LatentTrainer], None]
) -> None:
    """Call `action` when a step begins, from 1."""
    original = LatentTrainer.training_step

    def training_step(self: LatentTrainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step + 1 == step:
            action(self)
        return original(self, *arguments, **options)

    monkeypatch.setattr(LatentTrainer, "training_step", training_step)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    mine, theirs = adapter(one), adapter(other)
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def rates(metrics: dict[str, Any]) -> list[float]:
    return [h["learning_rate"] for h in metrics["history"] if "learning_rate" in h]


# --------------------------------------------------------------------------------------------------
# signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_whole_checkpoint_and_stops_and_the_run_goes_on_from_there(
    run: Run,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    out = tmp_path / "out"
    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        before_step(patched, 3, lambda _: os.kill(os.getpid(), number))
        with pytest.raises(StoppedError, match=rf"step 3: .*; saved in {out}/checkpoint-3") as end:
            tune(small_checkpoint, out)
    assert end.value.exit_code == code
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert last_whole_checkpoint(out) == out / "checkpoint-3"
    assert not (out / COMPLETE).exists()
    metrics, _ = tune(small_checkpoint, out, resume=True)
    assert losses(metrics)[4] == pytest.approx(losses(run[1])[4], abs=1e-4)
    assert (out / COMPLETE).is_file()


def test_a_signal_in_the_last_step_lets_the_run_come_to_its_end(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, 2, lambda _: os.kill(os.getpid(), signal.SIGINT))
    metrics, _ = tune(small_checkpoint, tmp_path / "out", "train.steps=2")
    assert metrics["steps"] == 2
    assert (tmp_path / "out" / COMPLETE).is_file()


def test_a_second_signal_ends_the_run_at_once_and_leaves_nothing_half_written(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]

    def twice(_: LatentTrainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before_step(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        tune(small_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_while_a_checkpoint_is_written_leaves_the_one_before(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupted(checkpoint: Path, keep: int) -> None:
        if checkpoint.name == "checkpoint-4":
            raise KeyboardInterrupt
        mark_whole(checkpoint, keep)

    mark_whole = run_folder.mark_whole
    monkeypatch.setattr("lvr_lite.train.trainer.mark_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(small_checkpoint, out)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    check_sums(out / "checkpoint-2")


def test_signals_that_were_switched_off_stay_so() -> None:
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_a_thread_leaves_signals_alone() -> None:
    handlers = []

    def ask() -> None:
        with StopRequest():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def begun(*arguments: object) -> subprocess.Popen[str]:
    """The command line in a process of its own, its signals as a terminal gives them."""
    return subprocess.Popen(
        [sys.executable, "-m", "lvr_lite", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have switched Ctrl-C off.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_names_the_command_that_goes_on(small_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = [f"--set={o}" for o in (*TINY_RUN, "train.steps=500", "train.eval_every=500")]
    overrides += ["--set=train.save_every=500", "--set=train.workers=1"]
    call = ["finetune", "--model", small_checkpoint, "--data", "scenes", "--out", out, *overrides]
    process = begun(*call)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("step 2:"):
        assert line, process.communicate()
    # As a terminal does: to all processes, those that prepare batches among them.
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    last = err.splitlines()[-1]
    assert process.returncode == 130, err
    assert "Traceback" not in err
    step = int(re.findall(r"stopped at step (\d+): Ctrl-C", last)[0])
    command = shlex.join(["lvr-lite", *map(str, call), "--resume"])
    assert last.endswith(f"saved in {out / f'checkpoint-{step}'}; go on with {command}")
    assert last_whole_checkpoint(out) == out / f"checkpoint-{step}"


def children(pid: int) -> list[int]:
    """Processes that this one has started, where the system tells."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for file in tasks.glob("*/children") for child in file.read_text().split()]


@pytest.mark.parametrize("place", ["load_examples", "load_base", "LatentTrainer"])
def test_a_signal_while_a_run_is_loaded_is_one_line_and_leaves_nothing(
    call: Call,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    def signalled(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(f"lvr_lite.train.finetune.{place}", signalled)
    out = tmp_path / "out"
    done = call("finetune", "--model", small_checkpoint, "--data", "scenes", "--out", out)
    assert done.code == 143
    assert done.err.splitlines()[-1] == "stopped by SIGTERM"
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# numbers that are not finite


def spoil(
    monkeypatch: pytest.MonkeyPatch,
    calls: set[int],
    training: bool = True,
    value: float = torch.nan,
) -> None:
    """The loss of these forward passes, from 1, is `value`."""
    original = LatentSFT.forward
    count = 0

    def forward(self: LatentSFT, **inputs: Any) -> dict[str, torch.Tensor]:
        nonlocal count
        out = original(self, **inputs)
        if self.training is not training:
            return out
        count += 1
        return out | {"loss": out["loss"] * value} if count in calls else out

    monkeypatch.setattr(LatentSFT, "forward", forward)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_whose_loss_is_not_finite_is_skipped_counted_and_named(
    run: Run,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: float,
) -> None:
    out = tmp_path / "out"
    spoil(monkeypatch, {2}, value=value)
    metrics, _ = tune(small_checkpoint, out, *EVERY_STEP)
    (skipped,) = metrics["skipped"]
    assert skipped["step"] == 2
    assert len(skipped["samples"]) == 2
    named = ", ".join(skipped["samples"])
    assert f"step 2: skipped, its loss is not finite ({named})" in capsys.readouterr().out
    assert list(losses(metrics)) == [1, 3, 4]
    written = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written == metrics
    assert same_weights(out / "checkpoint-1", out / "checkpoint-2")
    assert not same_weights(out / "checkpoint-2", out / "checkpoint-3")
    assert rates(metrics) == rates(run[1])


def test_of_several_batches_a_step_the_one_is_named_whose_loss_it_was(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {2})
    few = ("train.steps=2", "train.accumulation=2", "train.eval_every=2")
    metrics, _ = tune(small_checkpoint, tmp_path / "out", *few)
    (skipped,) = metrics["skipped"]
    assert (skipped["step"], len(skipped["samples"])) == (1, 2)


def test_a_gradient_that_is_not_finite_is_skipped_with_all_samples_of_its_step(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil_gradients(trainer: LatentTrainer) -> None:
        weight = next(p for p in trainer.model.parameters() if p.requires_grad)
        hook = weight.register_hook(lambda gradient: gradient * torch.inf)
        trainer.lines.tell("spoiled")
        spoiled.append(hook)

    spoiled: list[Any] = []
    before_step(monkeypatch, 1, spoil_gradients)

    def restore_gradients(_: LatentTrainer) -> None:
        for hook in spoiled:
            hook.remove()

    before_step(monkeypatch, 2, restore_gradients)
    few = ("train.steps=2", "train.accumulation=2", "train.eval_every=2", *EVERY_STEP)
    metrics, _ = tune(small_checkpoint, tmp_path / "out", *few)
    (skipped,) = metrics["skipped"]
    assert (skipped["step"], len(skipped["samples"])) == (1, 4)
    assert not same_weights(tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-2")


def test_a_run_ends_when_too_many_steps_are_skipped_those_before_a_stop_among_them(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    spoil(monkeypatch, {1, 3})
    with pytest.raises(
        NotFiniteError,
        match=r"step 3: the loss of 2 steps was not finite, and train\.max_skipped is 1; "
        r"lower train\.lr, or look at the samples \(.+, .+\); .*/checkpoint-2 was saved before",
    ):
        tune(small_checkpoint, out, "train.max_skipped=1")
    monkeypatch.undo()
    metrics, _ = tune(small_checkpoint, out, "train.max_skipped=2", resume=True)
    assert [entry["step"] for entry in metrics["skipped"]] == [1]


def test_a_run_that_learned_nothing_fails(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {1, 2, 3, 4})
    with pytest.raises(NotFiniteError, match=r"nothing was learned.*lower train\.lr"):
        tune(small_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out" / COMPLETE).exists()


def test_held_out_samples_whose_loss_is_not_finite_are_counted_and_the_run_goes_on(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {1}, training=False)
    metrics, _ = tune(small_checkpoint, tmp_path / "out", "train.eval_every=2")
    counted = [h["step"] for h in metrics["history"] if h.get("eval_not_finite") == 2]
    assert counted == [2]
    assert [h["step"] for h in metrics["history"] if "eval_loss" in h] == [4]


def test_answers_from_logits_that_are_not_finite_do_not_end_the_run(
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> Any:
        raise NotFiniteError("the model's logits are not finite")

    monkeypatch.setattr("lvr_lite.train.trainer.accuracy_on", fail)
    metrics, _ = tune(small_checkpoint, tmp_path / "out", "train.steps=2", "train.eval_every=2")
    assert "step 2: held-out samples: the model's logits are not" in capsys.readouterr().out
    assert not [h for h in metrics["history"] if "eval_accuracy" in h]


# --------------------------------------------------------------------------------------------------
# memory


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed. "),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_memory_that_is_used_up_is_one_line_whatever_library_says_it(
    tmp_path: Path, error: Exception
) -> None:
    with (
        pytest.raises(LvrError, match=r"out of memory: .* GiB were taken of .*; lower it with --s"),
        told_in_one_line(tmp_path, load_settings(None, []), 401408, "cpu", stage=1),
    ):
        raise error


def test_a_run_that_used_up_its_memory_goes_on_with_the_setting_that_its_line_names(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def fail(_: LatentTrainer) -> None:
        raise OUT_OF_MEMORY[0]

    before_step(monkeypatch, 3, fail)
    with pytest.raises(LvrError) as end:
        tune(small_checkpoint, out)
    message = str(end.value)
    assert "go on with --resume --set train.batch=1 --set train.accumulation=2" in message
    assert message.endswith(f"{out / 'checkpoint-2'} is whole")
    monkeypatch.undo()
    smaller = ("train.batch=1", "train.accumulation=2")
    metrics, _ = tune(small_checkpoint, out, *smaller, resume=True)
    assert metrics["steps"] == 4


def test_any_other_error_stays_what_it_is(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: LatentTrainer) -> None:
        raise RuntimeError("a fault of the program")

    before_step(monkeypatch, 1, fail)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        tune(small_checkpoint, tmp_path / "out")


LOW = ("train.batch=1", "train.gradient_checkpointing=true", "grpo.rows=1")


@pytest.mark.parametrize(
    ("stage", "overrides", "flags"),
    [
        (1, ["train.batch=4"], "--set train.batch=2 --set train.accumulation=32"),
        (1, ["train.batch=1", "train.gradient_checkpointing=false"], "gradient_checkpointing=true"),
        (1, LOW, "--set max_pixels=200704"),
        (1, [*LOW, "max_pixels=50176"], "--set lora.rank=8"),
        (1, [*LOW, "max_pixels=50176", "lora.rank=4"], "--set latent.steps=2"),
        (1, [*LOW, "max_pixels=50176", "lora.rank=4", "latent.steps=1"], None),
        (2, ["grpo.rows=16"], "--set grpo.rows=8"),
        (2, [*LOW, "grpo.group=8"], "--set grpo.group=4"),
        (2, [*LOW, "grpo.group=2"], "--set grpo.max_tokens=16"),
        (2, [*LOW, "grpo.group=2", "grpo.max_tokens=1"], "--set max_pixels=200704"),
        (2, [*LOW, "grpo.group=2", "grpo.max_tokens=1", "max_pixels=50176"], None),
    ],
)
def test_the_first_setting_is_named_that_is_not_at_its_lowest(
    stage: int, overrides: list[str], flags: str | None
) -> None:
    settings: Settings = load_settings(None, list(overrides))
    advice = first_to_lower(settings, settings.max_pixels or 401408, stage)
    if flags is None:
        assert advice is None
    else:
        assert advice is not None
        assert flags in advice.flags


# --------------------------------------------------------------------------------------------------
# disks, kills and second runs


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos")),
        (
            "peft.peft_model.safe_save_file",
            SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
        ),
        ("lvr_lite.train.run_folder.sync", OSError(28, "No space left on device")),
    ],
)
def test_a_disk_that_is_full_while_saving_is_one_line_and_the_earlier_checkpoint_stays(
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Exception,
) -> None:
    out = tmp_path / "out"

    def full(*_: Any, **__: Any) -> None:
        raise error

    before_step(monkeypatch, 4, lambda _: monkeypatch.setattr(place, full))
    with pytest.raises(OutputError, match=r"checkpoint-4: cannot be written .*; free some space"):
        tune(small_checkpoint, out, "train.keep=1")
    monkeypatch.undo()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    check_sums(out / "checkpoint-2")


def test_an_older_checkpoint_goes_only_when_the_newer_one_is_on_the_disk_and_marked(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    seen = []
    synced: list[str] = []
    discard = run_folder.discard

    def watched_sync(path: Path) -> None:
        synced.append(path.name)
        sync(path)

    def watched_discard(checkpoint: Path) -> None:
        seen.append((checkpoint.name, [p.name for p in whole_checkpoints(out)], synced[-2:]))
        discard(checkpoint)

    monkeypatch.setattr(run_folder, "sync", watched_sync)
    monkeypatch.setattr(run_folder, "discard", watched_discard)
    tune(small_checkpoint, out, "train.keep=1")
    assert seen == [
        ("checkpoint-2", ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "out"]),
    ]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_run_whose_folder_another_one_writes_into_is_refused(
    small_checkpoint: Path, stopped_run: Path
) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(stopped_run, "folder", inside=True):
            held.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    before = sorted(path.name for path in stopped_run.iterdir())
    try:
        with pytest.raises(OutputError, match=rf"process {os.getpid()} on .* is writing this fold"):
            tune(small_checkpoint, stopped_run, resume=True)
        assert sorted(path.name for path in stopped_run.iterdir()) == before
    finally:
        done.set()
        other.join()
    assert tune(small_checkpoint, stopped_run, resume=True)[0]["steps"] == 4


def test_every_file_of_a_run_has_its_hash(run: Run) -> None:
    out = run[0]
    check_sums(out)
    wanted = {"adapter_model.safetensors", "lvr_config.json", "settings.yaml", "metrics.json"}
    assert wanted <= set(read_sums(out / SUMS))
    check_sums(out / "checkpoint-4")
    wanted = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert wanted | {"trainer_state.json"} <= set(read_sums(out / "checkpoint-4" / SUMS))


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "rng_state.pth"])
def test_a_damaged_checkpoint_is_refused_with_the_one_before_it_as_the_way_out(
    small_checkpoint: Path, stopped_run: Path, name: str
) -> None:
    file = stopped_run / "checkpoint-4" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError) as end:
        tune(small_checkpoint, stopped_run, resume=True)
    assert str(end.value) == (
        f"{file}: changed or truncated (its sha256 is not that in SHA256SUMS); remove "
        f"{stopped_run / 'checkpoint-4'}, and --resume goes on from checkpoint-2"
    )
    shutil.rmtree(stopped_run / "checkpoint-4")
    assert tune(small_checkpoint, stopped_run, resume=True)[0]["steps"] == 4


class MakesAFile:
    """What, once unpickled, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_the_state_of_a_run_cannot_run_code(
    small_checkpoint: Path, stopped_run: Path, tmp_path: Path, name: str
) -> None:
    last = stopped_run / "checkpoint-2"
    shutil.rmtree(stopped_run / "checkpoint-4")
    (last / SUMS).unlink()
    torch.save(MakesAFile(tmp_path / "ran"), last / name)
    with pytest.raises(BundleError) as end:
        tune(small_checkpoint, stopped_run, resume=True)
    assert "it is damaged, or holds code instead of numbers" in str(end.value)
    assert not (tmp_path / "ran").exists()
    # It would have: the test's own pickle works.
    pickle.loads(pickle.dumps(MakesAFile(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_run_without_a_whole_checkpoint_says_how_to_begin_again(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(LvrError, match=r"exists; remove it \(it holds no whole checkpoint-N\), or"):
        tune(small_checkpoint, out)
    with pytest.raises(LvrError, match=r"nothing to resume .*; remove it, or choose another --out"):
        tune(small_checkpoint, out, resume=True)


def test_a_finished_run_that_goes_on_does_not_count_as_whole_meanwhile(
    run: Run, small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(run[0], tmp_path / "out"))

    def look(_: LatentTrainer) -> None:
        assert not (out / COMPLETE).exists()
        # Its earlier adapter can be read all the while.
        read_checkpoint(out)
        looked.append(True)

    looked: list[bool] = []
    before_step(monkeypatch, 5, look)
    tune(small_checkpoint, out, "train.steps=5", "train.eval_every=5", resume=True)
    assert looked
    check_sums(out)


# --------------------------------------------------------------------------------------------------
# more than one process

# The second process alone gets a signal in step 2, and its loss is not finite in step 1.
SECOND_PROCESS = """
import os, signal, torch
from lvr_lite.cli import main
from lvr_lite.train.sft import LatentSFT

forward, calls = LatentSFT.forward, 0

def spoiled(self, **inputs):
    global calls
    out = forward(self, **inputs)
    if self.training and os.environ["RANK"] == "1":
        calls += 1
        if calls == 1:
            return out | {"loss": out["loss"] * torch.nan}
        os.kill(os.getpid(), signal.SIGTERM)
    return out

LatentSFT.forward = spoiled
main()
"""


@pytest.mark.processes
def test_processes_agree_on_what_they_skip_and_on_where_they_stop(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "second_process.py").write_text(SECOND_PROCESS)
    out = tmp_path / "out"
    overrides = [f"--set={o}" for o in TINY_RUN]
    run = ("finetune", "--model", small_checkpoint, "--data", "scenes", "--out", out)
    err = two_processes(*run, *overrides, path=tmp_path, module="second_process", code=1)
    line = f"stopped at step 2: SIGTERM; saved in {out}/checkpoint-2; go on with the same command"
    assert err.count(line) == 1, err[-3000:]
    check_sums(out / "checkpoint-2")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(read_sums(out / "checkpoint-2" / SUMS))
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    (skipped,) = [h for h in state["log_history"] if "skipped" in h]
    assert skipped["step"] == 1
    assert len(skipped["skipped"]) == 2


def test_an_error_within_training_begins_a_line_of_its_own(
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: LatentTrainer) -> None:
        raise LvrError("something went wrong")

    before_step(monkeypatch, 2, fail)
    with pytest.raises(LvrError, match="something went wrong"):
        tune(small_checkpoint, tmp_path / "out")
    # The command line prints the error's line next.
    assert capsys.readouterr().err.endswith("\n")


def test_a_full_disk_that_names_no_file_is_said_with_the_runs_folder(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(_: LatentTrainer) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before_step(monkeypatch, 2, fill)
    with pytest.raises(OutputError, match=r"out: cannot be written \(No space left"):
        tune(small_checkpoint, tmp_path / "out")
