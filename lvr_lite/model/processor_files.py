"""From the small files of a model's folder (tokenizer, chat template, preprocessing, generation) to
its `Processor`. May import: tokenizers, this folder.

Files are read in the order in which transformers' own processor reads them, so that a published
folder gives the same prompts here as there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from lvr_lite.errors import BundleError, LvrError
from lvr_lite.files import JsonObject
from lvr_lite.model import families, spec
from lvr_lite.model.json_files import read_object
from lvr_lite.model.processor import Processor
from lvr_lite.model.prompt import prompt_ids
from lvr_lite.model.spec import TokenIds

MARKERS = (spec.START, spec.LATENT, spec.END)
# Tokens that a vocabulary keeps for uses to come: SmolVLM fills all of its rows and has 88 of them.
RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")
# Bytes; published ones have up to some 30,000.
LARGEST_TEMPLATE = 1 << 20
# Fields of tokenizer_config.json that name a special token; templates may call them by these names.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


def read_json(path: Path) -> JsonObject:
    """The JSON object in a file. Raises BundleError, naming the file, where there is none."""
    try:
        return read_object(path, "copy it again")
    except FileNotFoundError as error:
        raise BundleError(f"{path}: missing; this folder is not a complete checkpoint") from error


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
    try:
        return _read_processor(folder, base, config, tuned)
    # Of values that are of another kind than a file of this name has.
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(
            f"{folder}: a field of its JSON files or its template is missing or wrong "
            f"({type(error).__name__}: {reason}); copy them again"
        ) from error


def _read_processor(
    folder: Path, base: Path, config: JsonObject, tuned: JsonObject | None
) -> Processor:
    family = families.get(str(config.get("model_type")))
    tokenizer = read_tokenizer(folder)
    try:
        rows = rows_of_tables(config)
        overridden = (tuned or {}).get("image", {})
        image = family.image_spec(config, read_preprocessor(folder) | overridden)
        image.check()
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{folder}: {error} is missing or wrong in config.json or preprocessor_config.json; "
            "copy them again"
        ) from error
    # A tuned model's markers are the rows that it was trained with: others learned nothing.
    if tuned is None:
        tokenizer = with_markers(tokenizer, rows)
    path = folder / "tokenizer.json"
    tokens = TokenIds(
        image=_id(tokenizer, family.image_token, path),
        end=_end_ids(base, config, tokenizer),
        lvr_start=_id(tokenizer, spec.START, path),
        lvr=_id(tokenizer, spec.LATENT, path),
        lvr_end=_id(tokenizer, spec.END, path),
    )
    of_config = config.get("image_token_id", tokens.image)
    if of_config != tokens.image:
        raise BundleError(
            f"{path}: {family.image_token} is token {tokens.image}, but {of_config} in "
            f"{base / 'config.json'}; this is not the tokenizer of such a model"
        )
    template = read_template(folder)
    _check_template(folder, template, tokenizer, family.image_token)
    return Processor(family, image, template, tokenizer, tokens)


# ----------------------------------------------------------------------------------- tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder with every token that its files declare, cutting and padding off.

    Published folders declare tokens in several files: `<|image_pad|>` of Qwen2-VL-2B stands in
    tokenizer_config.json alone.

    Raises BundleError where tokenizer.json cannot be read, or a token would get another id than the
    declared one.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path}: cannot be read ({error})") from error
    # Saved after training elsewhere, it may cut prompts without a word (llm-compressor 2917).
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for token_id, token in sorted(_declared_tokens(folder).items()):
        if tokenizer.token_to_id(token.content) is None:
            _add(tokenizer, token)
        given = tokenizer.token_to_id(token.content)
        if given != token_id:
            raise BundleError(
                f"{folder}: {token.content} is declared as token {token_id}, but tokenizer.json "
                f"makes it {given}; copy the tokenizer's files again from one revision"
            )
    for name in _named_tokens(folder):
        if tokenizer.token_to_id(name) is None:
            _add(tokenizer, AddedToken(name, special=True, normalized=False))
    return tokenizer


def _add(tokenizer: Tokenizer, token: AddedToken) -> None:
    add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
    add([token])


def _declared_tokens(folder: Path) -> dict[int, AddedToken]:
    """Tokens with their ids, of added_tokens.json and tokenizer_config.json."""
    declared = {}
    for content, token_id in _json_if_there(folder / "added_tokens.json").items():
        declared[int(token_id)] = AddedToken(content, special=True, normalized=False)
    settings = _json_if_there(folder / "tokenizer_config.json")
    for token_id, fields in settings.get("added_tokens_decoder", {}).items():
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        own = {flag: bool(fields[flag]) for flag in flags if flag in fields}
        declared[int(token_id)] = AddedToken(fields["content"], **own)
    return declared


def _named_tokens(folder: Path) -> list[str]:
    """Special tokens that are named without an id; transformers appends those that are new."""
    settings = _json_if_there(folder / "tokenizer_config.json")
    extra = settings.get("extra_special_tokens") or {}
    named = [settings.get(field) for field in NAMED_TOKENS]
    named += settings.get("additional_special_tokens") or []
    named += extra.values() if isinstance(extra, Mapping) else extra
    return [_content(token) for token in named if token]


def _content(token: str | Mapping[str, Any]) -> str:
    """A special token, which files hold as text or as an object."""
    return token if isinstance(token, str) else str(token["content"])


def _json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def with_markers(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """The tokenizer with the three markers of the latent loop.

    rows: of the model's embedding.

    Markers take spare rows (Qwen2.5-VL has 271). A vocabulary without three gives them the last
    tokens that it keeps in reserve: others who use some begin with the first. One without these
    grows.
    """
    missing = [marker for marker in MARKERS if tokenizer.token_to_id(marker) is None]
    used = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if used + len(missing) <= rows:
        tokenizer.add_special_tokens(missing)
        return tokenizer
    added = tokenizer.get_added_tokens_decoder()
    reserved = [i for i in sorted(added) if RESERVED.fullmatch(added[i].content)]
    if len(reserved) < len(missing):
        tokenizer.add_special_tokens(missing)
        return tokenizer
    names = dict(zip(reserved[len(reserved) - len(missing) :], missing, strict=True))
    content = json.loads(tokenizer.to_str())
    words = content["model"]["vocab"]
    for token in content["added_tokens"]:
        if token["id"] in names:
            if token["content"] in words:
                words[names[token["id"]]] = words.pop(token["content"])
            token["content"] = names[token["id"]]
    return Tokenizer.from_str(json.dumps(content))


def rows_of_tables(config: Mapping[str, Any]) -> int:
    """Rows of embedding and head, by config.json. Raises KeyError where it does not say."""
    text = config.get("text_config", config)
    return int(text["vocab_size"] if "vocab_size" in text else config["vocab_size"])


def with_rows_for_markers(config: dict[str, Any], tokens: TokenIds) -> dict[str, Any]:
    """config.json with a row for each marker in embedding and head: where the vocabulary is full,
    more than the base's files hold.
    """
    rows = max(rows_of_tables(config), tokens.lvr_start + 1, tokens.lvr + 1, tokens.lvr_end + 1)
    grown = dict(config)
    if "vocab_size" in grown:
        grown["vocab_size"] = rows
    if "text_config" in grown:
        grown["text_config"] = grown["text_config"] | {"vocab_size": rows}
    return grown


def _id(tokenizer: Tokenizer, token: str, path: Path) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise BundleError(
            f"{path}: its vocabulary has no {token}; this is not the tokenizer of such a model"
        )
    return int(token_id)


def _end_ids(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    generation = _json_if_there(folder / "generation_config.json")
    of_config = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    end = generation.get("eos_token_id", of_config)
    ids = end if isinstance(end, list) else [end]
    ids = [i for i in ids if i is not None] or [tokenizer.token_to_id("<|im_end|>")]
    if ids == [None]:
        raise BundleError(f"{folder}: no end-of-turn token (eos_token_id) in its configuration")
    if not all(type(i) is int for i in ids):
        raise BundleError(f"{folder}: eos_token_id must be whole numbers, not {ids!r:.100}")
    return tuple(ids)


# ------------------------------------------------------------------- template and preprocessing


def read_template(folder: Path) -> str:
    """The chat template of a folder, in the order of transformers' processors.

    chat_template.jinja, then chat_template.json, then processor_config.json. The tokenizer's own
    (tokenizer_config.json) comes last: it is often the language model's and shows no pictures.
    A template that calls special tokens by name gets them as variables of its own.

    Raises BundleError where there is none.
    """
    path = folder / "chat_template.jinja"
    found: object = None
    if path.is_file():
        if path.stat().st_size > LARGEST_TEMPLATE:
            raise BundleError(f"{path}: larger than {LARGEST_TEMPLATE} bytes; copy it again")
        found = path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if found is None:
            found = _default(_json_if_there(folder / name).get("chat_template"))
    if not isinstance(found, str):
        raise BundleError(
            f"{folder}: no chat template (chat_template.jinja); copy it from the base model"
        )
    return _with_named_tokens(found, folder)


def _default(template: object) -> object:
    """Of several templates the one named "default": lists of {name, template}, or {name: …}."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return template.get("default") if isinstance(template, dict) else template


def _with_named_tokens(template: str, folder: Path) -> str:
    settings = _json_if_there(folder / "special_tokens_map.json")
    settings |= _json_if_there(folder / "tokenizer_config.json")
    lines = [
        f"{{% set {field} = {json.dumps(_content(settings[field]))} %}}\n"
        for field in NAMED_TOKENS
        if settings.get(field) and re.search(rf"\b{field}\b", template)
    ]
    # A template of a tuned checkpoint has these lines already.
    return "".join(line for line in lines if line not in template) + template


def _check_template(folder: Path, template: str, tokenizer: Tokenizer, image_token: str) -> None:
    """Raises BundleError where one picture and a question do not come out as such."""
    try:
        prompt_ids(tokenizer, template, "x", image_token, [image_token])
    except LvrError as error:
        raise BundleError(f"{folder}: {error}") from error


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """What preprocessor_config.json holds; or its place in processor_config.json, all that
    transformers 5 saves.

    Raises BundleError, naming the file, where there is neither.
    """
    path = folder / "preprocessor_config.json"
    of_processor = _json_if_there(folder / "processor_config.json").get("image_processor")
    if of_processor is not None and not path.is_file():
        return dict(of_processor)
    return read_json(path)
