"""What the rivals' rounding costs on real weights: SmolLM2-135M-Instruct in each one's 4 bits,
beside fp32, over a fixed real text. A quarter of an hour on two cores.

    make bench-rivals
    python -m lvr_lite.bench.experiments.rivals.agree --out build/quant-lm --only "llama.cpp Q4_0"

Takes what `quant_lm` left in OUT (its checkpoint, its bundles), or makes it. Every runtime reads
the text as prompts, a window at once; the table says how often the next token that it holds for the
most likely is fp32's, and its perplexity. Writes OUT/agreement.json, and its table into the page
that --page names. Runs of some rivals leave the rows of the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lvr_lite.bench.experiments import smollm2
from lvr_lite.bench.experiments.rivals.builders import (
    build_genai,
    build_openvino,
    choose,
    installed,
    quantize_nf4,
    write_gguf,
)
from lvr_lite.bench.experiments.runner import (
    Names,
    Out,
    Page,
    is_whole,
    launch,
    publish,
    read_json,
    table,
    write_results,
)
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.model.bundle import Bundle
from lvr_lite.quant.calibration import Calibration
from lvr_lite.quant.quantize import quantize_bundle
from lvr_lite.quant.schemes import plan_of

# ids (S,) -> logits (S, V) float32
Reader = Callable[[np.ndarray], np.ndarray]
REFERENCE = "torch fp32"
TITLES = ("", "version", "the same next token as fp32, %", "perplexity", "against fp32")


@dataclass(frozen=True)
class Row:
    """agreement: share of the `tokens` places where the most likely next token is fp32's."""

    perplexity: float
    agreement: float
    tokens: int
    version: str | None


def language_model(out: Path) -> Path:
    """The text part of the checkpoint as a checkpoint of its own, with its own vocabulary: what the
    rivals' builders take.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = out / "language-model"
    if (folder / "config.json").is_file():
        return folder
    source = out / "checkpoint"
    smollm2.make_checkpoint(source)
    text = read_json(source / "config.json")["text_config"]
    words = text["vocab_size"] - smollm2.ADDED
    prefix = "model.text_model."
    state = {
        "model." + name.removeprefix(prefix): weight
        for name, weight in load_file(source / "model.safetensors").items()
        if name.startswith(prefix)
    }
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:words]
    sizes = {k: v for k, v in text.items() if k not in ("model_type", "architectures")}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": words})).to(torch.float32)
    missing, extra = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not extra, (missing, extra)
    model.tie_weights()
    tokenizer = str(source / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token="<|im_end|>").save_pretrained(
        folder
    )
    model.save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------
# readers


def torch_reader(out: Path, kind: str) -> Reader:
    """kind: fp32, bf16 or nf4."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(language_model(out), dtype=dtype).eval()
    if kind == "nf4":
        quantize_nf4(model.model, torch.bfloat16)

    def read(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(ids[None])).logits[0].float().numpy())

    return read


def own_reader(out: Path, precision: str) -> Reader:
    if not is_whole(out / precision / "lvr.json"):
        _quantize(out, precision)
    runtime = OnnxRuntime(Bundle.open(out / precision))

    def read(ids: np.ndarray) -> np.ndarray:
        runtime.start(1, len(ids))
        return smollm2.logits_of(runtime, smollm2.all_states(runtime, ids))

    return read


def _quantize(out: Path, precision: str) -> None:
    """int4 with GPTQ and trained scales, as `quant_lm` has it."""
    _, fp32 = smollm2.bundle_of(out)
    if precision != "int4":
        quantize_bundle(
            source=fp32.bundle, target=out / precision, precision=precision, progress=print
        )
        return
    _, prompts = smollm2.docstring_prompts(fp32.processor.tokenizer, smollm2.PROMPTS)
    calibration = Calibration(
        source=fp32.bundle, runtime=fp32, prompts=prompts, large=False, scratch=out, progress=print
    )
    products = calibration.products()
    quantize_bundle(
        fp32.bundle,
        out / precision,
        precision,
        print,
        plan=replace(plan_of(precision), products=products),
        tuner=calibration.tuner(products),
    )


def genai_reader(out: Path) -> Reader:
    import onnxruntime_genai as og

    model = og.Model(str(build_genai(language_model(out), out)))

    def read(ids: np.ndarray) -> np.ndarray:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + 1)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids.astype(np.int32))
        return np.asarray(generator.get_output("logits")[0], np.float32)

    return read


def openvino_reader(out: Path) -> Reader:
    import openvino as ov

    # Its groups of 128 do not divide 576.
    group = 64
    folder = build_openvino(language_model(out), out, group)
    config = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", config)
    request = compiled.create_infer_request()

    def read(ids: np.ndarray) -> np.ndarray:
        request.reset_state()
        request.infer(
            {
                "input_ids": ids[None],
                "attention_mask": np.ones((1, len(ids)), np.int64),
                "position_ids": np.arange(len(ids))[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        return np.array(request.get_tensor("logits").data[0], np.float32)

    return read


def llama_reader(out: Path) -> Reader:
    import llama_cpp

    path = out / "q4_0.gguf"
    if not path.is_file():
        folder = language_model(out)
        config = read_json(folder / "config.json")
        write_gguf(path, "llama", config, _tensors(folder, config))
    window = smollm2.WINDOW
    model = llama_cpp.Llama(
        str(path),
        n_ctx=window,
        n_batch=window,
        logits_all=True,
        verbose=False,
    )

    def read(ids: np.ndarray) -> np.ndarray:
        model.reset()
        model.eval(ids.tolist())
        return np.array(model.scores[: len(ids)], np.float32)

    return read


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """A checkpoint's weights by llama.cpp's names: in Q4_0, the head too (tied), as
    `llama-quantize --pure` has it; norms in fp32.
    """
    from safetensors.numpy import load_file

    state = load_file(folder / "model.safetensors")
    yield "token_embd.weight", _q4_0(state["model.embed_tokens.weight"])
    yield "output_norm.weight", state["model.norm.weight"]
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    matrices = {
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for i in range(config["num_hidden_layers"]):
        ours = f"model.layers.{i}"
        theirs = f"blk.{i}"
        for part, count in heads.items():
            weight = _interleaved(state[f"{ours}.self_attn.{part}_proj.weight"], count)
            yield f"{theirs}.attn_{part}.weight", _q4_0(weight)
        for name, other in matrices.items():
            yield f"{theirs}.{other}.weight", _q4_0(state[f"{ours}.{name}.weight"])
        yield f"{theirs}.attn_norm.weight", state[f"{ours}.input_layernorm.weight"]
        yield f"{theirs}.ffn_norm.weight", state[f"{ours}.post_attention_layernorm.weight"]


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head with the halves that rotate together next to each other, as this
    architecture has them there.
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2)
    return np.asarray(halves.reshape(weight.shape))


def _q4_0(weight: np.ndarray) -> np.ndarray:
    import gguf

    values = np.ascontiguousarray(weight, np.float32)
    return np.asarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0))


@dataclass(frozen=True)
class Entry:
    """package: that must be installed. load: from the folder of models."""

    package: str
    load: Callable[[Path], Reader]


READERS = {
    REFERENCE: Entry("torch", partial(torch_reader, kind="fp32")),
    "torch bf16": Entry("torch", partial(torch_reader, kind="bf16")),
    "lvr-lite int8": Entry("onnxruntime", partial(own_reader, precision="int8")),
    "lvr-lite int4 (GPTQ, scales trained, block 128; head 8 bits)": Entry(
        "onnxruntime", partial(own_reader, precision="int4")
    ),
    "onnxruntime-genai int4 (its builder)": Entry("onnxruntime-genai", genai_reader),
    "OpenVINO int4 (optimum-intel, groups of 64; head 8 bits)": Entry("openvino", openvino_reader),
    "llama.cpp Q4_0": Entry("llama-cpp-python", llama_reader),
    "torch bitsandbytes NF4 (head bf16)": Entry("bitsandbytes", partial(torch_reader, kind="nf4")),
}


# ----------------------------------------------------------------------------------------------


def score(read: Reader, windows: np.ndarray) -> tuple[float, np.ndarray]:
    """Perplexity over the windows, and the most likely token at each scored place."""
    losses = []
    likeliest = []
    for ids in windows:
        logits = read(ids)[smollm2.FIRST : -1]
        losses.append(smollm2.token_losses(logits, ids[smollm2.FIRST + 1 :]))
        likeliest.append(logits.argmax(-1))
    return smollm2.perplexity(losses), np.concatenate(likeliest)


def report(rows: dict[str, Row]) -> str:
    reference = rows[REFERENCE].perplexity
    cells = [
        [
            name,
            row.version,
            f"{100 * row.agreement:.1f}",
            f"{row.perplexity:.2f}",
            f"{100 * (row.perplexity / reference - 1):+.1f} %",
        ]
        for name, row in rows.items()
    ]
    return table(TITLES, cells)


def main(
    out: Out,
    only: Names = None,
    without: Names = None,
    page: Page = None,
) -> None:
    packages = {name: entry.package for name, entry in READERS.items()}
    names = choose(packages, only, without, out)
    language_model(out)
    tokenizer = Tokenizer.from_file(str(out / "checkpoint" / "tokenizer.json"))
    windows = smollm2.held_out_ids(tokenizer)
    file = out / "agreement.json"
    rows: dict[str, Row] = {}
    if is_whole(file):
        rows = {name: Row(**row) for name, row in read_json(file)["rows"].items()}
    reference: np.ndarray | None = None
    for name in dict.fromkeys([REFERENCE, *names]):
        entry = READERS[name]
        perplexity, likeliest = score(entry.load(out), windows)
        reference = likeliest if reference is None else reference
        agreement = float((likeliest == reference).mean())
        rows[name] = Row(perplexity, agreement, len(reference), installed(entry.package))
        write_results(file, {"rows": rows})
        print(json.dumps({name: asdict(rows[name])}), flush=True)
    print(report(rows))
    publish(report(rows), page, "rivals.agree")


if __name__ == "__main__":
    launch(main, __doc__)
