"""`lvr-lite finetune` and `grpo`; what training itself does is tested in tests/train."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.command_line import Call, Refused, process

TINY = "finetune --model tiny --data scenes --out OUT"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("finetune --model nosuch --data scenes --out OUT", 1, "nosuch: no such folder"),
        (f"{TINY} --config none.yaml", 2, "none.yaml: cannot be read"),
        (f"{TINY} --set train.stepz=1", 2, "unknown key train.stepz"),
        ("finetune --model tiny --data BROKEN --out OUT", 1, "broken.jsonl:3: not valid JSON"),
        (f"{TINY} --resume", 2, "nothing to resume"),
        ("finetune --model tiny --plan --resume", 2, "leave out --resume"),
        ("finetune --model tiny --plan --vram -1", 2, "--vram -1: must be the memory of a card"),
        ("finetune --model tiny --out OUT", 2, "finetune needs --data; only --plan goes without"),
        ("grpo --checkpoint tiny", 2, "grpo needs --data and --out; only --plan goes without"),
        ("grpo --checkpoint tiny --vram 12", 2, "--vram is for --plan"),
        ("grpo --checkpoint tiny --data scenes --out OUT", 2, "was not tuned with latents"),
    ],
)
def test_a_wrong_input_is_one_line(refused: Refused, arguments: str, code: int, words: str) -> None:
    refused(arguments, code, words)


def test_a_tuned_checkpoint_is_not_tuned_again(
    call: Call, small_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "tuned"))
    tuned = {"base": str(small_checkpoint), "latent": {"steps": 2}}
    (folder / "lvr_config.json").write_text(json.dumps(tuned))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    done = call("finetune", "--model", folder, "--data", "scenes", "--out", tmp_path / "out")
    assert done.code == 2
    assert f"give its base ({small_checkpoint})" in done.error


def test_a_model_is_tuned_exported_and_asked(
    call: Call, small_checkpoint: Path, picture: Path, tmp_path: Path
) -> None:
    settings = {
        "train.steps": 1,
        "train.batch": 2,
        "train.accumulation": 1,
        "train.gradient_checkpointing": "true",
        "train.eval_every": 1,
        "train.save_every": 1,
        "data.count": 8,
        "data.eval_count": 1,
        "latent.steps": 2,
    }
    overrides = [f"--set={name}={value}" for name, value in settings.items()]
    tuned, bundle, result = tmp_path / "tuned", tmp_path / "bundle", tmp_path / "result.json"
    source = ("--model", small_checkpoint, "--data", "scenes")
    done = process("finetune", *source, "--out", tuned, "--json", result, *overrides)
    assert done.code == 0, done.err
    assert not re.search("Warning|Loading|Writing", done.err), f"a library speaks: {done.err}"
    training = json.loads(result.read_text())
    assert training["schema"] == "lvr-lite/finetune"
    assert (training["out"], training["steps"]) == (str(tuned), 1)
    exported = call("export", tuned, bundle, "--precision", "fp32")
    assert exported.code == 0, exported.err
    assert json.loads((bundle / "lvr.json").read_text())["latent"]["steps"] == 2
    answers = []
    for model in (tuned, bundle):
        question = (picture, "what is here", "--max-tokens", 3)
        assert call("run", model, *question, "--json", result).code == 0
        answers.append(json.loads(result.read_text())["tokens"])
    assert answers[0] == answers[1]
