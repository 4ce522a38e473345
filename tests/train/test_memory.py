"""The memory formulas against what they count: built models, tensors that autograd saves, and live
tensors at the peak.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers

from lvr_lite.bench.experiments import memory as measuring
from lvr_lite.bench.experiments import memory_model
from lvr_lite.bench.experiments.live_bytes import Saved, model_tensors
from lvr_lite.config import Settings, load_settings
from lvr_lite.errors import BundleError
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Prompt, Result
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.spec import LatentSpec
from lvr_lite.train import memory
from lvr_lite.train.load import adapted, load_nf4
from lvr_lite.train.policy import Policy, Reading, batches_of, readings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CHECKPOINTING = pytest.mark.parametrize("checkpointing", ["true", "false"])


def settings(*overrides: str) -> Settings:
    return load_settings(None, ["train.precision=fp32", "train.accumulation=1", *overrides])


# --------------------------------------------------------------------------------------------------
# sizes of models


def part_of(name: str) -> str:
    """The part that a parameter belongs to, as the plan has them."""
    for part, module in (("vision", "visual"), ("embedding", "embed_tokens"), ("head", "lm_head")):
        if module in name:
            return part
    return "linears" if name.endswith("_proj.weight") else "norms"


def counted(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of a built model by part; a tied head is the embedding, and counts once."""
    parts = Counter(linears=0, embedding=0, head=0, norms=0, vision=0)
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    return dict(parts)


def test_parameters_are_those_of_a_built_model(
    small_model: PreTrainedModel, small_checkpoint: Path
) -> None:
    shape = memory.shape_of(read_checkpoint(small_checkpoint).config)
    assert memory.parameters(shape) == counted(small_model)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 8), ("3b", 3755), ("2b", 2209)])
def test_parameters_are_those_of_the_model_in_transformers(name: str, millions: int) -> None:
    config = memory_model.config_of(name, None)
    family = memory_model.ARCHITECTURES[config["model_type"]]
    sizes = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        architecture = getattr(transformers, f"{family}ForConditionalGeneration")
        model = architecture(getattr(transformers, f"{family}Config")(**sizes))
    parts = memory.parameters(memory.shape_of(config))
    assert parts == counted(model)
    assert round(sum(parts.values()) / 1e6) == millions


def test_text_sizes_may_stand_at_the_top_of_a_config() -> None:
    nested = memory_model.config_of("3b", None)
    flat = nested["text_config"] | {k: v for k, v in nested.items() if k != "text_config"}
    assert memory.shape_of(flat) == memory.shape_of(nested)


def test_a_head_of_its_own_counts() -> None:
    shape = memory.shape_of(memory_model.config_of("3b", None))
    assert memory.parameters(replace(shape, tied=False))["head"] == 151936 * 2048
    assert memory.parameters(shape)["head"] == 0


def test_a_family_that_is_not_counted_is_refused_and_not_guessed() -> None:
    with pytest.raises(
        BundleError, match="--plan counts qwen2_5_vl and qwen2_vl so far, not smolvlm"
    ):
        memory.shape_of({"model_type": "smolvlm", "text_config": {}, "vision_config": {}})


@pytest.mark.parametrize(
    "missing", ["vision_config", "text_config.hidden_size", "vision_config.depth"]
)
def test_a_config_that_lacks_a_size_is_refused_by_the_key(missing: str) -> None:
    config = memory_model.config_of("3b", None)
    section, _, key = missing.rpartition(".")
    del (config[section] if section else config)[key]
    with pytest.raises(BundleError, match=rf"config\.json: '{key}' is missing"):
        memory.shape_of(config)


# --------------------------------------------------------------------------------------------------
# what stays


@pytest.mark.parametrize(("out", "into"), [(64, 64), (96, 257), (704, 512)])
def test_bytes_of_a_4_bit_linear_are_those_of_bitsandbytes(out: int, into: int) -> None:
    weight = bitsandbytes.nn.Params4bit(
        torch.randn(out, into), False, compress_statistics=True, quant_type="nf4"
    ).to("cpu")
    state = weight.quant_state
    scales = state.state2
    tensors = [weight.data, state.absmax, state.code, state.offset, scales.absmax, scales.code]
    assert memory.nf4_bytes(out, into) == sum(tensor.nbytes for tensor in tensors)


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint: Path) -> Checkpoint:
    read = read_checkpoint(small_checkpoint)
    return replace(read, processor=read.processor.with_max_pixels(28 * 28 * 256))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> PeftModel:
    base = load_nf4(checkpoint, torch.float32)
    tuned: PeftModel = adapted(base, checkpoint, settings("train.gradient_checkpointing=false"))
    return tuned


@pytest.fixture(scope="module")
def shape(checkpoint: Checkpoint) -> memory.Shape:
    return memory.shape_of(checkpoint.config)


def test_trained_tensors_are_those_of_the_adapted_model(
    model: PeftModel, shape: memory.Shape
) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in trained]
    assert sorted(memory.trained(shape, rank=16)) == sorted(sizes)
    assert {parameter.dtype for parameter in trained} == {torch.float32}


def test_what_stays_is_what_a_loaded_model_holds(model: PeftModel, shape: memory.Shape) -> None:
    storages = (tensor.untyped_storage() for tensor in model_tensors(model))
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    stays = memory.standing_bytes(shape, settings())
    del stays["optimizer"]
    assert sum(stays.values()) == pytest.approx(sum(sizes.values()), rel=0.01)


@pytest.mark.parametrize(
    "name", ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch", "sgd"]
)
def test_optimizer_states_are_those_of_the_optimizer(name: str) -> None:
    sizes = [64, 4095, 4096, 5000, 110_000]
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    optimizer = memory_model.make_optimizer(name, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    size = 0
    for state in optimizer.state.values():
        for key, value in state.items():
            # All tensors share one code book ("qmap").
            if isinstance(value, torch.Tensor) and value.dim() and "qmap" not in key:
                size += value.nbytes
    stay, paged = memory.optimizer_bytes(name, sizes)
    assert stay + paged == size
    assert (paged > 0) == name.startswith("paged")


# --------------------------------------------------------------------------------------------------
# what a step makes


def assert_as_planned(measured: measuring.Measured) -> None:
    assert measured.saved_predicted == pytest.approx(measured.saved, rel=0.1)
    assert measured.predicted == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize("visual", [64, 256])
@CHECKPOINTING
@pytest.mark.parametrize(("method", "batch"), [("lvr", 1), ("sft", 2)])
def test_saved_activations_and_peak_are_as_planned(
    model: PeftModel,
    checkpoint: Checkpoint,
    method: str,
    batch: int,
    checkpointing: str,
    visual: int,
) -> None:
    chosen = settings(
        f"latent.method={method}",
        f"train.batch={batch}",
        f"train.gradient_checkpointing={checkpointing}",
    )
    assert_as_planned(
        measuring.measure_training(model, checkpoint, chosen, visual, torch.float32, "cpu")
    )


@CHECKPOINTING
@pytest.mark.parametrize("method", ["lvr-free", "lvr-bottleneck"])
def test_so_they_are_where_latents_run_freely(
    model: PeftModel, checkpoint: Checkpoint, method: str, checkpointing: str
) -> None:
    chosen = settings(f"latent.method={method}", f"train.gradient_checkpointing={checkpointing}")
    assert_as_planned(
        measuring.measure_training(model, checkpoint, chosen, 64, torch.float32, "cpu")
    )


def test_so_they_are_in_bf16_under_autocast_with_the_contrastive_loss(
    checkpoint: Checkpoint,
) -> None:
    chosen = settings(
        "train.precision=auto", "train.gradient_checkpointing=false", "latent.loss=contrastive"
    )
    tuned = adapted(load_nf4(checkpoint, torch.bfloat16), checkpoint, chosen)
    assert_as_planned(
        measuring.measure_training(tuned, checkpoint, chosen, 64, torch.bfloat16, "cpu")
    )


def equally_long_prompts(runtime: TorchRuntime, visual: int, count: int) -> list[Prompt]:
    prompts = [
        prepare_prompt(runtime, pictures, sample.question)[0]
        for sample, pictures in measuring.items_of(visual, count)
    ]
    length = len(prompts[0].ids)
    return [replace(p, ids=p.ids[:length], positions=p.positions[:, :length]) for p in prompts]


def drawn(
    prompts: list[Prompt], checkpoint: Checkpoint, spec: LatentSpec, answer: int
) -> list[list[Reading]]:
    """Readings of answers that begin with latents, no two alike: those would be read once."""
    tokens = checkpoint.processor.tokens
    hidden_size = checkpoint.config["text_config"]["hidden_size"]
    answers = []
    for number, prompt in enumerate(prompts):
        latents = [np.full(hidden_size, 0.1 + number, np.float32)] * spec.steps
        result = Result(choices=[tokens.lvr_start, *[5] * (answer + 1)], latents=latents)
        answers.append(readings(prompt, result, tokens, spec.mode))
    return answers


@CHECKPOINTING
@pytest.mark.parametrize("mode", ["open", "bottleneck"])
@pytest.mark.parametrize("latents", ["recorded", "recomputed"])
def test_so_is_a_replay_of_stage_2(
    model: PeftModel,
    checkpoint: Checkpoint,
    shape: memory.Shape,
    mode: str,
    checkpointing: str,
    latents: str,
) -> None:
    rows = 3
    visual = 64
    answer = 12
    chosen = settings(
        f"grpo.rows={rows}",
        f"grpo.max_tokens={answer}",
        f"grpo.latents={latents}",
        f"train.gradient_checkpointing={checkpointing}",
    )
    spec = LatentSpec(4, mode=mode)
    measuring.set_checkpointing(model, checkpointing == "true")
    prompts = equally_long_prompts(TorchRuntime(model.eval(), checkpoint), visual, rows)
    policy = Policy(model, checkpoint.processor.tokens, spec, 1.0, latents).train()
    batches = batches_of(drawn(prompts, checkpoint, spec, answer))
    saved = Saved(policy)
    with saved.hooks():
        # Autograd keeps what it saved as long as its result is there.
        scores = policy(batches)
    tokens = memory.Tokens(visual, len(prompts[0].ids) - visual, answer)
    planned = memory.saved_bytes(shape, memory.stage2(chosen, spec), tokens)
    assert planned == pytest.approx(saved.bytes(), rel=0.15)
    del scores


def test_so_is_the_answering_of_held_out_questions(
    model: PeftModel, checkpoint: Checkpoint
) -> None:
    measured = measuring.measure_answering(model, checkpoint, settings(), 64, "cpu")
    assert measured.predicted == pytest.approx(measured.peak, rel=0.1)


def test_the_measure_is_not_a_copy_of_the_formula(
    model: PeftModel, checkpoint: Checkpoint, shape: memory.Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that is planned without its MLP is noticed."""
    layer_bytes = memory.layer_bytes
    without = replace(shape, intermediate=0)
    monkeypatch.setattr(memory, "layer_bytes", lambda _, s, one: layer_bytes(without, s, one))
    chosen = settings("train.gradient_checkpointing=false")
    measured = measuring.measure_training(model, checkpoint, chosen, 64, torch.float32, "cpu")
    assert measured.saved is not None
    assert measured.saved_predicted is not None
    assert measured.saved_predicted < 0.9 * measured.saved


def test_the_measuring_script_writes_rows_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measuring.main(
        shape="tiny",
        layers=1,
        device="cpu",
        precision="fp32",
        visual="64",
        batch="1",
        method="lvr",
        out=tmp_path / "m.json",
    )
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [(row["checkpointing"], row["method"]) for row in rows] == [
        ("on", "lvr"),
        ("off", "lvr"),
    ]
    assert all(0.9 < row["ratio"] < 1.1 for row in rows)
    assert capsys.readouterr().out.count("| tiny | lvr | 64 | 1 |") == 2
