"""The text decoder of one shape under several runtimes, 4-bit weights, head included: time a token,
prefill, memory, in one run.

    make bench-rivals        (an environment of its own, then this with all that is installed there; about 40 minutes on 2 cores)
    python docs/results/rivals.py --out build/rivals --only "lvr-lite|llama.cpp Q4_0"
    python docs/results/rivals.py --out build/rivals --only "lvr-lite|torch bitsandbytes NF4" --rounds 3 --steps 4    (slow)

Every rival runs in a process of its own, so that memory is its own and thread pools do not meet;
all stay loaded, and one after another takes its turn, in an order shuffled for each round. Weights
are random: times do not hang on them. What an answer's quality would be is not compared here; the
table says in what each computes. Writes OUT/rivals-PAST.json, and its table into the page that
--page names.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
OPTIMUM = ROOT / ".venv-optimum" / "bin" / "optimum-cli"
SHAPE = "qwen2-vl-2b"
PAST, STEPS = 300, 24
ROOM = 128  # tokens after a prompt that caches are made for
H, LAYERS, HEADS, KV, HEAD_DIM, FFN, VOCABULARY = 1536, 28, 12, 2, 128, 8960, 151936


class Rival(Protocol):
    """A text decoder with its head, loaded. `computes`: types of activations and K/V."""

    computes: str

    def prefill(self, ids: list[int]) -> None:
        """Begin anew with these tokens; the last position goes through the head."""

    def step(self, token: int) -> None:
        """One more token, and the logits after it."""


class LvrLite:
    def __init__(self, out: Path, threads: int) -> None:
        from lvr_lite.generate.onnx import OnnxRuntime

        self.runtime = OnnxRuntime(out / "lvr-lite", threads)
        self.computes = "int8 products of fp32 activations, K/V fp32"

    def prefill(self, ids: list[int]) -> None:
        self.runtime.start(1, len(ids) + ROOM)
        embeds = self.runtime.embed(np.array([ids]) % 1000)
        self.at = len(ids)
        positions = np.broadcast_to(np.arange(len(ids)), (3, 1, len(ids)))
        self.runtime.head(
            self.runtime.prefill(embeds, np.array(positions, np.int64), np.array([len(ids)]))
        )

    def step(self, token: int) -> None:
        embeds = self.runtime.embed(np.array([[token % 1000]]))[:, 0]
        self.runtime.head(self.runtime.step(embeds, np.array([self.at])))
        self.at += 1


class LvrLiteHead4(LvrLite):
    """With the head in 4 bits as well, as the others have it and as `mixed` may choose; `int4`
    keeps 8 there for what it answers.
    """

    def __init__(self, out: Path, threads: int) -> None:
        super().__init__(out, threads)
        from lvr_lite.generate.onnx import open_session

        self.runtime = self.runtime.with_graphs(head=open_session(out / "head4.onnx"))


class LvrLiteLatent(LvrLite):
    """A latent step: the last state goes in as it came out, and no head is asked."""

    def prefill(self, ids: list[int]) -> None:
        super().prefill(ids)
        self.state = self.runtime.step(np.zeros((1, H), np.float32), np.array([self.at]))

    def step(self, token: int) -> None:
        self.at += 1
        self.state = self.runtime.step(self.state, np.array([self.at]))


class LlamaCpp:
    def __init__(self, out: Path, threads: int) -> None:
        import llama_cpp

        self.llm = llama_cpp.Llama(
            str(out / "q4_0.gguf"),
            n_ctx=4096,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.computes = "Q8_0 activations, K/V fp16"

    def prefill(self, ids: list[int]) -> None:
        self.llm.reset()
        self.llm.eval([i % 1000 for i in ids])

    def step(self, token: int) -> None:
        self.llm.eval([token % 1000])


class OpenVino:
    """OpenVINO on the bundle's own graphs: its ONNX frontend turns MatMulNBits into compressed
    products and attention into its own.
    """

    def __init__(self, out: Path, threads: int) -> None:
        import openvino as ov

        core = ov.Core()
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.graphs = {
            name: core.compile_model(
                core.read_model(out / "lvr-lite" / "onnx" / f"{name}.onnx"), "CPU", config
            ).create_infer_request()
            for name in ("decoder", "lm_head")
        }
        self.names = [o.get_any_name() for o in self.graphs["decoder"].get_compiled_model().outputs]
        self.computes = "8-bit dynamic activations, K/V fp32"

    def prefill(self, ids: list[int]) -> None:
        self.cache = {
            n.replace("present", "past_key_values"): np.zeros(
                (1, KV, len(ids), HEAD_DIM), np.float32
            )
            for n in self.names
            if "present" in n
        }
        self.at = 0
        self._run([i % 1000 for i in ids])

    def step(self, token: int) -> None:
        self._run([token % 1000])

    def _run(self, ids: list[int]) -> None:
        n, total = len(ids), self.at + len(ids)
        embeds = np.full(
            (1, n, H), 0.01, np.float32
        )  # its frontend does not take GatherBlockQuantized, which costs nothing here
        positions = np.array(np.broadcast_to(np.arange(self.at, total), (3, 1, n)), np.int64)
        lengths = {
            "seqlens_k": np.array([total - 1], np.int32),
            "total_sequence_length": np.array(total, np.int32),
        }
        found = self.graphs["decoder"].infer(
            {"inputs_embeds": embeds, "position_ids": positions, **lengths, **self.cache}
        )
        values = [found[i] for i in range(len(self.names))]
        self.cache = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(self.names, values, strict=True)
            if "present" in name
        }
        self.graphs["lm_head"].infer(
            {"last_hidden_state": values[self.names.index("last_hidden_state")][:, -1:]}
        )
        self.at = total


class OpenVinoOwn:
    """What OpenVINO's own exporter makes of the shape: optimum-intel, int4 symmetric in groups of
    128, head and embedding in 8 bits.
    """

    def __init__(self, out: Path, threads: int) -> None:
        import openvino as ov

        config = {
            "INFERENCE_NUM_THREADS": threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = ov.Core().compile_model(out / "openvino" / "openvino_model.xml", "CPU", config)
        self.request = compiled.create_infer_request()
        kinds = [
            str(compiled.get_property(name))
            for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        ]
        self.computes = "{}, 8-bit dynamic activations, K/V {}".format(
            *(kind.split("'")[1] for kind in kinds)
        )

    def prefill(self, ids: list[int]) -> None:
        self.request.reset_state()
        self.at = 0
        self._run([i % 1000 for i in ids])

    def step(self, token: int) -> None:
        self._run([token % 1000])

    def _run(self, ids: list[int]) -> None:
        total = self.at + len(ids)
        self.request.infer(
            {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(self.at, total)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        self.at = total


class GenAI:
    def __init__(self, out: Path, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(out / "genai"))
        config.overlay(
            json.dumps(
                {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
            )
        )
        self.og, self.model = og, og.Model(config)
        self.computes = "int8 products of fp32 activations, K/V fp32"

    def prefill(self, ids: list[int]) -> None:
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(
            max_length=len(ids) + ROOM, min_length=len(ids) + ROOM, do_sample=False
        )
        self.generator = self.og.Generator(self.model, parameters)
        self.generator.append_tokens(np.array([i % 1000 for i in ids], np.int32))
        self.generator.generate_next_token()

    def step(self, token: int) -> None:
        self.generator.generate_next_token()


class Torch:
    """transformers' Qwen2 in bf16, or in bitsandbytes' NF4 with products in bf16, or in fp32, which
    CPUs without bf16 do faster.
    """

    def __init__(self, nf4: bool, threads: int) -> None:
        import torch
        from transformers import DynamicCache

        torch.set_num_threads(threads)
        self.torch, self.cache_type = torch, DynamicCache
        products = (
            torch.float32 if nf4 and not torch.cpu._is_avx512_bf16_supported() else torch.bfloat16
        )
        self.model = qwen2(products)
        self.computes = "bf16"
        if nf4:
            import bitsandbytes as bnb

            self.computes = f"{products}, weights NF4; head not quantized".replace("torch.", "")
            for parent in list(self.model.model.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        made = bnb.nn.Linear4bit(
                            child.in_features,
                            child.out_features,
                            child.bias is not None,
                            products,
                            quant_type="nf4",
                        )
                        made.weight = bnb.nn.Params4bit(
                            child.weight.data, requires_grad=False, quant_type="nf4"
                        )
                        made.bias = child.bias
                        setattr(parent, name, made.to("cpu").eval())
        self.model.eval().requires_grad_(False)

    def prefill(self, ids: list[int]) -> None:
        self.cache = self.cache_type(config=self.model.config)
        self._run([i % 1000 for i in ids])

    def step(self, token: int) -> None:
        self._run([token % 1000])

    def _run(self, ids: list[int]) -> None:
        with self.torch.inference_mode():
            self.model(
                self.torch.tensor([ids]),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )


RIVALS: dict[
    str, tuple[str, Callable[[Path, int], Rival]]
] = {  # name -> (its package, how it is loaded)
    "lvr-lite": ("onnxruntime", LvrLite),
    "lvr-lite, head in 4 bits": ("onnxruntime", LvrLiteHead4),
    "lvr-lite, latent step": ("onnxruntime", LvrLiteLatent),
    "llama.cpp Q4_0": ("llama-cpp-python", LlamaCpp),
    "onnxruntime-genai int4": ("onnxruntime-genai", GenAI),
    "OpenVINO int4 (optimum-intel)": ("openvino", OpenVinoOwn),
    "OpenVINO, the same graphs": ("openvino", OpenVino),
    "torch bf16": ("torch", lambda out, threads: Torch(False, threads)),
    "torch bitsandbytes NF4": ("bitsandbytes", lambda out, threads: Torch(True, threads)),
}


def qwen2(dtype: Any) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=H, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV, intermediate_size=FFN,
        vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_gguf(path: Path) -> None:
    """Random weights in Q4_0, the head too (tied), norms and biases in fp32."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(32768)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = rng.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
        blocks[..., :2] = (
            np.full((rows, columns // 32, 1), 0.005, np.float16)
            .view(np.uint8)
            .reshape(rows, columns // 32, 2)
        )
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    matrix("token_embd.weight", VOCABULARY, H)
    writer.add_tensor("output_norm.weight", np.ones(H, np.float32))
    for i in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", HEADS * HEAD_DIM, H), ("attn_k", KV * HEAD_DIM, H), ("attn_v", KV * HEAD_DIM, H), ("attn_output", H, H),
            ("ffn_gate", FFN, H), ("ffn_up", FFN, H), ("ffn_down", H, FFN),
        ):  # fmt: skip
            matrix(f"blk.{i}.{name}.weight", rows, columns)
            if name in ("attn_q", "attn_k", "attn_v"):
                writer.add_tensor(f"blk.{i}.{name}.bias", np.zeros(rows, np.float32))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(H, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_checkpoint(folder: Path) -> None:
    """The shape as a Qwen2 checkpoint in bf16, for builders that want one, with the embedded
    model's tokenizer.
    """
    import torch
    from transformers import PreTrainedTokenizerFast

    from lvr_lite.model.checkpoint import read_checkpoint

    qwen2(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=read_checkpoint("tiny").tokenizer, eos_token="<|im_end|>"
    ).save_pretrained(folder)


def make_genai(out: Path) -> None:
    command = [
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        out / "qwen2",
        "-o",
        out / "genai",
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        out / "cache",
    ]
    subprocess.run([sys.executable, *map(str, command)], check=True)


def make_openvino(out: Path) -> None:
    """optimum-intel wants an older transformers than this project, so it has an environment of its
    own.
    """
    form = [
        "--weight-format",
        "int4",
        "--sym",
        "--group-size",
        "128",
        "--ratio",
        "1.0",
        "--task",
        "text-generation-with-past",
    ]
    subprocess.run(
        [OPTIMUM, "export", "openvino", "--model", out / "qwen2", *form, out / "openvino"],
        check=True,
    )


def make_head(path: Path, block: int = 128) -> None:
    """A head of random weights in 4 bits, symmetric."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    q = rng.integers(0, 256, (VOCABULARY, H // block, block // 2), dtype=np.uint8)
    weights = [
        numpy_helper.from_array(q, "q"),
        numpy_helper.from_array(np.full((VOCABULARY, H // block), 1e-3, np.float32), "s"),
    ]
    form = {"K": H, "N": VOCABULARY, "bits": 4, "block_size": block, "accuracy_level": 4}
    node = helper.make_node(
        "MatMulNBits", ["last_hidden_state", "q", "s"], ["logits"], domain="com.microsoft", **form
    )
    x = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", 1, H])
    y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 1, VOCABULARY])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(
        helper.make_model(
            helper.make_graph([node], "head", [x], [y], weights),
            opset_imports=opsets,
            ir_version=10,
        ),
        path,
    )


def make_all(out: Path, names: list[str]) -> None:
    if not (out / "lvr-lite" / "lvr.json").is_file():
        command = [
            sys.executable,
            "-m",
            "lvr_lite",
            "export",
            "--synthetic",
            SHAPE,
            str(out / "lvr-lite"),
            "--precision",
            "int4",
        ]
        subprocess.run(command, check=True)
    if {"onnxruntime-genai int4", "OpenVINO int4 (optimum-intel)"} & set(names) and not (
        out / "qwen2" / "config.json"
    ).is_file():
        make_checkpoint(out / "qwen2")
    for name, made, make in (
        ("lvr-lite, head in 4 bits", out / "head4.onnx", lambda: make_head(out / "head4.onnx")),
        ("llama.cpp Q4_0", out / "q4_0.gguf", lambda: make_gguf(out / "q4_0.gguf")),
        (
            "OpenVINO int4 (optimum-intel)",
            out / "openvino" / "openvino_model.xml",
            lambda: make_openvino(out),
        ),
        ("onnxruntime-genai int4", out / "genai" / "genai_config.json", lambda: make_genai(out)),
    ):
        if name in names and not made.is_file():
            make()


def work(name: str, out: Path, threads: int) -> None:
    """One rival's process: a line {"past", "steps"} in, a line of times out."""
    from lvr_lite.system import peak_rss_mb

    loaded = RIVALS[name][1](out, threads)
    print(json.dumps({"computes": loaded.computes}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = [
            int(i) for i in np.random.default_rng(asked["past"]).integers(2, 1000, asked["past"])
        ]
        began = time.perf_counter()
        loaded.prefill(ids)
        prefill = time.perf_counter() - began
        steps = []
        for i in range(asked["steps"]):
            began = time.perf_counter()
            loaded.step(i + 2)
            steps.append((time.perf_counter() - began) * 1e3)
        print(
            json.dumps(
                {"prefill_ms": prefill * 1e3, "step_ms": steps, "peak_rss_mb": peak_rss_mb()}
            ),
            flush=True,
        )


class Ended(Exception):
    """A rival's process that is gone: built for another CPU, or killed for its memory."""


def ask(process: subprocess.Popen[str], what: dict[str, int] | None) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    if what is not None:
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise Ended(f"its process ended with {process.wait()}; what it said stands above")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--only", help="names with | between; all whose package is installed by default"
    )
    parser.add_argument("--without", help="names with | between")
    parser.add_argument(
        "--page",
        type=Path,
        help="Markdown in which the table of the same marks is replaced, or to which it is added",
    )
    return parser


def main() -> None:
    parser = arguments()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--past", type=int, default=PAST)
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens of each round")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out: Path = options.out
    if options.work:
        work(options.work, out, options.threads)
        return
    from lvr_lite.bench import machine

    if not 0 < options.steps <= ROOM - 8:
        parser.error(f"--steps {options.steps}: give 1 to {ROOM - 8}")
    names = chosen(parser, options, RIVALS)
    out.mkdir(parents=True, exist_ok=True)
    make_all(out, names)
    here = [
        sys.executable,
        __file__,
        "--out",
        str(out),
        "--threads",
        str(options.threads),
        "--work",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    running = {
        n: subprocess.Popen(
            [*here, n], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for n in names
    }
    told: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, process in running.items():
        try:
            begun = ask(process, None)
            ask(process, {"past": options.past, "steps": 4})  # warm-up
        except Ended as error:
            left_out[name] = str(error)
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        told[name] = begun | {
            "version": installed(RIVALS[name][0]),
            "prefill_ms": [],
            "step_ms": [],
        }
    names = list(told)
    bandwidth, order = [machine.read_bandwidth(options.threads)], random.Random(0)
    for _ in range(options.rounds):
        order.shuffle(names)
        for name in names:
            time.sleep(0.2)  # threads of the one before stop spinning
            found = ask(running[name], {"past": options.past, "steps": options.steps})
            told[name]["prefill_ms"].append(found["prefill_ms"])
            told[name]["step_ms"] += found["step_ms"]
            told[name]["peak_rss_mb"] = found["peak_rss_mb"]
        bandwidth.append(machine.read_bandwidth(options.threads))
    for process in running.values():
        process.terminate()
    ours = told.get("lvr-lite")
    card = machine.card(options.threads)
    data = {"machine": card, "bandwidth_gb_s": bandwidth, "past": options.past, "rivals": told}
    data["left_out"] = left_out
    (out / f"rivals-{options.past}.json").write_text(json.dumps(data, indent=1))
    titles = (
        "",
        "version",
        "a token, ms",
        "ours / theirs",
        "prefill, ms",
        "ours / theirs",
        "peak RSS, MiB",
        "computes in",
    )
    lines = [
        f"{card['cpu']}, {options.threads} of {card['cores']} cores, {card['memory_gib']:.0f} GiB, {card['os']}, Python {card['python']}, "
        f"{card['date']}, commit {card['commit']}; {options.rounds} rounds of {options.steps} tokens after {options.past}; "
        f"memory read at {np.median(bandwidth):.1f} GB/s ({min(bandwidth):.1f} to {max(bandwidth):.1f}):",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
    ]
    for name, row in told.items():
        step, prefill = float(np.median(row["step_ms"])), float(np.median(row["prefill_ms"]))
        ratios = (
            [float(np.median(ours[k])) / v for k, v in (("step_ms", step), ("prefill_ms", prefill))]
            if ours
            else [0.0, 0.0]
        )
        numbers = (
            f"{step:.1f}",
            f"{ratios[0]:.2f}",
            f"{prefill:.0f}",
            f"{ratios[1]:.2f}",
            f"{row['peak_rss_mb']:.0f}",
        )
        lines.append(f"| {' | '.join((name, str(row['version']), *numbers, row['computes']))} |")
    lines += ["", *(f"Left out: {name}, {why}" for name, why in left_out.items())]
    publish(lines, options.page, f"rivals.py --past {options.past}")


def publish(lines: list[str], page: Path | None, mark: str) -> None:
    """Print a table, and put it on the page between its marks, or at the end of a page without
    these.
    """
    from lvr_lite.files import write_atomically

    text = "\n".join(lines).strip()
    print(text)
    if page is None:
        return
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    old = page.read_text() if page.is_file() else ""
    head, _, rest = (
        old.partition(begin) if begin in old else (old.rstrip("\n") + "\n\n", "", end + "\n")
    )
    if end not in rest:
        raise SystemExit(f"{page}: {begin.strip()} has no {end} after it")
    write_atomically(page, head + begin + text + "\n" + end + rest.partition(end)[2])


def chosen(
    parser: argparse.ArgumentParser, options: argparse.Namespace, known: dict[str, tuple[str, Any]]
) -> list[str]:
    """The names in --only, or all in `known` (name -> its package, …) that are installed, but those
    in --without.
    """
    only, without = (
        (given or "").split("|") if given else [] for given in (options.only, options.without)
    )
    if unknown := [name for name in (*only, *without) if name not in known]:
        parser.error(f"{'|'.join(unknown)}: not known; choose from {'|'.join(known)}")
    makes_openvino = OPTIMUM.is_file() or (options.out / "openvino").is_dir()
    here = [
        n
        for n, (package, _) in known.items()
        if installed(package) and (makes_openvino or "optimum-intel" not in n)
    ]
    return [name for name in only or here if name not in without]


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
