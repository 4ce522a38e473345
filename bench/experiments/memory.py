"""Peak memory of training against what `finetune --plan` predicts, on random weights of real sizes;
nothing is downloaded.

.venv/bin/python docs/results/memory.py --out memory.json                    # a CUDA card: Qwen2.5-VL-3B's and Qwen2-VL-2B's sizes
.venv/bin/python docs/results/memory.py --shape tiny --device cpu            # the same code on a CPU, tensors counted as they are made
.venv/bin/python docs/results/memory.py --shape 3b --layers 2 --device cpu   # real widths, few layers

.venv/bin/python docs/results/memory.py --predict                            # what it will be held against

Measured are training steps through the collator, LatentSFT and the optimizer of the settings, and
answering 16 held-out questions.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import re
import time
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lvr_lite.config import Settings, load_settings
from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item
from lvr_lite.eval.suite import accuracy_on
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.train import load as nf4
from lvr_lite.train import memory as plan
from lvr_lite.train.batches import Collator
from lvr_lite.train.finetune import adapted
from lvr_lite.train.sft import LatentSFT

ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
CONFIGS: dict[str, dict[str, Any]] = {  # as published in the models' config.json
    "3b": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "rope_parameters": ROPE, "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "tie_word_embeddings": True,
    },
    # a quarter of the 3B's widths and vocabulary, for CPUs: there too the embedding outweighs a
    # layer
    "quarter": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 512, "intermediate_size": 2752, "num_hidden_layers": 2, "num_attention_heads": 8,
            "num_key_value_heads": 1, "vocab_size": 37984, "tie_word_embeddings": True,
            "bos_token_id": None, "eos_token_id": None, "rope_parameters": ROPE | {"mrope_section": [8, 12, 12]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 320, "intermediate_size": 856, "num_heads": 4, "out_hidden_size": 512,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1],
        },
        "tie_word_embeddings": True,
    },
    "2b": {
        "model_type": "qwen2_vl",
        "text_config": {
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "vocab_size": 151936, "rope_parameters": ROPE, "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2,
        },
        "tie_word_embeddings": True,
    },
}  # fmt: skip
ARCHITECTURES = {"qwen2_5_vl": "Qwen2_5_VL", "qwen2_vl": "Qwen2VL"}
SIDES = {
    64: (8, 8),
    256: (16, 16),
    512: (16, 32),
    1024: (32, 32),
    2048: (32, 64),
}  # visual tokens -> rows, columns


def config_of(shape: str, layers: int | None) -> dict[str, Any]:
    config: dict[str, Any] = (
        read_checkpoint("tiny").config
        if shape == "tiny"
        else json.loads(json.dumps(CONFIGS[shape]))
    )
    if layers is not None:
        config["text_config"] |= {
            "num_hidden_layers": layers,
            "layer_types": ["full_attention"] * layers,
        }
        config["vision_config"] |= {"depth": layers, "fullatt_block_indexes": [layers - 1]}
    return config


def build(config: dict[str, Any], checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Any:
    """A model of these sizes with random weights: linears of the text layers in NF4, one at a time,
    so that the whole never is in bf16.
    """
    import bitsandbytes as bnb
    import transformers
    from accelerate import init_empty_weights

    name = ARCHITECTURES[config["model_type"]]
    made = getattr(transformers, f"{name}Config")(
        **{k: v for k, v in config.items() if k != "model_type"}
    )
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, f"{name}ForConditionalGeneration")(made)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and re.fullmatch(
            checkpoint.family.LORA_TARGETS, path
        ):
            out, into = module.out_features, module.in_features
            quantized = bnb.nn.Linear4bit(
                into, out, module.bias is not None, dtype, True, "nf4", device="meta"
            )
            weight = 0.02 * torch.randn(out, into, dtype=dtype, device=device)
            quantized.weight = bnb.nn.Params4bit(
                weight.cpu(), False, compress_statistics=True, quant_type="nf4", module=quantized
            ).to(device)
            model.set_submodule(path, quantized)
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, last = path.rpartition(".")
            start = torch.ones if "norm" in path or "ln_q" in path else torch.randn
            value = start(parameter.shape, dtype=dtype, device=device) * (
                1.0 if start is torch.ones else 0.02
            )
            setattr(
                model.get_submodule(parent), last, torch.nn.Parameter(value, requires_grad=False)
            )
    if config["tie_word_embeddings"]:
        model.lm_head.weight = model.get_input_embeddings().weight
    model.to(device)
    model.is_loaded_in_4bit = True
    nf4.check_quantized(model, checkpoint)
    return model


def items_of(visual: int, count: int) -> list[Item]:
    """Questions about pictures of exactly so many visual tokens; they differ in length, as real
    ones do, so that batches are padded, and in their pictures, since rows that read the same are
    read once.
    """
    rows, columns = SIDES[visual]
    noise = np.random.default_rng(0).integers(0, 255, (count, 28 * rows, 28 * columns, 3), np.uint8)
    questions = ["what colour is the star " * 10 + "left " * (i % 2) for i in range(count)]
    return [
        (
            Sample(str(i), (Path("none"),), q, "red and blue", boxes=((0.2, 0.2, 0.6, 0.6),)),
            (Image.fromarray(noise[i]),),
        )
        for i, q in enumerate(questions)
    ]


class LiveBytes(TorchDispatchMode):
    """Bytes of live tensors that were made under it, and their peak: what
    torch.cuda.max_memory_allocated counts, without a card.

    Not seen: memory that a kernel takes and gives back inside itself.
    """

    def __init__(self, before: list[torch.Tensor]) -> None:
        """before: tensors that are there already, which are counted once, from the start."""
        super().__init__()
        self.known = WeakIdKeyDictionary(
            {tensor.untyped_storage(): tensor.untyped_storage().nbytes() for tensor in before}
        )
        self.peak = self.now = sum(self.known.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, torch.Tensor)
                and not tensor.is_meta
                and (storage := tensor.untyped_storage()) not in self.known
            ):
                size = -(-storage.nbytes() // 512) * 512
                self.known[storage] = size
                weakref.finalize(storage, self._gone, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


class Saved:
    """Bytes that autograd holds between forward and backward, each storage once, parameters
    apart.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.own = {
            t.untyped_storage().data_ptr()
            for t in itertools.chain(module.parameters(), module.buffers())
        }
        self.held: weakref.WeakSet[Any] = weakref.WeakSet()

    def hooks(self) -> Any:
        class Held:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor

        def pack(tensor: torch.Tensor) -> Held:
            held = Held(tensor.detach())  # with its graph it would keep itself alive
            self.held.add(held)
            return held

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor)

    def bytes(self) -> int:
        storages = {
            h.tensor.untyped_storage().data_ptr(): h.tensor.untyped_storage().nbytes()
            for h in self.held
        }
        return sum(n for at, n in storages.items() if at not in self.own)


@contextlib.contextmanager
def as_on_a_card(device: str, dtype: torch.dtype) -> Iterator[None]:
    """PEFT asks for the card's autocast switch, also where checkpointing runs a layer again: it is
    on while a CPU stands in for a card.
    """
    before = torch.is_autocast_enabled("cuda")
    if device == "cpu":
        torch.set_autocast_enabled("cuda", dtype == torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def optimizer_of(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    if "8bit" in name or name.startswith("paged"):
        made: torch.optim.Optimizer = bnb.optim.AdamW(
            parameters,
            lr=1e-4,
            optim_bits=8 if "8bit" in name else 32,
            is_paged=name.startswith("paged"),
        )
        return made
    return (
        torch.optim.SGD(parameters, lr=1e-4)
        if name == "sgd"
        else torch.optim.AdamW(parameters, lr=1e-4, fused=name.endswith("fused"))
    )


def tokens_of(batch: dict[str, Any], checkpoint: Checkpoint, settings: Settings) -> plan.Tokens:
    """What the plan is told about a batch: its longest row."""
    (rows,) = [batch] if "ids" in batch else batch["direct"]
    visual = int((rows["ids"][0] == checkpoint.tokens.image).sum())
    k = plan.latents(settings, plan.Tokens(visual))
    text = int(rows["response"]) - visual
    return plan.Tokens(visual, text, rows["ids"].shape[1] - visual - text - (k + 2 if k else 0))


def copied(batch: Any, device: str) -> Any:
    """A batch's tensors as new ones on the device."""
    if isinstance(batch, dict):
        return {k: copied(v, device) for k, v in batch.items()}
    return (
        [copied(v, device) for v in batch]
        if isinstance(batch, list)
        else batch.to(device, copy=True)
    )


def measure_training(
    model: Any,
    checkpoint: Checkpoint,
    settings: Settings,
    visual: int,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Any]:
    """Three steps: peak bytes, on CPUs also what autograd saved, and the seconds of a step."""
    core = model.get_base_model()
    core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in core.modules():
        if hasattr(
            module, "gradient_checkpointing"
        ):  # what switches it off has another name in each transformers
            module.gradient_checkpointing = settings.train.gradient_checkpointing
    batch = Collator(checkpoint, settings.latent)(items_of(visual, settings.train.batch))
    tokens = tokens_of(batch, checkpoint, settings)
    shape = plan.shape_of(checkpoint.config)
    predicted = plan.phase_bytes(shape, settings, tokens)
    del predicted["answering held-out questions"]
    stays = sum(plan.standing_bytes(shape, settings).values()) + (
        unpaged(shape, settings) if device == "cpu" else plan.WORKSPACE
    )
    sft = LatentSFT(model, checkpoint.tokens, settings.latent).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(settings.train.optimizer, trained)
    meter, saved, seconds = Meter(model, device), Saved(sft), []
    with meter:
        for _ in range(3 if device == "cuda" else 2):
            started = time.perf_counter()
            there = copied(batch, device)
            with as_on_a_card(device, dtype):
                counted = saved.hooks() if device == "cpu" else contextlib.nullcontext()
                with (
                    counted,
                    torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16),
                ):
                    loss = sft(**there)["loss"]
                kept = saved.bytes() if device == "cpu" else 0
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del loss, there
            meter.wait()
            seconds.append(time.perf_counter() - started)
    found = {
        "seconds": min(seconds),
        "peak": meter.peak,
        "predicted": stays + max(predicted.values()),
        "phase": max(predicted, key=predicted.__getitem__),
    }
    if device == "cpu":
        saved_predicted = plan.saved_bytes(shape, settings, tokens)
        found |= {
            "saved": kept,
            "saved_predicted": saved_predicted,
            "saved_ratio": saved_predicted / kept,
        }
    return found | {"reserved": meter.reserved, "context": meter.context}


def unpaged(shape: plan.Shape, settings: Settings) -> int:
    """Optimizer states that a card would page; on a CPU they lie with the others."""
    return plan.optimizer_bytes(settings.train.optimizer, plan.trained(shape, settings.lora.rank))[
        1
    ]


def measure_answering(
    model: Any, checkpoint: Checkpoint, settings: Settings, visual: int, device: str
) -> dict[str, Any]:
    """Peak bytes of answering held-out questions, as evaluation during training does."""
    runtime = TorchRuntime(model.eval(), checkpoint)
    meter, started = Meter(model, device), time.perf_counter()
    with meter:
        accuracy_on(runtime, items_of(visual, plan.EVAL_ROWS))
    shape = plan.shape_of(checkpoint.config)
    stays = plan.standing_bytes(shape, settings)
    del stays["optimizer"]  # there is none here
    predicted = (
        sum(stays.values())
        + plan.phase_bytes(shape, settings, plan.Tokens(visual))["answering held-out questions"]
    )
    predicted += plan.WORKSPACE if device == "cuda" else 0
    return {"seconds": time.perf_counter() - started, "peak": meter.peak, "predicted": predicted, "phase": "answering"} | {
        "reserved": meter.reserved, "context": meter.context,
    }  # fmt: skip


class Meter:
    """Peak bytes of tensors while it is entered, the model's own included."""

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        self.device, self.peak, self.reserved, self.context = device, 0, 0, 0
        self.live = LiveBytes(model_tensors(model) if device == "cpu" else [])

    def __enter__(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.live.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.device == "cuda":
            self.peak, self.reserved = (
                torch.cuda.max_memory_allocated(),
                torch.cuda.max_memory_reserved(),
            )
            free, total = torch.cuda.mem_get_info()
            self.context = (
                total - free - torch.cuda.memory_reserved()
            )  # other processes on the card count too
        else:
            self.live.__exit__(*error)
            self.peak = self.live.peak

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def model_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers and the state of 4-bit weights."""
    import bitsandbytes as bnb

    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors += [
                state.absmax,
                state.code,
                state.offset,
                state.state2.absmax,
                state.state2.code,
            ]
    return tensors


COLUMNS: dict[str, tuple[str, str, float]] = {  # title -> key of a row, its format, its unit
    "shape": ("shape", "", 1),
    "method": ("method", "", 1),
    "visual tokens": ("visual", "", 1),
    "batch": ("batch", "", 1),
    "checkpointing": ("checkpointing", "", 1),
    "s/step": ("seconds", ".2f", 1),
    "measured MiB": ("peak", ",.1f", plan.MIB),
    "predicted MiB": ("predicted", ",.1f", plan.MIB),
    "at": ("phase", "", 1),
    "ratio": ("ratio", ".3f", 1),
    "saved MiB": ("saved", ",.2f", plan.MIB),
    "predicted saved MiB": ("saved_predicted", ",.2f", plan.MIB),
    "saved, ratio": ("saved_ratio", ".3f", 1),
}


def line(row: dict[str, Any], titles: list[str]) -> str:
    """A row of the table; what was not measured is left empty."""
    cells = []
    for key, how, unit in (COLUMNS[title] for title in titles):
        value = row.get(key, "")
        cells.append(format(value / unit, how) if how and value != "" else str(value))
    return f"| {' | '.join(cells)} |"


def settings_of(a: argparse.Namespace, *overrides: str) -> Settings:
    return load_settings(
        None, [f"train.precision={a.precision}", "train.accumulation=1", *a.overrides, *overrides]
    )


def wanted(a: argparse.Namespace) -> Iterator[tuple[Settings, dict[str, Any]]]:
    """The settings to measure, each with the first cells of its row; last of all the answering of
    held-out questions.
    """
    for method, visual, batch, on in itertools.product(a.method, a.visual, a.batch, ("on", "off")):
        chosen = settings_of(
            a,
            f"latent.method={method}",
            f"train.batch={batch}",
            f"train.gradient_checkpointing={on}",
        )
        yield chosen, {"method": method, "visual": visual, "batch": batch, "checkpointing": on}
    if a.answering or a.device == "cuda":
        for visual in a.visual:
            yield (
                settings_of(a),
                {
                    "method": "answering",
                    "visual": visual,
                    "batch": plan.EVAL_ROWS,
                    "checkpointing": "",
                },
            )


def measure(name: str, a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one shape."""
    tiny, config = read_checkpoint("tiny"), config_of(name, a.layers)
    checkpoint = replace(
        tiny, config=config, image_spec=tiny.image_spec | {"max_pixels": 28 * 28 * max(SIDES)}
    )
    dtype = torch.bfloat16 if a.precision == "bf16" else torch.float32
    model = adapted(build(config, checkpoint, dtype, a.device), checkpoint, settings_of(a))
    for settings, row in wanted(a):
        row["shape"] = name
        try:
            if row["method"] == "answering":
                row |= measure_answering(model, checkpoint, settings, row["visual"], a.device)
            else:
                row |= measure_training(model, checkpoint, settings, row["visual"], dtype, a.device)
            row["ratio"] = row["predicted"] / row["peak"]
        except torch.cuda.OutOfMemoryError:
            row["phase"] = "out of memory"
        yield row


def predict(name: str, a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same rows, planned and not measured, for the plan's own number of text tokens."""
    shape = plan.shape_of(config_of(name, a.layers))
    for settings, row in wanted(a):
        made = plan.phase_bytes(shape, settings, plan.Tokens(row["visual"]))
        stays, answering = (
            sum(plan.standing_bytes(shape, settings).values()) + plan.WORKSPACE,
            made.pop("answering held-out questions"),
        )
        if row["method"] == "answering":
            row |= {"shape": name, "predicted": stays + answering, "phase": "answering"}
        else:
            phase = max(made, key=made.__getitem__)
            row |= {"shape": name, "predicted": stays + made[phase], "phase": phase}
            row["saved_predicted"] = plan.saved_bytes(shape, settings, plan.Tokens(row["visual"]))
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["3b", "2b"], choices=[*CONFIGS, "tiny"])
    parser.add_argument("--layers", type=int, help="fewer layers in both towers than the model has")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--visual", type=int, nargs="+", default=[256, 512, 1024], choices=SIDES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--method", nargs="+", default=["lvr", "lvr-bottleneck"])
    parser.add_argument(
        "--answering", action="store_true", help="also 16 held-out questions (always on a card)"
    )
    parser.add_argument(
        "--set", dest="overrides", nargs="+", default=[], help="settings, as of `finetune`"
    )
    parser.add_argument(
        "--predict", action="store_true", help="predictions alone: nothing is built or measured"
    )
    parser.add_argument("--out", type=Path, help="JSON to write")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = (
        "CPU (live tensors counted)"
        if a.device == "cpu"
        else "predictions"
        if a.predict
        else torch.cuda.get_device_name()
    )
    left_out = (
        {"s/step", "measured MiB", "ratio", "saved MiB", "saved, ratio"} if a.predict else set()
    )
    left_out |= (
        {"saved MiB", "predicted saved MiB", "saved, ratio"}
        if a.device == "cuda" and not a.predict
        else set()
    )
    titles = [title for title in COLUMNS if title not in left_out]
    print(
        f"{device}; torch {torch.__version__}; {a.precision}\n\n| {' | '.join(titles)} |\n{'|---' * len(titles)}|"
    )
    rows = []
    for row in itertools.chain.from_iterable(
        (predict if a.predict else measure)(name, a) for name in a.shape
    ):
        rows.append(row)
        print(line(row, titles), flush=True)
    if a.out is not None:
        a.out.write_text(
            json.dumps(
                {"device": device, "torch": torch.__version__, "layers": a.layers, "rows": rows},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
