"""What is run on an input: commands of `lvr-lite` in this process, errors left as they are."""

from __future__ import annotations

import gc
import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import lvr_lite
from lvr_lite.data.samples import Sample

# Refusals of options, by the names of typer's own and of click's classes.
REFUSED_OPTIONS = (
    "Exit",
    "Abort",
    "UsageError",
    "BadParameter",
    "NoSuchOption",
    "MissingParameter",
)
# Beside the project's own modules, what commands import while they work.
LIBRARIES = (
    "bitsandbytes", "peft", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "onnxscript",
    "safetensors.torch", "typer._adapters", "matplotlib.pyplot", "pyarrow.parquet", "yaml",
    "jinja2.sandbox", "jinja2.ext", "rich.progress", "rich.table", "onnxruntime", "PIL.features",
)  # fmt: skip


def import_all() -> None:
    """Everything that commands import, so that a forked process finds it there."""
    from PIL import Image

    Image.init()
    for module in pkgutil.walk_packages(lvr_lite.__path__, "lvr_lite."):
        if not module.name.startswith(("lvr_lite.bench.experiments", "lvr_lite.__main__")):
            importlib.import_module(module.name)
    for name in LIBRARIES:
        _import_if_there(name)
    from lvr_lite.terminal import quiet_libraries

    quiet_libraries()
    _command()


def _import_if_there(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        print(f"{name}: not there")


def warm_up(bases: Mapping[str, Path], out: Path) -> None:
    """Run what starts no threads once on sound files, so that a forked process finds what is made
    on first use.
    """
    samples = str(bases["scenes"] / "test.jsonl")
    for command in (
        ("data", "preview", samples, "--out", str(out / "preview.png")),
        ("inspect", str(bases["fp32"] / "model")),
        ("finetune", "--model", str(bases["checkpoint"] / "model"), "--plan"),
    ):
        with (out / "warm-up.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            act(command)
    gc.collect()
    # What is there now is not looked at again: each forked process would copy it.
    gc.freeze()


@cache
def _command() -> Any:
    import typer

    from lvr_lite.cli.app import app

    return typer.main.get_command(app)


def act(arguments: Sequence[str]) -> None:
    """Run a command; raises what it raises, but for the refusal of an option."""
    if arguments[0] == "reward":
        _reward(Path(arguments[1]))
        return
    command = _command()
    try:
        command.main(args=list(arguments), prog_name="lvr-lite", standalone_mode=False)
    except Exception as error:
        if type(error).__name__ not in REFUSED_OPTIONS:
            raise


def _reward(path: Path) -> None:
    """Every named reward of a model's answer to a sample, as a run of GRPO scores it."""
    from lvr_lite.train.rewards import Answer, read_rewards

    content = json.loads(path.read_bytes())
    choices = content["choices"]
    sample = Sample("1", (), "?", content["expected"], choices and tuple(choices))
    read_rewards("accuracy,math,format,latent-use")(sample, Answer(content["text"], latents=1))
