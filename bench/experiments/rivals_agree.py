"""What the rivals' rounding costs on real weights: SmolLM2-135M-Instruct in each one's 4 bits,
beside fp32, over a fixed real text.

    make bench-rivals        (the last of what it runs; a quarter of an hour on 2 cores)
    .venv-rivals/bin/python docs/results/rivals_agree.py --out build/quant-lm --only "llama.cpp Q4_0"

Takes what quant_lm.py left in OUT (its checkpoint, its bundles), or makes it. Every runtime reads
the text as prompts, a window at once; the table says how often the next token that it holds for the
most likely is fp32's, and its perplexity. Writes OUT/agreement.json, and its table into the page
that --page names.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from quant_lm import (
    PROMPTS,
    WINDOW,
    Scorer,
    bundle_of,
    held_out_ids,
    make_checkpoint,
    texts_to_go_on_with,
)
from rivals import OPTIMUM, arguments, chosen, installed, publish

Reader = Callable[[np.ndarray], np.ndarray]  # ids (S,) -> logits (S, V) float32
FIRST = 64  # tokens of each window that are not scored


def language_model(out: Path) -> Path:
    """The text part of quant_lm.py's checkpoint as a checkpoint of its own, with its own
    vocabulary: what the rivals' builders take.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = out / "language-model"
    if (folder / "config.json").is_file():
        return folder
    if not (out / "checkpoint" / "config.json").is_file():
        make_checkpoint(out / "checkpoint")
    text = json.loads((out / "checkpoint" / "config.json").read_text())["text_config"]
    state = load_file(out / "checkpoint" / "model.safetensors")
    named = {
        "model." + k.removeprefix("model.text_model."): v
        for k, v in state.items()
        if k.startswith("model.text_model.")
    }
    rows = text["vocab_size"] - 64
    named["model.embed_tokens.weight"] = named["model.embed_tokens.weight"][:rows]
    config = LlamaConfig(
        **{k: v for k, v in text.items() if k not in ("model_type", "architectures")}
        | {"vocab_size": rows}
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    missing, extra = model.load_state_dict(named, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not extra, (missing, extra)
    model.tie_weights()
    PreTrainedTokenizerFast(
        tokenizer_file=str(out / "checkpoint" / "tokenizer.json"), eos_token="<|im_end|>"
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def torch_reader(out: Path, kind: str) -> Reader:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        language_model(out), dtype=torch.float32 if kind == "fp32" else torch.bfloat16
    ).eval()
    if kind == "nf4":
        import bitsandbytes as bnb

        for parent in list(model.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    made = bnb.nn.Linear4bit(
                        child.in_features,
                        child.out_features,
                        False,
                        torch.bfloat16,
                        quant_type="nf4",
                    )
                    made.weight = bnb.nn.Params4bit(
                        child.weight.data, requires_grad=False, quant_type="nf4"
                    )
                    setattr(parent, name, made.to("cpu").eval())

    def read(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(ids[None])).logits[0].float().numpy())

    return read


def own_reader(out: Path, precision: str) -> Reader:
    from dataclasses import replace

    from lvr_lite.generate.onnx import OnnxRuntime
    from lvr_lite.quant import quantize as weights
    from lvr_lite.quant import search

    _, fp32 = bundle_of(out)
    if not (out / precision / "lvr.json").is_file():
        plan, tune = None, None
        if precision == "int4":
            desk = search.Desk(
                out / "fp32", out, "", print, texts_to_go_on_with(fp32.tokenizer, PROMPTS)[1]
            )
            products = desk.products()
            plan, tune = replace(weights.whole("int4"), products=products), desk.tuning(products)
        weights.quantize_bundle(
            out / "fp32", out / precision, precision, print, plan=plan, tune=tune
        )
    runtime = OnnxRuntime(out / precision)

    def read(ids: np.ndarray) -> np.ndarray:
        runtime.start(1, len(ids))
        return np.asarray(
            runtime.head(Scorer._all_states(runtime, ids))[
                :, : runtime.manifest.decoder["vocab_size"] - 64
            ]
        )

    return read


def genai_reader(out: Path) -> Reader:
    import onnxruntime_genai as og

    folder = out / "genai"
    if not (folder / "genai_config.json").is_file():
        form = [
            "-i",
            language_model(out),
            "-o",
            folder,
            "-p",
            "int4",
            "-e",
            "cpu",
            "-c",
            out / "cache",
        ]
        subprocess.run(
            [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, form)], check=True
        )
    model = og.Model(str(folder))

    def read(ids: np.ndarray) -> np.ndarray:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + 1)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids.astype(np.int32))
        return np.asarray(generator.get_output("logits"), np.float32)[0]

    return read


def openvino_reader(out: Path) -> Reader:
    import openvino as ov

    folder = out / "openvino"
    if not (folder / "openvino_model.xml").is_file():  # its groups of 128 do not divide 576
        form = [
            "--weight-format",
            "int4",
            "--sym",
            "--group-size",
            "64",
            "--ratio",
            "1.0",
            "--task",
            "text-generation-with-past",
        ]
        subprocess.run(
            [OPTIMUM, "export", "openvino", "--model", language_model(out), *form, folder],
            check=True,
        )
    config = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64, "PERFORMANCE_HINT": "LATENCY"}
    request = (
        ov.Core().compile_model(folder / "openvino_model.xml", "CPU", config).create_infer_request()
    )

    def read(ids: np.ndarray) -> np.ndarray:
        request.reset_state()
        feed = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
        }
        request.infer({**feed, "beam_idx": np.zeros(1, np.int32)})
        return np.array(request.get_tensor("logits").data[0], np.float32)

    return read


def write_gguf(source: Path, path: Path) -> None:
    """The checkpoint in Q4_0, the head too (tied), as `llama-quantize --pure` has it; norms in
    fp32.
    """
    import gguf
    from safetensors.numpy import load_file

    config, state = (
        json.loads((source / "config.json").read_text()),
        load_file(source / "model.safetensors"),
    )
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def interleaved(weights: np.ndarray, count: int) -> np.ndarray:
        """Rows of each head with the halves that rotate together next to each other, as this
        architecture has them there.
        """
        return weights.reshape(count, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)

    def matrix(name: str, weights: np.ndarray) -> None:
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(
            name,
            gguf.quants.quantize(np.ascontiguousarray(weights, np.float32), kind),
            raw_dtype=kind,
        )

    matrix("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for i in range(config["num_hidden_layers"]):
        layer = {
            k.removeprefix(f"model.layers.{i}."): v
            for k, v in state.items()
            if k.startswith(f"model.layers.{i}.")
        }
        matrix(f"blk.{i}.attn_q.weight", interleaved(layer["self_attn.q_proj.weight"], heads))
        matrix(f"blk.{i}.attn_k.weight", interleaved(layer["self_attn.k_proj.weight"], groups))
        for ours, theirs in (("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"),
                             ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")):  # fmt: skip
            matrix(f"blk.{i}.{theirs}.weight", layer[f"{ours}.weight"])
        writer.add_tensor(f"blk.{i}.attn_norm.weight", layer["input_layernorm.weight"])
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", layer["post_attention_layernorm.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_reader(out: Path) -> Reader:
    import llama_cpp

    path = out / "q4_0.gguf"
    if not path.is_file():
        write_gguf(language_model(out), path)
    model = llama_cpp.Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False)

    def read(ids: np.ndarray) -> np.ndarray:
        model.reset()
        model.eval(ids.tolist())
        return np.array(model.scores[: len(ids)], np.float32)

    return read


READERS: dict[
    str, tuple[str, Callable[[Path], Reader]]
] = {  # name -> (its package, how it is loaded)
    "torch fp32": ("torch", partial(torch_reader, kind="fp32")),
    "torch bf16": ("torch", partial(torch_reader, kind="bf16")),
    "lvr-lite int8": ("onnxruntime", partial(own_reader, precision="int8")),
    "lvr-lite int4 (GPTQ, scales trained, block 128; head 8 bits)": (
        "onnxruntime",
        partial(own_reader, precision="int4"),
    ),
    "onnxruntime-genai int4 (its builder)": ("onnxruntime-genai", genai_reader),
    "OpenVINO int4 (optimum-intel, groups of 64; head 8 bits)": ("openvino", openvino_reader),
    "llama.cpp Q4_0": ("llama-cpp-python", llama_reader),
    "torch bitsandbytes NF4 (head bf16)": ("bitsandbytes", partial(torch_reader, kind="nf4")),
}


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    from tokenizers import Tokenizer

    out: Path = options.out
    names = chosen(parser, options, READERS)
    language_model(out)
    windows = held_out_ids(Tokenizer.from_file(str(out / "checkpoint" / "tokenizer.json")))
    written = out / "agreement.json"
    rows: dict[str, Any] = json.loads(written.read_text()) if written.is_file() else {}
    best: np.ndarray | None = None
    for name in dict.fromkeys(["torch fp32", *names]):
        read = READERS[name][1](out)
        losses, found = [], []
        for ids in windows:
            logits = read(ids)[FIRST:-1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            losses.append(
                np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), ids[FIRST + 1 :]]
            )
            found.append(logits.argmax(-1))
        best = np.concatenate(found) if best is None else best
        rows[name] = {
            "perplexity": float(np.exp(np.concatenate(losses).mean())), "agreement": float((np.concatenate(found) == best).mean()),
            "tokens": len(best), "version": installed(READERS[name][0]),
        }  # fmt: skip
        written.write_text(json.dumps(rows, indent=1))
        print(json.dumps({name: rows[name]}), flush=True)
    first = rows["torch fp32"]["perplexity"]
    lines = [
        "| | version | the same next token as fp32, % | perplexity | against fp32 |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        numbers = f"{100 * row['agreement']:.1f} | {row['perplexity']:.2f} | {100 * (row['perplexity'] / first - 1):+.1f} %"
        lines.append(f"| {name} | {row['version']} | {numbers} |")
    publish(lines, options.page, "rivals_agree.py")


if __name__ == "__main__":
    main()
