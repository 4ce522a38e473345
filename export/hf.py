"""A checkpoint as a folder that transformers loads without this project, and that other tools
convert from (docs/export.md).

May import: torch, transformers, safetensors, model/, generate/.

    write_hf(checkpoint, load_merged(checkpoint), Path("tuned-hf"), "bf16", print)

Weights have the names under which models of the family are published, and the base's own small
files are written again with what tuning changed: the markers, the size of pictures, the numbers'
type. Such runtimes take no latent steps, so generation_config.json forbids the markers, as
`--look never` does.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from lvr_lite import files
from lvr_lite.errors import BundleError, LvrError
from lvr_lite.export import parity
from lvr_lite.files import JsonObject
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, decode
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.model.families import ImageSpec
from lvr_lite.model.processor_files import read_json, read_preprocessor
from lvr_lite.model.prompt import prompt_ids, render
from lvr_lite.model.spec import END, LATENT, START, LatentSpec

if TYPE_CHECKING:
    from lvr_lite.export.weights import TransformersModule

# Tells a folder that was written here, which may be replaced, from any other.
RECORD = "lvr_export.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MARKERS = (START, LATENT, END)
SHARD = "5GB"
# Settings of sampling: the folder answers greedily, as its checkpoint was scored.
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p")
# Further fields of a generation_config.json that would change greedy answers, or be outdated.
OUTDATED = ("repetition_penalty", "_from_model_config", "transformers_version")
# Text tokens of each answer that is compared.
TOKENS = 8
QUESTION = "What is here?"


@dataclass(frozen=True)
class Gate:
    """What was compared before the folder was kept: transformers' greedy answers and ours.

    prompts, tokens: how many answers, and of how many tokens each.
    same_as_fp32: answers that rounding to the folder's precision left as they were.
    """

    prompts: int
    tokens: int
    same_as_fp32: int


def lost(checkpoint: Checkpoint) -> list[str]:
    """What the folder cannot hold of a checkpoint, a sentence each."""
    sentences = []
    latent = checkpoint.latent
    if latent.steps:
        sentences.append(
            f"the {latent.steps} latent steps of an answer: other runtimes answer in text alone, "
            "which can be far worse (score it with `lvr-lite eval --look never`); "
            "generation_config.json forbids the markers"
        )
    image = checkpoint.processor.image
    if checkpoint.processor.family.tiled and _longest(image) < image.own["longest"]:
        sentences.append(
            f"the limit of {image.max_pixels} pixels, which becomes a longer side of "
            f"{_longest(image)}: pictures that are not square are read smaller"
        )
    return sentences


def write_hf(
    checkpoint: Checkpoint,
    model: TransformersModule,
    target: Path,
    precision: str,
    progress: Callable[[str], None],
) -> JsonObject:
    """Write a merged model as a pretrained folder of transformers at `target`.

    model: transformers' model in float32, merged (`load_merged`); its parameters are rounded.
    precision: of DTYPES.
    progress: called with one line per stage.

    Returns what the folder's record says. Raises LvrError where transformers does not load the
    folder or answers otherwise than the decode loop here, OutputError where `target` cannot be
    written; then nothing is left of it, and an earlier folder stays as it was.
    """
    checkpoint = _with_longest_side(checkpoint)
    dtype = DTYPES[precision]
    bytes_needed = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    files.check_free_space(target, int(bytes_needed * 1.05))
    with files.fresh_folder(target, RECORD) as folder:
        exact = []
        if dtype != torch.float32:
            exact = _our_answers(model, checkpoint)
        _round(model, dtype)
        model.save_pretrained(folder, max_shard_size=SHARD)
        rows = len(model.get_input_embeddings().weight)
        for name, content in _small_files(checkpoint, precision, rows).items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2)
            (folder / name).write_text(text, encoding="utf-8")
        checkpoint.processor.tokenizer.save(str(folder / "tokenizer.json"))
        videos = "video_preprocessor_config.json"
        if (checkpoint.base / videos).is_file():
            shutil.copyfile(checkpoint.base / videos, folder / videos)
        weights = sorted(folder.glob("*.safetensors"))
        for path in weights:
            # safetensors writes them for their owner alone.
            path.chmod(0o644)
        size = sum(path.stat().st_size for path in weights)
        progress(f"weights: {size / 1e6:.1f} MB in {precision}, files: {len(weights)}")
        # What is compared is what was written: the rounded values, computed in float32.
        _round(model, torch.float32)
        ours = _our_answers(model, checkpoint)
        del model
        _compare(ours, _their_answers(folder, checkpoint))
        kept = sum(a == b for a, b in zip(exact, ours, strict=True)) if exact else len(ours)
        gate = Gate(prompts=len(ours), tokens=TOKENS, same_as_fp32=kept)
        progress(
            f"transformers gives the same {TOKENS} tokens for {gate.prompts} prompts; "
            f"{kept} of them as in fp32"
        )
        record = _record(checkpoint, precision, size, gate)
        (folder / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
    return record


def _round(model: TransformersModule, dtype: torch.dtype) -> None:
    """Parameters alone: buffers, such as the frequencies of positions, are made anew from the
    configuration when the folder is loaded.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _record(checkpoint: Checkpoint, precision: str, size: int, gate: Gate) -> JsonObject:
    packages = ("lvr-lite", "torch", "transformers")
    return {
        "for": "hf",
        "precision": precision,
        "bytes": size,
        "source": {
            "checkpoint_sha256": checkpoint.digest(),
            "base": checkpoint.base.name,
            "adapter": checkpoint.adapter,
            "versions": {package: version(package) for package in packages},
        },
        "latent": checkpoint.latent.to_json(),
        "lost": lost(checkpoint),
        "gate": vars(gate),
    }


# ----------------------------------------------------------------------------------------------
# small files


def _small_files(checkpoint: Checkpoint, precision: str, rows: int) -> dict[str, JsonObject | str]:
    """{file: its content}. rows: of the embedding."""
    processor = checkpoint.processor
    tokenizer = _tokenizer_config(checkpoint)
    contents: dict[str, JsonObject | str] = {
        "config.json": _config(checkpoint, precision, rows),
        "generation_config.json": _generation_config(checkpoint),
        "tokenizer_config.json": tokenizer,
        "special_tokens_map.json": _special_tokens(checkpoint, tokenizer),
        "chat_template.jinja": processor.template,
        "preprocessor_config.json": _preprocessor(checkpoint),
    }
    if combined := _own_json(checkpoint, "processor_config.json"):
        if "image_processor" in combined:
            combined["image_processor"] = contents["preprocessor_config.json"]
        # The template lies in a file of its own.
        combined.pop("chat_template", None)
        contents["processor_config.json"] = combined
    return contents


def _own_json(checkpoint: Checkpoint, name: str) -> JsonObject:
    """A small file of the checkpoint, else of its base; {} where neither has it."""
    for folder in (checkpoint.folder, checkpoint.base):
        if (folder / name).is_file():
            return read_json(folder / name)
    return {}


def _config(checkpoint: Checkpoint, precision: str, rows: int) -> JsonObject:
    """The base's config.json as it is written, so that tools of any age read it, with what changed:
    the type of numbers, and the rows of a vocabulary that grew.
    """
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    config: JsonObject = json.loads(json.dumps(checkpoint.config))
    for leftover in ("quantization_config", "_name_or_path"):
        config.pop(leftover, None)
    config["architectures"] = [checkpoint.processor.family.architecture]
    parts = [config, *(config[name] for name in ("text_config", "vision_config") if name in config)]
    for part in parts:
        for name in ("dtype", "torch_dtype"):
            if name in part:
                part[name] = dtype
    if "dtype" not in config:
        config["torch_dtype"] = dtype
    for part in (config, config.get("text_config", {})):
        if "vocab_size" in part:
            part["vocab_size"] = rows
    return config


def _generation_config(checkpoint: Checkpoint) -> JsonObject:
    """The base's, made greedy, without what other runtimes must not choose."""
    tokens = checkpoint.processor.tokens
    base = _own_json(checkpoint, "generation_config.json")
    kept = {name: value for name, value in base.items() if name not in (*SAMPLING, *OUTDATED)}
    never = {tokens.image, tokens.lvr_start, tokens.lvr, tokens.lvr_end}
    return kept | {
        "do_sample": False,
        "eos_token_id": list(tokens.end),
        "pad_token_id": kept.get("pad_token_id", tokens.end[0]),
        "suppress_tokens": sorted(never | set(kept.get("suppress_tokens") or ())),
    }


def _tokenizer_config(checkpoint: Checkpoint) -> JsonObject:
    """The base's, with the markers declared wherever it declares special tokens."""
    config = _own_json(checkpoint, "tokenizer_config.json")
    config.pop("chat_template", None)
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    declared = "additional_special_tokens"
    if isinstance(config.get("extra_special_tokens"), list) and declared not in config:
        declared = "extra_special_tokens"
    config[declared] = _with_markers(config.get(declared) or [])
    by_id = config.get("added_tokens_decoder")
    if by_id is not None:
        for marker in MARKERS:
            token_id = checkpoint.processor.tokenizer.token_to_id(marker)
            by_id[str(token_id)] = _declaration(marker) | {"special": True}
    return config


def _special_tokens(checkpoint: Checkpoint, tokenizer: JsonObject) -> JsonObject:
    """special_tokens_map.json: the base's, or what the tokenizer's configuration names."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    base = _own_json(checkpoint, "special_tokens_map.json") or {
        name: tokenizer[name] for name in names if tokenizer.get(name)
    }
    declared = "additional_special_tokens"
    return base | {declared: _with_markers(base.get(declared) or tokenizer.get(declared) or [])}


def _with_markers(tokens: Sequence[Any]) -> list[Any]:
    """tokens: strings, or objects with a content."""
    contents = [t["content"] if isinstance(t, dict) else t for t in tokens]
    return [*tokens, *(marker for marker in MARKERS if marker not in contents)]


def _declaration(marker: str) -> JsonObject:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": marker, **flags}


def _preprocessor(checkpoint: Checkpoint) -> JsonObject:
    """The base's, with the size of pictures that the checkpoint reads."""
    processor = checkpoint.processor
    settings = read_preprocessor(checkpoint.folder)
    family = processor.family
    name = family.architecture.replace("ForConditionalGeneration", "Processor")
    settings.setdefault("processor_class", name)
    if family.tiled:
        longest = {"longest_edge": _longest(processor.image)}
        return settings | {"size": longest}
    least = processor.image.min_pixels
    most = processor.image.max_pixels
    if "size" in settings or "min_pixels" not in settings:
        settings["size"] = {"shortest_edge": least, "longest_edge": most}
    if "min_pixels" in settings or "max_pixels" in settings:
        settings |= {"min_pixels": least, "max_pixels": most}
    return settings


def _with_longest_side(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint reading pictures as the folder will: a tiled family's files limit the longer
    side alone, not the area.
    """
    processor = checkpoint.processor
    if not processor.family.tiled:
        return checkpoint
    longest = _longest(processor.image)
    own = {**processor.image.own, "longest": longest}
    image = replace(processor.image, own=own, max_pixels=longest**2)
    return replace(checkpoint, processor=replace(processor, image=image))


def _longest(image: ImageSpec) -> int:
    """Pixels of the longer side to which a tiled family shrinks a square picture."""
    return min(image.own["longest"], math.isqrt(image.max_pixels))


# ----------------------------------------------------------------------------------------------
# the gate


def _prompts() -> Iterator[list[Image.Image]]:
    """Without a picture, each of a few alone, and two of them together."""
    pictures = parity.pictures()
    yield []
    yield from ([picture] for picture in pictures)
    yield pictures[:2]


def _our_answers(model: TransformersModule, checkpoint: Checkpoint) -> list[list[int]]:
    """Greedy text tokens of the decode loop without latents."""
    runtime = TorchRuntime(model, replace(checkpoint, latent=LatentSpec()))
    options = Options(max_tokens=TOKENS, min_tokens=TOKENS, look="never")
    answers = []
    for pictures in _prompts():
        prompt, _ = prepare_prompt(runtime, pictures, QUESTION)
        (result,) = decode(runtime, [prompt], options)
        answers.append(result.tokens)
    return answers


def _their_answers(folder: Path, checkpoint: Checkpoint) -> list[list[int]]:
    """The same from the folder alone: transformers' model, tokenizer and image processor of it.

    Its processor classes join these two, and most of them need torchvision; what they write for a
    picture comes from the family here instead.

    Raises BundleError where transformers cannot load the folder, LvrError where it reads a prompt
    otherwise.
    """
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        images = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"transformers cannot load what was written ({reason})") from error
    answers = []
    for pictures in _prompts():
        ids = _their_ids(tokenizer, checkpoint, pictures)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pictures:
            inputs |= images(images=pictures, return_tensors="pt")
        if checkpoint.processor.family.position_axes == 3:
            inputs["mm_token_type_ids"] = (ids == checkpoint.processor.tokens.image).long()
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


def _their_ids(tokenizer: Any, checkpoint: Checkpoint, pictures: list[Image.Image]) -> torch.Tensor:
    """A prompt (1, S) by the folder's tokenizer and template."""
    processor = checkpoint.processor
    family = processor.family
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    grids = []
    if pictures:
        grids = processor.see(pictures).grids
    shown = [family.picture_text(grid, processor.image) for grid in grids]
    if text != render(processor.template, QUESTION, len(pictures)):
        raise LvrError("transformers fills the chat template otherwise than the decode loop")
    parts = text.split(family.image_token)
    joined = parts[0] + "".join(a + b for a, b in zip(shown, parts[1:], strict=True))
    ids = tokenizer(joined, add_special_tokens=False)["input_ids"]
    ours = prompt_ids(
        tokenizer=processor.tokenizer,
        template=processor.template,
        question=QUESTION,
        image_token=family.image_token,
        pictures=shown,
    )
    if ids != ours:
        raise LvrError(
            f"transformers reads a prompt of {len(pictures)} pictures as other tokens than the "
            "decode loop: tokenizer.json and tokenizer_config.json contradict each other"
        )
    return torch.tensor([ids])


def _compare(ours: list[list[int]], theirs: list[list[int]]) -> None:
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        if mine != other:
            raise LvrError(
                f"parity: transformers answers prompt {number} with tokens {other}, the decode "
                f"loop with {mine}; nothing was written"
            )
