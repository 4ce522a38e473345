"""From the small files of a model's folder (tokenizer, chat template, preprocessing, generation) to
its `Processor`. May import: tokenizers, this folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lvr_lite.errors import BundleError
from lvr_lite.model import families, spec
from lvr_lite.model.processor import Processor
from lvr_lite.model.spec import TokenIds


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BundleError(f"{path}: missing; this folder is not a complete checkpoint") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path}: must hold a JSON object")
    return data


def read_processor(
    folder: Path, base: Path, config: dict[str, Any], tuned: dict[str, Any] | None
) -> Processor:
    """The processor of a model.

    folder: of its tokenizer, template and preprocessing files.
    base: the folder of the base model, whose generation settings hold.
    config: config.json of the base.
    tuned: lvr_config.json of a tuned checkpoint; None for a base model.

    Raises BundleError naming the file that is missing or wrong.
    """
    family = families.get(str(config.get("model_type")))
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path}: cannot be read ({error})") from error
    try:
        rows = int(config.get("text_config", config)["vocab_size"])
        preprocessor = read_json(folder / "preprocessor_config.json")
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


def _template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file() and isinstance(
            read_json(folder / name).get("chat_template"), str
        ):
            return str(read_json(folder / name)["chat_template"])
    raise BundleError(
        f"{folder}: no chat template (chat_template.jinja); copy it from the base model"
    )


def _end_ids(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    generation = (
        read_json(folder / "generation_config.json")
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
