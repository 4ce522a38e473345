"""The rivals: one text decoder under each runtime. Each imports its own packages when it is loaded,
so that the memory of its process is its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

# Tokens after a prompt that caches are made for.
ROOM = 128


class Rival(Protocol):
    """A text decoder with its head, loaded. `computes`: types of activations and K/V."""

    computes: str

    def prefill(self, ids: list[int]) -> None:
        """Begin anew with these tokens; the last position goes through the head."""

    def step(self, token: int, /) -> None:
        """One more token, and the logits after it."""


class LvrLite:
    computes = "int8 products of fp32 activations, K/V fp32"

    def __init__(self, out: Path, threads: int) -> None:
        from lvr_lite.generate.onnx import OnnxRuntime
        from lvr_lite.model.bundle import Bundle

        self.runtime = OnnxRuntime(Bundle.open(out / "lvr-lite"), threads)
        self.position = 0

    def prefill(self, ids: list[int]) -> None:
        length = len(ids)
        self.runtime.start(1, length + ROOM)
        embeds = self.runtime.embed(np.array([ids]))
        positions = np.array(np.broadcast_to(np.arange(length), (3, 1, length)), np.int64)
        self.runtime.head(self.runtime.prefill(embeds, positions, np.array([length])))
        self.position = length

    def step(self, token: int) -> None:
        embeds = self.runtime.embed(np.array([[token]]))[:, 0]
        self.runtime.head(self.runtime.step(embeds, np.array([self.position])))
        self.position += 1


class LvrLiteHead4(LvrLite):
    """With the head in 4 bits as well, as the others have it and as `mixed` may choose; `int4`
    keeps 8 there for what it answers.
    """

    def __init__(self, out: Path, threads: int) -> None:
        super().__init__(out, threads)
        from lvr_lite.generate.onnx import open_session

        self.runtime = self.runtime.with_graphs(head=open_session(out / "head4.onnx"))


class LvrLiteLatent(LvrLite):
    """A latent step: the last state goes in as it came out, and the head does not run."""

    def prefill(self, ids: list[int]) -> None:
        super().prefill(ids)
        zero = np.zeros((1, self.runtime.hidden_size), np.float32)
        self.state = self.runtime.step(zero, np.array([self.position]))

    def step(self, _token: int) -> None:
        self.position += 1
        self.state = self.runtime.step(self.state, np.array([self.position]))


class LlamaCpp:
    computes = "Q8_0 activations, K/V fp16"

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

    def prefill(self, ids: list[int]) -> None:
        self.llm.reset()
        self.llm.eval(ids)

    def step(self, token: int) -> None:
        self.llm.eval([token])


def openvino_config(threads: int) -> dict[str, str | int]:
    return {
        "INFERENCE_NUM_THREADS": threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128,
        "PERFORMANCE_HINT": "LATENCY",
    }


class OpenVino:
    """OpenVINO on the bundle's own graphs: its ONNX frontend turns MatMulNBits into compressed
    products and attention into its own.
    """

    computes = "8-bit dynamic activations, K/V fp32"

    def __init__(self, out: Path, threads: int) -> None:
        import openvino as ov

        from lvr_lite.model.bundle import Bundle

        self.sizes = Bundle.open(out / "lvr-lite", check=False).manifest.decoder
        core = ov.Core()
        self.graphs = {}
        for name in ("decoder", "lm_head"):
            graph = core.read_model(out / "lvr-lite" / "onnx" / f"{name}.onnx")
            compiled = core.compile_model(graph, "CPU", openvino_config(threads))
            self.graphs[name] = compiled.create_infer_request()
        outputs = self.graphs["decoder"].get_compiled_model().outputs
        self.names = [output.get_any_name() for output in outputs]
        self.cache: dict[str, np.ndarray] = {}
        self.position = 0

    def prefill(self, ids: list[int]) -> None:
        shape = (1, self.sizes.kv_heads, len(ids), self.sizes.head_dim)
        self._keep([np.zeros(shape, np.float32) for _ in self.names])
        self.position = 0
        self._run(len(ids))

    def step(self, _token: int) -> None:
        self._run(1)

    def _keep(self, values: list[np.ndarray]) -> None:
        """The outputs that are the next step's past."""
        self.cache = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(self.names, values, strict=True)
            if "present" in name
        }

    def _run(self, count: int) -> None:
        """Its frontend does not take GatherBlockQuantized, the embedding, which costs nothing here:
        `count` rows of one value stand for tokens.
        """
        total = self.position + count
        positions = np.broadcast_to(np.arange(self.position, total), (3, 1, count))
        feed = {
            "inputs_embeds": np.full((1, count, self.sizes.hidden_size), 0.01, np.float32),
            "position_ids": np.array(positions, np.int64),
            "seqlens_k": np.array([total - 1], np.int32),
            "total_sequence_length": np.array(total, np.int32),
        }
        results = self.graphs["decoder"].infer({**feed, **self.cache})
        values = [results[i] for i in range(len(self.names))]
        self._keep(values)
        hidden = values[self.names.index("last_hidden_state")]
        self.graphs["lm_head"].infer({"last_hidden_state": hidden[:, -1:]})
        self.position = total


class OpenVinoOwn:
    """What OpenVINO's own exporter makes of the shape: optimum-intel, int4 symmetric in groups of
    128, head and embedding in 8 bits.
    """

    def __init__(self, out: Path, threads: int) -> None:
        import openvino as ov

        model = out / "openvino" / "openvino_model.xml"
        compiled = ov.Core().compile_model(model, "CPU", openvino_config(threads))
        self.request = compiled.create_infer_request()
        products, cache = (
            str(compiled.get_property(name)).split("'")[1]
            for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        )
        self.computes = f"{products}, 8-bit dynamic activations, K/V {cache}"
        self.position = 0

    def prefill(self, ids: list[int]) -> None:
        self.request.reset_state()
        self.position = 0
        self._run(ids)

    def step(self, token: int) -> None:
        self._run([token])

    def _run(self, ids: list[int]) -> None:
        total = self.position + len(ids)
        self.request.infer(
            {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(self.position, total)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        self.position = total


class GenAI:
    computes = "int8 products of fp32 activations, K/V fp32"

    def __init__(self, out: Path, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(out / "genai"))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.og = og
        self.model = og.Model(config)

    def prefill(self, ids: list[int]) -> None:
        length = len(ids) + ROOM
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        self.generator = self.og.Generator(self.model, parameters)
        self.generator.append_tokens(np.array(ids, np.int32))
        self.generator.generate_next_token()

    def step(self, _token: int) -> None:
        self.generator.generate_next_token()


class Torch:
    """transformers' Qwen2 in bf16, or in bitsandbytes' NF4 with products in bf16, or in fp32, which
    CPUs without bf16 do faster.
    """

    def __init__(self, _out: Path, threads: int, nf4: bool) -> None:
        import torch
        from transformers import DynamicCache

        from lvr_lite.bench.experiments.rivals.builders import quantize_nf4, qwen2

        torch.set_num_threads(threads)
        self.torch = torch
        self.cache_type = DynamicCache
        slow = nf4 and not torch.cpu._is_avx512_bf16_supported()
        products = torch.float32 if slow else torch.bfloat16
        self.model = qwen2(products)
        self.computes = "bf16"
        if nf4:
            name = str(products).removeprefix("torch.")
            self.computes = f"{name}, weights NF4; head not quantized"
            quantize_nf4(self.model.model, products)
        self.model.eval().requires_grad_(False)

    def prefill(self, ids: list[int]) -> None:
        self.cache = self.cache_type(config=self.model.config)
        self._run(ids)

    def step(self, token: int) -> None:
        self._run([token])

    def _run(self, ids: list[int]) -> None:
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        with self.torch.inference_mode():
            self.model(self.torch.tensor([ids]), **options)


@dataclass(frozen=True)
class Entry:
    """package: that must be installed. load: a folder of models and the number of threads."""

    package: str
    load: Callable[[Path, int], Rival]


RIVALS = {
    "lvr-lite": Entry("onnxruntime", LvrLite),
    "lvr-lite, head in 4 bits": Entry("onnxruntime", LvrLiteHead4),
    "lvr-lite, latent step": Entry("onnxruntime", LvrLiteLatent),
    "llama.cpp Q4_0": Entry("llama-cpp-python", LlamaCpp),
    "onnxruntime-genai int4": Entry("onnxruntime-genai", GenAI),
    "OpenVINO int4 (optimum-intel)": Entry("openvino", OpenVinoOwn),
    "OpenVINO, the same graphs": Entry("openvino", OpenVino),
    "torch bf16": Entry("torch", partial(Torch, nf4=False)),
    "torch bitsandbytes NF4": Entry("bitsandbytes", partial(Torch, nf4=True)),
}
