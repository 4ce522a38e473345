"""What the rivals load: the shape with random weights in each one's own format, and the tools that
also build a trained model for them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
import typer
from onnx import TensorProto, helper, numpy_helper

from lvr_lite.bench.experiments.runner import ROOT, once
from lvr_lite.export.synthetic import SHAPES
from lvr_lite.model.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# optimum-intel wants an older transformers than this project, so it has an environment of its own.
OPTIMUM = ROOT / ".venv-optimum" / "bin" / "optimum-cli"
SHAPE = "qwen2-vl-2b"
SIZES: dict[str, Any] = SHAPES[SHAPE]["text_config"]
# Values of a block of Q4_0, and its bytes: a scale in fp16, then the values.
Q4_0_BLOCK = 32
Q4_0_BYTES = 18


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def choose(
    packages: dict[str, str],
    only: str | None,
    without: str | None,
    out: Path,
) -> list[str]:
    """The names of `only`, or all whose package is installed, but those of `without`; each with |
    between. Raises BadParameter for a name that is not known.

    packages: {name: the package it takes}. out: where OpenVINO's own model may be already.
    """
    excluded = without.split("|") if without else []
    chosen = only.split("|") if only else []
    if unknown := [name for name in (*chosen, *excluded) if name not in packages]:
        known = "|".join(packages)
        raise typer.BadParameter(f"{'|'.join(unknown)}: not known; choose from {known}")
    optimum = OPTIMUM.is_file() or (out / "openvino").is_dir()
    here = [
        name
        for name, package in packages.items()
        if installed(package) and (optimum or "optimum-intel" not in name)
    ]
    return [name for name in chosen or here if name not in excluded]


def build(out: Path, names: list[str]) -> None:
    """All that these rivals load, where it is missing."""
    bundle = out / "lvr-lite"
    arguments = ("export", "--synthetic", SHAPE, bundle, "--precision", "int4")
    once(bundle / "lvr.json", *arguments, log=out / "log.txt")
    model = out / "qwen2"
    if "lvr-lite, head in 4 bits" in names and not (out / "head4.onnx").is_file():
        write_head(out / "head4.onnx")
    if "llama.cpp Q4_0" in names and not (out / "q4_0.gguf").is_file():
        write_gguf(out / "q4_0.gguf", "qwen2", SIZES, _random_tensors())
    if "onnxruntime-genai int4" in names:
        write_checkpoint(model)
        build_genai(model, out)
    if "OpenVINO int4 (optimum-intel)" in names:
        write_checkpoint(model)
        build_openvino(model, out, 128)


# ----------------------------------------------------------------------------------------------
# torch


def qwen2(dtype: torch.dtype) -> PreTrainedModel:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 1e6}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = Qwen2Config(**{**SIZES, **ends, "rope_parameters": rope})
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def quantize_nf4(model: torch.nn.Module, products: torch.dtype) -> None:
    """All linears in bitsandbytes' NF4, in place. products: the type that they compute in."""
    import bitsandbytes as bnb

    for path, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            quantized = bnb.nn.Linear4bit(*sizes, products, quant_type="nf4")
            quantized.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4"
            )
            quantized.bias = linear.bias
            model.set_submodule(path, quantized.to("cpu").eval())


def write_checkpoint(folder: Path) -> None:
    """The shape as a Qwen2 checkpoint in bf16, for builders that want one, with the embedded
    model's tokenizer. Nothing where there is one.
    """
    from transformers import PreTrainedTokenizerFast

    if (folder / "config.json").is_file():
        return
    qwen2(torch.bfloat16).save_pretrained(folder)
    tokenizer = read_checkpoint("tiny").processor.tokenizer
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(
        folder
    )


# ----------------------------------------------------------------------------------------------
# other runtimes' builders, by command


def build_genai(model: Path, out: Path) -> Path:
    """onnxruntime-genai's int4 of a checkpoint in OUT/genai, where it is missing."""
    folder = out / "genai"
    if not (folder / "genai_config.json").is_file():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        form: list[str | Path] = [
            "-i",
            model,
            "-o",
            folder,
            "-p",
            "int4",
            "-e",
            "cpu",
            "-c",
            out / "cache",
        ]
        subprocess.run([*builder, *form], check=True)
    return folder


def build_openvino(model: Path, out: Path, group: int) -> Path:
    """optimum-intel's int4 of a checkpoint in OUT/openvino, where it is missing. group: weights
    that have a scale.
    """
    folder = out / "openvino"
    if not (folder / "openvino_model.xml").is_file():
        form: list[str | Path] = [
            "--weight-format",
            "int4",
            "--sym",
            "--group-size",
            str(group),
            "--ratio",
            "1.0",
        ]
        task = ["--task", "text-generation-with-past"]
        export: list[str | Path] = [OPTIMUM, "export", "openvino", "--model", model]
        subprocess.run([*export, *form, *task, folder], check=True)
    return folder


# ----------------------------------------------------------------------------------------------
# files


def write_head(path: Path, block: int = 128) -> None:
    """A head of random weights in 4 bits, symmetric."""
    columns = SIZES["hidden_size"]
    rows = SIZES["vocab_size"]
    shape = (rows, columns // block, block // 2)
    q = np.random.default_rng(0).integers(
        0,
        256,
        shape,
        dtype=np.uint8,
    )
    scales = np.full(shape[:2], 1e-3, np.float32)
    weights = [numpy_helper.from_array(q, "q"), numpy_helper.from_array(scales, "s")]
    node = helper.make_node(
        "MatMulNBits",
        ["last_hidden_state", "q", "s"],
        ["logits"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=4,
        block_size=block,
        accuracy_level=4,
    )
    x = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", 1, columns])
    y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 1, rows])
    graph = helper.make_graph([node], "head", [x], [y], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def write_gguf(
    path: Path, architecture: str, config: dict[str, Any], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """A model for llama.cpp. config: as in config.json. tensors: by llama.cpp's names, in float32,
    or blocks of Q4_0 as bytes (rows, blocks * 18).
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, values in tensors:
        blocks = values.dtype == np.uint8
        writer.add_tensor(
            name, values, raw_dtype=gguf.GGMLQuantizationType.Q4_0 if blocks else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_tensors() -> Iterator[tuple[str, np.ndarray]]:
    """Weights in Q4_0, the head too (tied), norms and biases in fp32."""
    rng = np.random.default_rng(0)
    hidden = SIZES["hidden_size"]
    inner = SIZES["intermediate_size"]
    keys = hidden // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
    yield "token_embd.weight", _random_blocks(rng, SIZES["vocab_size"], hidden)
    yield "output_norm.weight", np.ones(hidden, np.float32)
    for i in range(SIZES["num_hidden_layers"]):
        for name, rows in (("attn_q", hidden), ("attn_k", keys), ("attn_v", keys)):
            yield f"blk.{i}.{name}.weight", _random_blocks(rng, rows, hidden)
            yield f"blk.{i}.{name}.bias", np.zeros(rows, np.float32)
        yield f"blk.{i}.attn_output.weight", _random_blocks(rng, hidden, hidden)
        yield f"blk.{i}.ffn_gate.weight", _random_blocks(rng, inner, hidden)
        yield f"blk.{i}.ffn_up.weight", _random_blocks(rng, inner, hidden)
        yield f"blk.{i}.ffn_down.weight", _random_blocks(rng, hidden, inner)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{i}.{name}.weight", np.ones(hidden, np.float32)


def _random_blocks(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A matrix of random values in Q4_0, all of one scale."""
    shape = (rows, columns // Q4_0_BLOCK, Q4_0_BYTES)
    blocks = rng.integers(
        0,
        256,
        shape,
        dtype=np.uint8,
    )
    blocks[..., :2] = np.array([0.005], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)
