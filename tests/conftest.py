"""Small random models and bundles that many tests share; nothing here or in any test reaches the
network.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests start processes of their own
if (_worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    _cores = sorted(
        os.sched_getaffinity(0)
    )  # a core each, before any library counts them: threads of several workers would spin in turns
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})

import hashlib
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lvr_lite.files import write_atomically
from tests.command_line import Call, Done
from tests.short_run import SHORT_RUN

if TYPE_CHECKING:
    from lvr_lite.export.graphs.spec import GraphSpec

LATENT_STEPS = 3  # of the small bundles


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first: one process goes through it, the others meanwhile
    through the rest.
    """
    items.sort(key=lambda item: item.path.name != "test_published.py")


def everything_about(spec: GraphSpec, codes: Mapping[int, str]) -> str:
    """All that tracing depends on; of the example arguments their shapes alone."""
    import torch
    from torch.utils import _pytree

    shapes = _pytree.tree_map_only(torch.Tensor, lambda t: (t.dtype, t.shape), spec.arguments)
    configs = [m.config for m in spec.module.modules() if hasattr(m, "config")]
    buffers = [value.tolist() for value in spec.module.buffers()]
    rows = {name: value.tolist() for name, value in spec.rows.items()}
    ends = (spec.inputs, spec.outputs, spec.varying)
    return repr((spec.module, shapes, configs, buffers, rows, ends, sorted(codes.items())))


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C as in a terminal: a shell that runs the tests in the background switches it off."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def card_is_known() -> None:
    """torch learns of the simulated card before any test goes backward, and never after."""
    from lvr_lite.train.simulated import register

    register()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """ONNX Runtime's pool of threads is the process's: the first test would size it for all."""
    from lvr_lite.generate.onnx import share_pools

    share_pools(1)


@pytest.fixture(scope="session")
def structures_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torch traces each graph once a session, which takes 9 of 10 seconds of an export: what it
    gave is known by everything that it was given, and shared by all processes of the session.
    """
    import onnx

    from lvr_lite.export import write
    from lvr_lite.export.graphs.structure import structure as trace

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def structure(spec: GraphSpec, codes: Mapping[int, str]) -> Any:
        name = hashlib.sha256(everything_about(spec, codes).encode()).hexdigest()
        path = folder / f"structure-{name}.pickle"
        if not path.exists():
            proto, origins = trace(spec, codes)
            write_atomically(path, pickle.dumps((proto.SerializeToString(), origins)))
        data, origins = pickle.loads(path.read_bytes())
        return onnx.ModelProto.FromString(data), origins

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "structure", structure)
        yield


@pytest.fixture(scope="session")
def noticeable(structures_once: None) -> Callable[[Any], Any]:
    """Makes a fresh model's weights large, and its biases and norms uneven, and freezes it: as
    initialized, activations are so small that a mistake hardly shows.
    """
    import torch

    def change(model: Any) -> Any:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(3)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.requires_grad_(False)

    return change


@pytest.fixture(scope="session")
def small_model(noticeable: Callable[[Any], Any]) -> Any:
    """Random weights, two layers in each tower, float32: of the embedded model's making."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from lvr_lite.toy import build

    config = build.make_config(build.make_tokenizer())
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 2, [1]
    torch.manual_seed(5)
    return noticeable(Qwen2_5_VLForConditionalGeneration(config).float().eval())


@pytest.fixture(scope="session")
def small_checkpoint(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small base checkpoint in float32."""
    import torch

    from lvr_lite.toy import build

    folder = tmp_path_factory.mktemp("small") / "base"
    build.save(small_model, build.make_tokenizer(), folder, torch.float32)
    return folder


@pytest.fixture(scope="session")
def export(structures_once: None) -> Callable[[Any, Path], Any]:
    """Writes a checkpoint as an fp32 bundle that has passed the gate against torch; returns its
    manifest.
    """
    from lvr_lite.export.write import write_bundle
    from lvr_lite.train import load as nf4
    from lvr_lite.train.trained_weights import TrainedWeights

    def write(checkpoint: Any, target: Path) -> Any:
        return write_bundle(
            checkpoint,
            TrainedWeights(checkpoint),
            target,
            print,
            lambda: nf4.load_merged(checkpoint),
        ).manifest

    return write


@pytest.fixture(scope="session")
def small_fp32(
    small_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    export: Callable[[Any, Path], Any],
) -> Path:
    """The small model as an fp32 bundle of LATENT_STEPS latent steps."""
    from lvr_lite.model.checkpoint import read_checkpoint
    from lvr_lite.model.spec import LatentSpec

    target = tmp_path_factory.mktemp("small-bundles") / "fp32"
    export(
        replace(read_checkpoint(small_checkpoint), latent=LatentSpec(steps=LATENT_STEPS)), target
    )
    return target


@pytest.fixture(scope="session")
def small_int8(small_fp32: Path) -> Path:
    """`small_fp32` with its weights in 8 bits."""
    from lvr_lite.model.bundle import Bundle
    from lvr_lite.quant.quantize import quantize_bundle

    quantize_bundle(Bundle.open(small_fp32), small_fp32.parent / "int8", "int8", print)
    return small_fp32.parent / "int8"


@pytest.fixture(scope="session")
def small_tuned(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint tuned for two steps, so fast that its adapters and marker tokens have
    moved far: 8 latent steps.
    """
    from lvr_lite.config import load_settings
    from lvr_lite.model.checkpoint import read_checkpoint
    from lvr_lite.train.finetune import finetune

    out = tmp_path_factory.mktemp("small-tuned") / "tuned"
    overrides = ["train.lr=1e-2", "latent.steps=8", "latent.feedback=norm-matched"]
    settings = load_settings(None, [*SHORT_RUN, *overrides])
    finetune(read_checkpoint(small_checkpoint), "scenes", out, settings, say=print)
    return out


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a folder that a test may damage, or change: without its SHA256SUMS."""

    def copy(folder: Path) -> Path:
        target = tmp_path / f"copy-of-{folder.name}"
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("SHA256SUMS"))
        return target

    return copy


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs the command line in this process."""
    from lvr_lite.cli.app import main

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lvr-lite", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        output = capsys.readouterr()
        return Done(code if isinstance(code, int) else 0, output.out, output.err)

    return run
