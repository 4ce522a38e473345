"""A checkpoint: a base model's folder, or what `finetune` wrote over one.

May import: tokenizers, this folder.

A tuned checkpoint holds adapter_model.safetensors, adapter_config.json, lvr_config.json (base,
sha256 of its weights, latent loop, precision of the base in training), tokenizer.json,
chat_template.jinja and preprocessor_config.json. `tiny` names the embedded model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from lvr_lite.errors import BundleError, UsageError
from lvr_lite.files import sha256
from lvr_lite.model.bundle import Bundle, is_bundle
from lvr_lite.model.processor import Processor
from lvr_lite.model.processor_files import read_json, read_processor
from lvr_lite.model.spec import LatentSpec

LVR_CONFIG = "lvr_config.json"
# Areas in pixels that pictures may be shrunk to: of one visual token, and as recipes allow.
SMALLEST_PICTURE = 28 * 28
LARGEST_PICTURE = 10**9


@dataclass(frozen=True)
class Checkpoint:
    """Everything about a checkpoint but its weights.

    folder: of its files.
    base: the folder of the base model's weights.
    adapter: whether `folder` holds an adapter.
    config: config.json of the base.
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
        return _joined(self._base_files + (_sha256_of_weights(self.folder) if self.adapter else []))

    @property
    def base_sha256(self) -> str:
        """sha256 over the base's weight files: tells bases of the same shapes apart."""
        return _joined(self._base_files)

    @cached_property
    def _base_files(self) -> list[str]:
        return _sha256_of_weights(
            self.base
        )  # gigabytes, which training, export and its check each ask for


def _sha256_of_weights(folder: Path) -> list[str]:
    return [sha256(file) for file in sorted(folder.glob("*.safetensors"))]


def _joined(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def resolve(model: str) -> Path:
    """The folder of a model named `tiny`, by a folder's path, or by a hub id (which transformers'
    hub client fetches, unless offline).
    """
    if model == "tiny":
        return Path(str(resources.files("lvr_lite") / "toy" / "model"))
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise BundleError(
            f"{model}: no such folder; give `tiny`, a checkpoint's folder, or a hub id such as "
            "Qwen/Qwen2.5-VL-3B-Instruct"
        )
    return _from_hub(model)


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return Path(
            snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt"])
        )
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    ) as error:
        raise BundleError(
            f"{model}: neither a folder here nor to be had from the hub "
            f"({str(error).splitlines()[0]})"
        ) from error


def is_checkpoint(folder: Path) -> bool:
    return (folder / LVR_CONFIG).is_file() or (folder / "config.json").is_file()


def read_checkpoint(model: str | Path) -> Checkpoint:
    """Read a checkpoint's files (not its weights).

    Raises BundleError naming the folder or file that is missing or wrong.
    """
    folder = resolve(str(model))
    tuned = _tuned_config(folder)
    base = resolve(tuned["base"]) if tuned is not None else folder
    config = read_json(base / "config.json")
    if not any(base.glob("*.safetensors")):
        raise BundleError(
            f"{base}: no *.safetensors weights (pickled weights are not read: convert them first)"
        )
    return Checkpoint(
        folder=folder,
        base=base,
        adapter=tuned is not None,
        config=config,
        processor=read_processor(folder, base, config, tuned),
        latent=LatentSpec.from_json(tuned["latent"]) if tuned is not None else LatentSpec(),
        trained_over=None if tuned is None else tuned.get("base_sha256"),
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
    adapter = folder / "adapter_model.safetensors"
    if not adapter.is_file():
        raise BundleError(f"{adapter}: missing; this folder is not a complete checkpoint")
    return tuned


def trained_over(folder: Path) -> str | None:
    """The `base_sha256` of the base that a tuned checkpoint was trained over; None where none was
    recorded.
    """
    return read_json(folder / LVR_CONFIG).get("base_sha256")


def processor_of(model: str) -> Processor:
    """The processor of a bundle or a checkpoint, without its weights."""
    if is_bundle(Path(model)):
        return Bundle.open(Path(model), check=False).processor
    return read_checkpoint(model).processor


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
