"""The trace of training against the same step really done on a CPU; every family and method on the
simulated card; a wrong device, planted anywhere, is noticed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lvr_lite.bench.experiments import memory as measuring
from lvr_lite.bench.experiments.memory_model import config_of
from lvr_lite.config import load_settings
from lvr_lite.export.synthetic import shape_of
from lvr_lite.generate import torch as torch_runtime
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.spec import LatentSpec
from lvr_lite.train import memory, methods, policy, sft
from lvr_lite.train.memory import GIB, trace_finetune, trace_grpo
from lvr_lite.train.memory_plan import shallow
from lvr_lite.train.simulated import WrongDeviceError

METHODS = ("sft", "dummy", "lvr", "lvr-free", "lvr-bottleneck")
# Two layers of each: what differs between families is there, and the widths are real.
FAMILIES = ("qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-2b", "smolvlm-256m", "smolvlm-500m")
SMALL = ("max_pixels=50176", "data.eval_count=2")


# --------------------------------------------------------------------------------------------------
# the trace, and the same step on a CPU


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("method", METHODS)
def test_the_trace_of_a_step_is_what_a_cpu_counts(method: str, checkpointing: str) -> None:
    settings = load_settings(
        None,
        [
            "train.precision=fp32",
            "train.accumulation=1",
            "max_pixels=50176",
            f"latent.method={method}",
            f"train.gradient_checkpointing={checkpointing}",
        ],
    )
    traced, counted = measuring.measure("tiny", settings, "cpu").peaks
    assert traced == pytest.approx(counted, rel=0.03)


def test_the_measuring_script_writes_rows_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measuring.main(
        shape="tiny",
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
    assert all(row["measured"]["backward"] > 0 for row in rows)
    assert capsys.readouterr().out.count("| tiny | lvr | 64 | 1 |") == 2


# --------------------------------------------------------------------------------------------------
# families, methods and stages on the card


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_answers_and_is_reinforced_on_the_card(name: str) -> None:
    checkpoint = shallow(shape_of(name), 3)
    settings = load_settings(None, ["latent.method=lvr-bottleneck", *SMALL])
    first = trace_finetune(checkpoint, settings)
    assert set(first.phases) == {"loading", "optimizer", "forward", "backward", "evaluation"}
    tuned = replace(checkpoint, latent=LatentSpec(2, mode="bottleneck"))
    second = trace_grpo(tuned, load_settings(None, ["grpo.group=2", "grpo.rows=2", *SMALL]))
    assert {"rollout", "scoring", "backward", "optimizer"} <= set(second.phases)
    for trace in (first, second):
        assert all(size > 0 for size in trace.phases.values())
        assert max(trace.phases.values()) > sum(trace.stays.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_steps_with_checkpointing_and_without(method: str) -> None:
    checkpoint = shallow(shape_of("qwen2.5-vl-3b"), 3)
    peaks = []
    for on in ("true", "false"):
        overrides = [f"latent.method={method}", f"train.gradient_checkpointing={on}", *SMALL]
        peaks.append(trace_finetune(checkpoint, load_settings(None, overrides)).saved)
    kept, everything = peaks
    assert kept < 0.7 * everything


@pytest.mark.parametrize(("name", "millions"), [("qwen2.5-vl-3b", 3755), ("qwen2-vl-2b", 2209)])
def test_what_is_placed_has_the_parameters_and_bytes_of_the_model(name: str, millions: int) -> None:
    """1,024 visual tokens of the 3B with the bottleneck: at most 4.6 GiB (issue 24)."""
    settings = load_settings(None, ["latent.method=lvr-bottleneck", "max_pixels=802816"])
    trace = trace_finetune(shape_of(name), replace(settings))
    own = dict(trace.parameters)
    del own["trained"]
    assert round(sum(own.values()) / 1e6) == millions
    training = max(trace.phases[phase] for phase in ("forward", "backward", "optimizer"))
    assert training < 4.6 * GIB


def test_sizes_are_those_of_the_model_in_transformers() -> None:
    config = config_of("3b", None)
    sizes = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(**sizes)
        )
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 3755


# --------------------------------------------------------------------------------------------------
# wrong devices


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return shallow(read_checkpoint("tiny"), 2)


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def plant_in_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        memory,
        "_weight",
        lambda like, dtype, _: torch.nn.Parameter(torch.zeros(like.shape, dtype=dtype), False),
    )


def plant_in_collating(monkeypatch: pytest.MonkeyPatch) -> None:
    move = memory.on_device

    def moved(batch: Any, device: torch.device) -> Any:
        there = move(batch, device)
        if isinstance(there, dict):
            there["positions"] = on_cpu(there["positions"])
        return there

    monkeypatch.setattr(memory, "on_device", moved)


def plant_in_stepping(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sft.mean_over_samples
    monkeypatch.setattr(
        sft, "mean_over_samples", lambda losses, samples: real(on_cpu(losses), samples)
    )


def plant_in_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch_runtime.TorchRuntime._to_model
    monkeypatch.setattr(
        torch_runtime.TorchRuntime, "_to_model", lambda self, array: on_cpu(real(self, array))
    )


@pytest.mark.parametrize(
    "plant", [plant_in_loading, plant_in_collating, plant_in_stepping, plant_in_decoding]
)
def test_a_wrong_device_is_noticed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, plant: Any
) -> None:
    settings = load_settings(None, ["latent.method=lvr", *SMALL])
    trace_finetune(checkpoint, settings)
    plant(monkeypatch)
    with pytest.raises((WrongDeviceError, RuntimeError), match=r"device|cpu"):
        trace_finetune(checkpoint, settings)


def test_a_wrong_device_in_scoring_answers_is_noticed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = replace(checkpoint, latent=LatentSpec(2))
    settings = load_settings(None, ["grpo.group=2", "grpo.rows=2", *SMALL])
    trace_grpo(tuned, settings)
    real = methods.as_wide
    monkeypatch.setattr(policy, "as_wide", lambda vectors, like: real(on_cpu(vectors), like))
    with pytest.raises((WrongDeviceError, RuntimeError), match=r"device|cpu"):
        trace_grpo(tuned, settings)
