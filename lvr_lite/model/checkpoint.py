"""A checkpoint: a base model's folder, or what `finetune` wrote over one.

May import: tokenizers, this folder.

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
from lvr_lite.model import families, spec
from lvr_lite.model.bundle import Bundle, is_bundle
from lvr_lite.model.processor import Processor
from lvr_lite.model.spec import LatentSpec, TokenIds

LVR_CONFIG = "lvr_config.json"


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
    """Read a checkpoint's files (not its weights).

    Raises BundleError naming the folder or file that is missing or wrong.
    """
    folder = resolve(str(model))
    tuned = _tuned_config(folder)
    base = resolve(tuned["base"]) if tuned is not None else folder
    config = _json(base / "config.json")
    if not any(base.glob("*.safetensors")):
        raise BundleError(
            f"{base}: no *.safetensors weights (pickled weights are not read: convert them first)"
        )
    return Checkpoint(
        folder=folder,
        base=base,
        adapter=tuned is not None,
        config=config,
        processor=_processor(folder, base, config, tuned),
        latent=LatentSpec.from_json(tuned["latent"]) if tuned is not None else LatentSpec(),
        trained_over=None if tuned is None else tuned.get("base_sha256"),
    )


def _tuned_config(folder: Path) -> dict[str, Any] | None:
    """What `finetune` wrote beside an adapter; None for a base model's folder."""
    path = folder / LVR_CONFIG
    if not path.is_file():
        return None
    tuned = _json(path)
    for field in ("base", "latent"):
        if field not in tuned:
            raise BundleError(
                f"{path}: {field} is missing; this folder is not a complete checkpoint"
            )
    adapter = folder / "adapter_model.safetensors"
    if not adapter.is_file():
        raise BundleError(f"{adapter}: missing; this folder is not a complete checkpoint")
    return tuned


def _processor(
    folder: Path, base: Path, config: dict[str, Any], tuned: dict[str, Any] | None
) -> Processor:
    family = families.get(str(config.get("model_type")))
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path}: cannot be read ({error})") from error
    try:
        rows = int(config.get("text_config", config)["vocab_size"])
        preprocessor = _json(folder / "preprocessor_config.json")
        image = family.image_spec(config, preprocessor | (tuned or {}).get("image", {}))
    except KeyError as error:
        raise BundleError(
            f"{folder}: {error} is missing from config.json or preprocessor_config.json; "
            "copy them again"
        ) from error
    # A tuned model's markers are the rows that it was trained with: others learned nothing.
    if tuned is None:
        add_latent_tokens(tokenizer)
    tokens = TokenIds(
        image=_id(tokenizer, family.image_token, path),
        end=_end_ids(base, config, tokenizer),
        lvr_start=_id(tokenizer, spec.START, path),
        lvr=_id(tokenizer, spec.LATENT, path),
        lvr_end=_id(tokenizer, spec.END, path),
    )
    if max(tokens.image, tokens.lvr_start, tokens.lvr, tokens.lvr_end) >= rows:
        raise BundleError(
            f"{base}: its embedding has {rows} rows and none spare for the three latent tokens: "
            "resize it first"
        )
    return Processor(family, image, _template(folder), tokenizer, tokens)


def trained_over(folder: Path) -> str | None:
    """The `base_sha256` of the base that a tuned checkpoint was trained over; None where none was
    recorded.
    """
    return _json(folder / LVR_CONFIG).get("base_sha256")


def processor_of(model: str) -> Processor:
    """The processor of a bundle or a checkpoint, without its weights."""
    if is_bundle(Path(model)):
        return Bundle.open(Path(model), check=False).processor
    return read_checkpoint(model).processor


def add_latent_tokens(tokenizer: Tokenizer) -> None:
    """Give the tokenizer the three markers where it lacks them; they take spare rows of the
    embedding (Qwen2.5-VL has 271).
    """
    tokenizer.add_special_tokens(
        [t for t in (spec.START, spec.LATENT, spec.END) if tokenizer.token_to_id(t) is None]
    )


def _id(tokenizer: Tokenizer, token: str, path: Path) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise BundleError(
            f"{path}: its vocabulary has no {token}; this is not the tokenizer of such a model"
        )
    return int(token_id)
