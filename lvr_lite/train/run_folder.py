"""The folder of a run: what it holds, how it is written whole, and from where a run goes on.

May import: torch, yaml and what stands above `train`.

OUT holds the adapter (adapter_model.safetensors), lvr_config.json, the resolved settings,
metrics.json, SHA256SUMS over these, TensorBoard logs and checkpoint-N folders. A checkpoint counts
as whole when its marker file is there. The marker is written last, when the disk keeps all other
files, and only then does an older checkpoint go. So a run that is killed loses one interval at
most.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from safetensors import SafetensorError

from lvr_lite.config import Settings
from lvr_lite.errors import BundleError, UsageError
from lvr_lite.files import LOCK, JsonObject, kept_sha256, locked, saving, sync, write_atomically
from lvr_lite.model.checkpoint import (
    ADAPTER,
    LVR_CONFIG,
    VERSION,
    Checkpoint,
    base_fields,
    trained_over,
)
from lvr_lite.model.processor_files import read_json, read_preprocessor
from lvr_lite.sums import SUMS, check_sums, files_below, write_sums
from lvr_lite.system import is_out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel

COMPLETE = "complete"
SETTINGS = "settings.yaml"
METRICS = "metrics.json"
# What a run that goes on may have otherwise: how long it is, how it reports, how much it bears, and
# how the same numbers are computed.
MAY_CHANGE = (
    *("train.steps", "train.eval_every", "train.save_every", "train.log_every", "train.keep"),
    *("train.workers", "train.gradient_checkpointing", "train.dequantize", "train.max_skipped"),
    *("train.cache_visual_tokens", "grpo.rows"),
)
# They may change together: their product is the number of samples a step and process.
PARTS_OF_A_STEP = ("train.batch", "train.accumulation")
# The name of a checkpoint within a run.
CHECKPOINT = re.compile(r"checkpoint-\d+")
# What readers of a tuned checkpoint read, and what says how it came about.
RESULT = (
    *(ADAPTER, "adapter_config.json", LVR_CONFIG),
    *("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", SETTINGS, METRICS),
)
# What a checkpoint-N cannot go on without.
STATE = (ADAPTER, "optimizer.pt", "scheduler.pt", "trainer_state.json")

# What torch, safetensors and PEFT raise for files that they cannot read.
READING = (
    *(OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, EOFError),
    *(AttributeError, pickle.UnpicklingError),
)


def is_first_process() -> bool:
    """Whether this process is the one that writes, of those that train together."""
    return os.environ.get("RANK", "0") == "0"


# ------------------------------------------------------------------------------------- where from


def whole_checkpoints(out: Path) -> list[Path]:
    """The checkpoint-N in `out` that were written to their end, the oldest first."""
    whole = [
        path
        for path in out.glob("checkpoint-*")
        if CHECKPOINT.fullmatch(path.name) and (path / COMPLETE).is_file()
    ]
    return sorted(whole, key=steps_of)


def last_whole_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint-N in `out` that was written to its end."""
    whole = whole_checkpoints(out)
    return whole[-1] if whole else None


def steps_of(checkpoint: Path) -> int:
    """The N of a checkpoint-N."""
    return int(checkpoint.name.split("-")[1])


def resume_point(out: Path, resume: bool, checkpoint: Checkpoint) -> Path | None:
    """The checkpoint-N in `out` to go on from; None for a new run.

    Raises UsageError where `out` holds something and nobody asked to go on with it, where it holds
    nothing to go on from, and where it was begun over another base; BundleError where a file of
    that checkpoint-N is damaged.
    """
    whole = whole_checkpoints(out)
    if resume:
        if not whole:
            instead = "remove it, or choose another --out"
            if not out.exists():
                instead = "start it without --resume"
            raise UsageError(f"{out}: nothing to resume (no whole checkpoint-N in it); {instead}")
        _check_undamaged(whole)
        if trained_over(whole[-1]) not in (None, checkpoint.base_sha256):
            raise UsageError(
                f"{out}: was begun over another base than {checkpoint.base}, whose weights have "
                "another sha256; give that one"
            )
        return whole[-1]
    # Another process may come here after the first one has begun to write.
    if is_first_process() and not _is_free(out):
        instead = "continue it with --resume"
        if out.is_dir() and not whole and not (out / COMPLETE).exists():
            instead = "remove it (it holds no whole checkpoint-N)"
        raise UsageError(f"{out}: exists; {instead}, or choose another --out")
    return None


def _is_free(out: Path) -> bool:
    """Whether `out` is missing, or a folder with nothing but the lock of this process."""
    if not out.exists():
        return True
    return out.is_dir() and all(path.name == LOCK for path in out.iterdir())


def _check_undamaged(whole: list[Path]) -> None:
    """Raises BundleError where a file of the newest checkpoint-N is not what was written."""
    last = whole[-1]
    try:
        check_sums(last, required=STATE)
    except BundleError as error:
        damage = str(error).split("; ")[0]
        instead = "start anew in another --out"
        if len(whole) > 1:
            instead = f"remove {last}, and --resume goes on from {whole[-2].name}"
        raise BundleError(f"{damage}; {instead}") from error


def origin_of(data: str, settings: Settings, start: Checkpoint | None = None) -> JsonObject:
    """What tells a run's samples from others', and what it began from: fields of lvr_config.json.

    start: the tuned checkpoint that stage 2 goes on with.
    """
    own = settings.data
    named = {"data": data, "data.replay": own.replay, "data.eval_file": own.eval_file}
    files = {key: Path(name) for key, name in named.items() if name and Path(name).is_file()}
    origin: JsonObject = {"samples": {key: kept_sha256(path) for key, path in files.items()}}
    if "data" not in files:
        origin["samples"]["data"] = data
    if start is not None:
        origin["begun_from"] = start.adapter_sha256
    return origin


def check_resumed(last: Path, settings: Settings, origin: JsonObject) -> None:
    """Raises UsageError where a run would go on as another one than it was: with other settings
    than MAY_CHANGE, other samples, or from another checkpoint.

    last: the checkpoint-N to go on from.
    origin: as `origin_of` gives it now.
    """
    out = last.parent
    before = _read_settings(last / SETTINGS)
    now = _flat(settings.to_json())
    # Settings that one of the two versions of lvr-lite does not know are no choice of the user's.
    changed = [k for k in now if k in before and k not in MAY_CHANGE and before[k] != now[k]]
    # As many samples a step, read in smaller or larger parts.
    if _samples_a_step(now) == _samples_a_step(before):
        changed = [key for key in changed if key not in PARTS_OF_A_STEP]
    if changed:
        said = "; ".join(
            f"{key}: {_yaml(now[key])}, and {_yaml(before[key])} then" for key in changed
        )
        again = " ".join(f"--set {key}={_yaml(before[key])}" for key in changed)
        raise UsageError(
            f"{out}: was begun with other settings ({said}); go on with {again}, or choose "
            "another --out"
        )
    recorded = read_json(last / LVR_CONFIG).get("origin", {})
    for name, then in recorded.get("samples", {}).items():
        if then != (given := origin["samples"].get(name)):
            raise UsageError(
                f"{out}: was begun on other samples ({name}: {_short(given)}, and {_short(then)} "
                "then); give those, or choose another --out"
            )
    if recorded.get("begun_from", origin.get("begun_from")) != origin.get("begun_from"):
        raise UsageError(
            f"{out}: was begun from another checkpoint (--checkpoint: an adapter of sha256 "
            f"{_short(origin['begun_from'])}, and {_short(recorded['begun_from'])} then); give "
            "that one, or choose another --out"
        )


def _samples_a_step(settings: JsonObject) -> object:
    """Samples of one process in a step, by "section.key"; None where the settings do not say."""
    parts = [settings.get(key) for key in PARTS_OF_A_STEP]
    numbers = [part for part in parts if isinstance(part, int)]
    return math.prod(numbers) if len(numbers) == len(parts) else None


def _short(digest: object) -> str:
    """A sha256, or the name of a source, as a message shows it."""
    return str(digest)[:12]


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if value in (True, False) else str(value)


def _flat(data: JsonObject, prefix: str = "") -> JsonObject:
    """{"section.key": value} of nested settings."""
    flat: JsonObject = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _read_settings(path: Path) -> JsonObject:
    """The settings of a run by "section.key"; {} where none were written."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); it says what the run was "
            "begun with"
        ) from error
    return _flat(data) if isinstance(data, dict) else {}


# ------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def run_folder(out: Path) -> Iterator[None]:
    """The folder of a run, held by this process from the first look into it to the end; the other
    processes that train together wait for the first one anyway.

    A run that a signal ends before it has anything to go on from leaves nothing where nothing was.

    Raises OutputError where another run writes into it; UsageError where it is a file.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: exists and is no folder; choose another --out")
    if not is_first_process():
        yield
        return
    with locked(out, "folder", inside=True):
        fresh = _is_free(out)
        try:
            yield
        except Exception:
            raise
        except BaseException:
            if fresh and not whole_checkpoints(out):
                _empty(out)
            raise


def _empty(folder: Path) -> None:
    """Remove what a run has begun to write; its lock goes when it ends."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextlib.contextmanager
def loading(checkpoint: Path | None) -> Iterator[None]:
    """Raises BundleError, in one line, for what libraries raise when the state of a checkpoint-N
    cannot be read: it is damaged, another run's, or holds code.
    """
    try:
        yield
    except READING as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        # torch's own words advise to run what the file holds.
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or holds code instead of numbers"
        raise BundleError(
            f"{checkpoint}: its state cannot be read ({reason}); remove this checkpoint, and "
            "--resume goes on from the one before it"
        ) from error


@contextlib.contextmanager
def whole_or_not(checkpoint: Path) -> Iterator[None]:
    """A block that writes a checkpoint-N: nothing is left of it unless it becomes whole."""
    try:
        yield
    finally:
        if not (checkpoint / COMPLETE).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)


def mark_whole(checkpoint: Path, keep: int) -> None:
    """Make a checkpoint-N count, when the disk keeps all its files; then older ones than the last
    `keep` go.
    """
    write_sums(checkpoint, files_below(checkpoint))
    sync(checkpoint)
    (checkpoint / COMPLETE).touch()
    out = checkpoint.parent
    # The marker, and the name of the checkpoint-N itself.
    sync(out)
    for older in whole_checkpoints(out)[:-keep]:
        discard(older)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint-N. What a kill leaves of it does not count as whole."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    # What cannot be removed does no harm; the next start tries again.
    shutil.rmtree(checkpoint, ignore_errors=True)


def discard_unfinished(out: Path) -> None:
    """Remove what killed runs left of checkpoint-N that they were writing or removing."""
    for path in out.glob("checkpoint-*"):
        if CHECKPOINT.fullmatch(path.name) and not (path / COMPLETE).is_file():
            discard(path)


def begin_writing(
    out: Path, checkpoint: Checkpoint, settings: Settings, origin: JsonObject
) -> None:
    """`write_side_files` of a run that begins or goes on. Until it ends, what an earlier end of it
    left no longer counts as whole.
    """
    for name in (COMPLETE, SUMS):
        (out / name).unlink(missing_ok=True)
    discard_unfinished(out)
    write_side_files(out, checkpoint, settings, origin)


def write_result(out: Path, model: PeftModel, metrics: JsonObject) -> None:
    """The adapter and the metrics of a run that has come to its end, the marker last."""
    staged = out / f".adapter.tmp-{os.getpid()}"
    try:
        model.save_pretrained(str(staged), safe_serialization=True)
        sync(staged)
        for path in staged.iterdir():
            path.replace(out / path.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    write_atomically(out / METRICS, json.dumps(metrics, indent=1))
    write_sums(out, [name for name in RESULT if (out / name).is_file()])
    sync(out)
    write_atomically(out / COMPLETE, "")


def write_side_files(
    out: Path, checkpoint: Checkpoint, settings: Settings, origin: JsonObject | None = None
) -> None:
    """What makes `out` (or a checkpoint-N in it) a checkpoint that every command reads, beside the
    adapter.

    checkpoint: the base, with the latent loop and the picture size that are trained.
    origin: as `origin_of` gives it; None where nothing is recorded.
    """
    processor = checkpoint.processor
    with saving(out):
        out.mkdir(parents=True, exist_ok=True)
        # Not `save`, which raises a bare Exception on a full disk.
        tokenizer = processor.tokenizer.to_str(pretty=True)
        (out / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        (out / "chat_template.jinja").write_text(processor.template, encoding="utf-8")
        preprocessor = json.dumps(read_preprocessor(checkpoint.base), indent=1)
        (out / "preprocessor_config.json").write_text(preprocessor, encoding="utf-8")
    run = out.parent if CHECKPOINT.fullmatch(out.name) else out
    content = {
        "version": VERSION,
        **base_fields(checkpoint.base, out, run.resolve().parent),
        "base_sha256": checkpoint.base_sha256,
        "base_precision": "nf4",
        "latent": checkpoint.latent.to_json(),
        "image": {} if settings.max_pixels is None else {"max_pixels": settings.max_pixels},
        "origin": origin or {},
    }
    write_atomically(out / LVR_CONFIG, json.dumps(content, indent=1))
    write_atomically(out / SETTINGS, yaml.safe_dump(settings.to_json(), sort_keys=False))
