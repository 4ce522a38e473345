"""A checkpoint: a base model's folder, or what `finetune` wrote over one. May import: tokenizers
and the core (no torch).

A tuned checkpoint holds adapter_model.safetensors, adapter_config.json, lvr_config.json (base,
sha256 of its weights, latent loop, precision of the base in training), tokenizer.json,
chat_template.jinja and preprocessor_config.json. `tiny` names the embedded model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lvr_lite.errors import BundleError
from lvr_lite.files import sha256
from lvr_lite.model import families
from lvr_lite.model import spec as latent
from lvr_lite.model.bundle import is_bundle, read_manifest
from lvr_lite.model.spec import LatentSpec, TokenIds

LVR_CONFIG = "lvr_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything about a checkpoint but its weights. base: the folder of the base model's weights;
    adapter: whether `folder` holds one; trained_over: the `base_sha256` that the adapter was
    trained over, None where none was recorded.
    """

    folder: Path
    base: Path
    adapter: bool
    config: dict[str, Any]
    family: Any
    image_spec: dict[str, Any]
    template: str
    tokenizer: Tokenizer
    tokens: TokenIds
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
            f"{model}: no such folder; give `tiny`, a checkpoint's folder, or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct"
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
            f"{model}: neither a folder here nor to be had from the hub ({str(error).splitlines()[0]})"
        ) from error


def is_checkpoint(folder: Path) -> bool:
    return (folder / LVR_CONFIG).is_file() or (folder / "config.json").is_file()


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BundleError(f"{path}: missing; this folder is not a complete checkpoint") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path}: must hold a JSON object")
    return data


def _template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file() and isinstance(_json(folder / name).get("chat_template"), str):
            return str(_json(folder / name)["chat_template"])
    raise BundleError(
        f"{folder}: no chat template (chat_template.jinja); copy it from the base model"
    )


def _end_ids(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    generation = (
        _json(folder / "generation_config.json")
        if (folder / "generation_config.json").is_file()
        else {}
    )
    end = generation.get(
        "eos_token_id",
        config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id")),
    )
    named = tokenizer.token_to_id("<|im_end|>")
    ids = ([] if end is None else end if isinstance(end, list) else [end]) or (
        [] if named is None else [named]
    )
    if not ids:
        raise BundleError(f"{folder}: no end-of-turn token (eos_token_id) in its configuration")
    return tuple(ids)


def read_checkpoint(model: str | Path) -> Checkpoint:
    """Read a checkpoint's files (not its weights). Raises BundleError naming the folder or file
    that is missing or wrong.
    """
    folder = resolve(str(model))
    tuned = _json(folder / LVR_CONFIG) if (folder / LVR_CONFIG).is_file() else None
    missing = [field for field in ("base", "latent") if tuned is not None and field not in tuned]
    if missing:
        raise BundleError(
            f"{folder / LVR_CONFIG}: {missing[0]} is missing; this folder is not a complete checkpoint"
        )
    if tuned is not None and not (folder / "adapter_model.safetensors").is_file():
        raise BundleError(
            f"{folder / 'adapter_model.safetensors'}: missing; this folder is not a complete checkpoint"
        )
    base = resolve(tuned["base"]) if tuned is not None else folder
    config = _json(base / "config.json")
    if not any(base.glob("*.safetensors")):
        raise BundleError(
            f"{base}: no *.safetensors weights (pickled weights are not read: convert them first)"
        )
    family = families.get(str(config.get("model_type")))
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{folder / 'tokenizer.json'}: cannot be read ({error})") from error
    try:
        rows = int(config.get("text_config", config)["vocab_size"])
        image_spec = family.image_spec(
            config, _json(folder / "preprocessor_config.json") | (tuned or {}).get("image", {})
        )
    except KeyError as error:
        raise BundleError(
            f"{folder}: {error} is missing from config.json or preprocessor_config.json; copy them again"
        ) from error
    if (
        tuned is None
        # a tuned model's markers are the rows that it was trained with: others would have learned
        # nothing
    ):
        add_latent_tokens(tokenizer)
    ids = {
        name: _id(tokenizer, name, folder)
        for name in (family.IMAGE_TOKEN, latent.START, latent.LATENT, latent.END)
    }
    if max(ids.values()) >= rows:
        raise BundleError(
            f"{base}: its embedding has {rows} rows and none spare for the three latent tokens: resize it first"
        )
    return Checkpoint(
        folder=folder,
        base=base,
        adapter=tuned is not None,
        config=config,
        family=family,
        image_spec=image_spec,
        template=_template(folder),
        tokenizer=tokenizer,
        tokens=TokenIds(
            ids[family.IMAGE_TOKEN],
            _end_ids(base, config, tokenizer),
            ids[latent.START],
            ids[latent.LATENT],
            ids[latent.END],
        ),
        latent=LatentSpec.from_json(tuned["latent"]) if tuned is not None else LatentSpec(),
        trained_over=trained_over(folder) if tuned is not None else None,
    )


def trained_over(folder: Path) -> str | None:
    """The `base_sha256` of the base that a tuned checkpoint was trained over; None where none was
    recorded.
    """
    return _json(folder / LVR_CONFIG).get("base_sha256")


def vision_of(model: str) -> tuple[Any, dict[str, Any]]:
    """Family and `image` block of a bundle or a checkpoint: how it resizes pictures and cuts them
    into visual tokens.
    """
    if is_bundle(Path(model)):
        manifest = read_manifest(Path(model), check=False)
        return families.get(manifest.family), manifest.image
    checkpoint = read_checkpoint(model)
    return checkpoint.family, checkpoint.image_spec


def add_latent_tokens(tokenizer: Tokenizer) -> None:
    """Give the tokenizer the three markers where it lacks them; they take spare rows of the
    embedding (Qwen2.5-VL has 271).
    """
    tokenizer.add_special_tokens(
        [t for t in (latent.START, latent.LATENT, latent.END) if tokenizer.token_to_id(t) is None]
    )


def _id(tokenizer: Tokenizer, token: str, folder: Path) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise BundleError(
            f"{folder / 'tokenizer.json'}: its vocabulary has no {token}; this is not the tokenizer of such a model"
        )
    return int(found)
