"""A checkpoint: a base model's folder, or what `finetune` wrote over one.

May import: tokenizers, this folder.

A tuned checkpoint holds adapter_model.safetensors, adapter_config.json, lvr_config.json (base,
sha256 of its weights, latent loop, precision of the base in training), tokenizer.json,
chat_template.jinja, preprocessor_config.json and SHA256SUMS over these (see `lvr_lite.sums`; those
of earlier versions have none). `tiny` names the embedded model.

How lvr_config.json names the base, so that it is found again on another machine:

    base             "tiny", or the folder's absolute path when the model was tuned
    base_relative    its path from the checkpoint, where the two lay side by side
    base_id          its id on the hub, where it came from there
    base_revision    the hub's revision (a commit) of what was trained over
    base_sha256      over its weight files: whether a folder holds that base
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from lvr_lite.errors import BundleError, UsageError
from lvr_lite.files import JsonObject, kept_sha256
from lvr_lite.model.bundle import LARGEST_STEPS, Bundle, is_bundle
from lvr_lite.model.families.base import LARGEST_PICTURE
from lvr_lite.model.processor import Processor
from lvr_lite.model.processor_files import read_json, read_processor, with_rows_for_markers
from lvr_lite.model.spec import LatentSpec
from lvr_lite.model.weight_files import SINGLE, refuse_quantized, refuse_stand_in, weight_files
from lvr_lite.sums import SUMS, check_sums

LVR_CONFIG = "lvr_config.json"
# Pixels of one visual token, to which a picture may be shrunk.
SMALLEST_PICTURE = 28 * 28
# Rows of embedding and head, in config.json; published ones have some 260,000.
LARGEST_VOCABULARY = 1 << 24
# Of lvr_config.json: the newest that is read here.
VERSION = 1
ADAPTER = "adapter_model.safetensors"
# What only a run that goes on reads, and checks then.
OF_RESUMING = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json")
SMALL_FILES = ("*.json", "*.jinja", "*.txt")
# Where the hub's client keeps a model (huggingface_hub, "Understand caching").
SNAPSHOT = re.compile(
    r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<revision>\w+)$"
)


@dataclass(frozen=True)
class HubModel:
    """A model on the hub. revision: a commit; None for the newest one."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id} at revision {self.revision}"


@dataclass(frozen=True)
class Checkpoint:
    """Everything about a checkpoint but its weights.

    folder: of its files.
    base: the folder of the base model's weights.
    adapter: whether `folder` holds an adapter.
    config: config.json of the base, with a row for each marker.
    trained_over: the `base_sha256` that the adapter was trained over; None where not recorded.
    """

    folder: Path
    base: Path
    adapter: bool
    config: dict[str, Any]
    processor: Processor
    latent: LatentSpec
    trained_over: str | None = None

    def digest(self) -> str:
        """sha256 over all weight files, base and adapter: names the model in manifests."""
        return _joined(self._base_files + ([self.adapter_sha256] if self.adapter else []))

    @property
    def base_sha256(self) -> str:
        """sha256 over the base's weight files: tells bases of the same shapes apart."""
        return _joined(self._base_files)

    @property
    def adapter_sha256(self) -> str:
        """sha256 of the adapter's file, of a tuned checkpoint."""
        return kept_sha256(self.folder / ADAPTER)

    @cached_property
    def _base_files(self) -> list[str]:
        return _sha256_of_weights(self.base)


def _sha256_of_weights(base: Path) -> list[str]:
    return [kept_sha256(file) for file in weight_files(base)]


def _joined(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def resolve(model: str, weights: bool = True) -> Path:
    """The folder of a model named `tiny`, by a folder's path, or by a hub id (which transformers'
    hub client fetches, unless offline).

    weights: whether the hub's weights are fetched too, or small files alone.
    """
    if model == "tiny":
        return Path(str(resources.files("lvr_lite") / "toy" / "model"))
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or not _is_hub_id(model):
        raise BundleError(
            f"{model}: no such folder; give `tiny`, a checkpoint's folder, or a hub id such as "
            "Qwen/Qwen2.5-VL-3B-Instruct"
        )
    try:
        return _from_hub(HubModel(model), weights)
    except _HubError as error:
        raise BundleError(
            f"{model}: neither a folder here nor to be had from the hub ({error})"
        ) from error


def _is_hub_id(model: str) -> bool:
    return not model.startswith((".", "/", "~")) and model.count("/") == 1


class _HubError(Exception):
    """What the hub's client says where a model cannot be had, in one line."""


def _from_hub(model: HubModel, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(model.id, revision=model.revision, allow_patterns=patterns))
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise _HubError(str(error).strip().splitlines()[0]) from error


def is_checkpoint(folder: Path) -> bool:
    return (folder / LVR_CONFIG).is_file() or (folder / "config.json").is_file()


def read_checkpoint(model: str | Path, weights: bool = True) -> Checkpoint:
    """Read a checkpoint's files (not its weights).

    weights: whether the weights must be here. Without them a checkpoint serves what reads none
        (plans of memory, pictures and prompts), and none are fetched.

    Raises BundleError naming the folder or file that is missing or wrong.
    """
    folder = resolve(str(model), weights)
    tuned = _tuned_config(folder)
    if tuned is not None and weights:
        _check_adapter_file(folder / ADAPTER)
    if tuned is not None:
        _check_sums(folder, weights, required=(ADAPTER, LVR_CONFIG))
    base = folder if tuned is None else find_base(folder, tuned, weights)
    if base == resolve("tiny"):
        _check_sums(base, weights, required=("config.json", SINGLE))
    config = read_json(base / "config.json")
    refuse_quantized(base / "config.json", config)
    _refuse_absurd(base / "config.json", config)
    if weights:
        _check_base_files(base)
    processor = read_processor(folder, base, config, tuned)
    return Checkpoint(
        folder=folder,
        base=base,
        adapter=tuned is not None,
        config=with_rows_for_markers(config, processor.tokens),
        processor=processor,
        latent=_latent(folder / LVR_CONFIG, tuned),
        trained_over=None if tuned is None else tuned.get("base_sha256"),
    )


def _latent(path: Path, tuned: JsonObject | None) -> LatentSpec:
    if tuned is None:
        return LatentSpec()
    try:
        latent = LatentSpec.from_json(tuned["latent"])
        steps, norm = latent.steps, latent.norm
    except (TypeError, AttributeError) as error:
        raise BundleError(f"{path}: latent is no description of a loop ({error})") from error
    if type(steps) is not int or type(norm) not in (int, float) or steps > LARGEST_STEPS:
        raise BundleError(f"{path}: latent has {steps!r:.40} steps and norm {norm!r:.40}")
    return latent


# Sizes, counts and ids in a config.json lie below it; a table of that many rows fits no machine.
ABSURD = 1 << 31


def _refuse_absurd(path: Path, config: JsonObject) -> None:
    """Raises BundleError for a number in config.json that no model has, before anything is made of
    that size.
    """
    waiting: list[tuple[str, object]] = list(config.items())
    while waiting:
        name, value = waiting.pop()
        most = LARGEST_VOCABULARY if name.endswith("vocab_size") else ABSURD
        if isinstance(value, int) and abs(value) > most:
            raise BundleError(f"{path}: {name} is {str(value)[:40]}, which no model has")
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}", part) for key, part in value.items()]


def _check_sums(folder: Path, weights: bool, required: tuple[str, ...]) -> None:
    """Of folders that this project wrote: another SHA256SUMS may list files that are not here."""
    unread = OF_RESUMING if weights else (*OF_RESUMING, "*.safetensors")
    check_sums(folder, required=required, skip=unread)


def _check_base_files(base: Path) -> None:
    weight_files(base)
    # transformers would load what such a file names in the place of the base.
    if (base / "adapter_config.json").is_file():
        raise BundleError(
            f"{base / 'adapter_config.json'}: an adapter lies over this model; merge it "
            "(peft: merge_and_unload) and give the result, or remove its files"
        )


def _tuned_config(folder: Path) -> dict[str, Any] | None:
    """What `finetune` wrote beside an adapter; None for a base model's folder."""
    path = folder / LVR_CONFIG
    if not path.is_file():
        return None
    tuned = read_json(path)
    for field in ("base", "latent"):
        if field not in tuned:
            raise BundleError(
                f"{path}: {field} is missing; this folder is not a complete checkpoint"
            )
    version = tuned.get("version", VERSION)
    if version not in range(1, VERSION + 1):
        raise BundleError(f"{path}: is of version {version!r}, not {VERSION}: update lvr-lite")
    return tuned


def _check_adapter_file(path: Path) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing; this folder is not a complete checkpoint")
    refuse_stand_in(path)


# ---------------------------------------------------------------------------------------- the base


def base_fields(base: Path, out: Path, side_by_side: Path) -> JsonObject:
    """The fields of lvr_config.json that find a base again, but for its sha256.

    base: its folder.
    out: the folder of that lvr_config.json.
    side_by_side: the folder that holds the run's; a base in it has a relative path too.
    """
    if base == resolve("tiny"):
        return {"base": "tiny"}
    fields: JsonObject = {"base": str(base.resolve())}
    if base.resolve().is_relative_to(side_by_side.resolve()):
        relative = os.path.relpath(base.resolve(), out.resolve())
        fields["base_relative"] = Path(relative).as_posix()
    model = hub_model(base.absolute()) or hub_model(base.resolve())
    if model is not None:
        fields |= {"base_id": model.id, "base_revision": model.revision}
    return fields


def hub_model(snapshot: Path) -> HubModel | None:
    """Which model a folder of the hub's cache holds; None for any other folder."""
    match = SNAPSHOT.search(str(snapshot))
    return match and HubModel(f"{match['owner']}/{match['name']}", match["revision"])


def find_base(folder: Path, tuned: JsonObject, weights: bool = True) -> Path:
    """The folder of a tuned checkpoint's base: by path, or from the hub's cache or the hub.

    tuned: lvr_config.json in `folder`.
    weights: whether its weights are needed.

    Raises BundleError naming file, field, id and revision where it is nowhere.
    """
    name = str(tuned["base"])
    if name == "tiny":
        return resolve(name)
    model = _hub_model_of(tuned)
    here = _base_folders(folder, tuned)
    if here and (not weights or (model is None and len(here) == 1)):
        return here[0]
    # Another model may lie in its place by now: the sha256 decides.
    for candidate in here:
        if _fits(candidate, tuned):
            return candidate
    reason = "no id of the hub is recorded"
    if model is not None:
        try:
            return _from_hub(model, weights)
        except _HubError as error:
            reason = f"{model} is not to be had from the hub ({error})"
    if here:
        # Another base: what loads the adapter over it says so.
        return here[0]
    digest = str(tuned.get("base_sha256") or "not recorded")
    wanted = f"download {model}" if model is not None else f"find the base (sha256 {digest[:12]})"
    raise BundleError(
        f"{folder / LVR_CONFIG}: base {name} is no such folder here, and {reason}: {wanted}, and "
        f"write its folder into the field `base` (and remove {SUMS} beside it)"
    )


def _hub_model_of(tuned: JsonObject) -> HubModel | None:
    """The base on the hub; earlier versions of lvr-lite recorded its place in the cache alone."""
    if tuned.get("base_id"):
        return HubModel(str(tuned["base_id"]), tuned.get("base_revision"))
    name = str(tuned["base"])
    return hub_model(Path(name)) or (HubModel(name) if _is_hub_id(name) else None)


def _base_folders(folder: Path, tuned: JsonObject) -> list[Path]:
    """Folders that are there under one of the base's paths, the likeliest first."""
    relative = tuned.get("base_relative")
    places = [folder / str(relative)] if relative else []
    places.append(Path(str(tuned["base"])))
    return [Path(os.path.normpath(place)) for place in places if place.is_dir()]


def _fits(base: Path, tuned: JsonObject) -> bool:
    recorded = tuned.get("base_sha256")
    try:
        return recorded is None or _joined(_sha256_of_weights(base)) == recorded
    except BundleError:
        # No weights, or not all of them.
        return False


def trained_over(folder: Path) -> str | None:
    """The `base_sha256` of the base that a tuned checkpoint was trained over; None where none was
    recorded.
    """
    return read_json(folder / LVR_CONFIG).get("base_sha256")


def processor_of(model: str) -> Processor:
    """The processor of a bundle or a checkpoint, without its weights."""
    if is_bundle(Path(model)):
        return Bundle.open(Path(model), check=False).processor
    return read_checkpoint(model, weights=False).processor


def check_max_pixels(model: str, max_pixels: int | None) -> None:
    """Raises UsageError for an area (pixels) that is larger than a bundle was exported for, or that
    is no picture.
    """
    if max_pixels is None:
        return
    if not SMALLEST_PICTURE <= max_pixels <= LARGEST_PICTURE:
        raise UsageError(
            f"max_pixels must lie between {SMALLEST_PICTURE} and {LARGEST_PICTURE}, "
            f"not {max_pixels}"
        )
    if not is_bundle(Path(model)):
        return
    most = processor_of(model).image.max_pixels
    if max_pixels > most:
        raise UsageError(
            f"max_pixels {max_pixels}: the bundle {model} was exported for pictures of at most "
            f"{most} pixels; export it again with --max-pixels"
        )
