"""`lvr-lite inspect`, `doctor` and `demo`; damaged bundles under every command that reads one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lvr_lite.cli import contents
from lvr_lite.commands.inspect import inspect
from tests.command_line import Call, Refused


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("inspect nosuch", 1, "nosuch: no such folder"),
        ("inspect EMPTY", 1, "neither a bundle (lvr.json) nor a checkpoint"),
        ("demo --out OTHERS", 2, "exists and is not an earlier demo"),
        ("doctor --json EMPTY", 1, "cannot be written"),
    ],
)
def test_a_wrong_input_is_one_line(refused: Refused, arguments: str, code: int, words: str) -> None:
    refused(arguments, code, words)


def test_inspect_and_doctor_write_what_they_show(
    call: Call, small_int8: Path, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    assert call("inspect", small_int8, "--json", file).code == 0
    result = json.loads(file.read_text())
    assert (result["schema"], result["kind"]) == ("lvr-lite/inspect", "bundle")
    assert result["intact"]
    done = call("doctor", "--json", file)
    checks = json.loads(file.read_text())["checks"]
    assert done.code == any(check["ok"] is False for check in checks)
    assert all(check["name"] in done.out for check in checks)


def shown(folder: Path) -> str:
    out = io.StringIO()
    contents.show(inspect(folder), Console(file=out, width=200))
    return out.getvalue()


def test_a_quantized_bundle_is_shown_with_its_weights_and_drift(small_int8: Path) -> None:
    text = shown(small_int8)
    for words in ("past_key_values.N.key float32[", "× 2", "steps 3", "bits a weight", "cosine"):
        assert words in text


def test_a_tuned_checkpoint_is_shown_with_its_adapter(small_tuned: Path) -> None:
    text = shown(small_tuned)
    for words in ("tuned checkpoint", "steps 8", "LORA, r 4", "adapter_model.safetensors"):
        assert words in text


# --------------------------------------------------------------------------------------------------
# damaged bundles


def removed(bundle: Path) -> str:
    (bundle / "onnx" / "decoder.onnx_data").unlink()
    return "onnx/decoder.onnx_data: missing"


def truncated(bundle: Path) -> str:
    path = bundle / "onnx" / "decoder.onnx_data"
    path.write_bytes(path.read_bytes()[:-100])
    return "onnx/decoder.onnx_data: changed or truncated"


def changed(bundle: Path) -> str:
    path = bundle / "onnx" / "lm_head.onnx_data"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    return "onnx/lm_head.onnx_data: changed or truncated"


def other_tokenizer(bundle: Path) -> str:
    path = bundle / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    return "tokenizer.json: changed or truncated"


def half_a_manifest(bundle: Path) -> str:
    path = bundle / "lvr.json"
    path.write_text(path.read_text()[:200])
    return "lvr.json: not valid JSON"


def later_version(bundle: Path) -> str:
    path = bundle / "lvr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    return "lvr.json: bundle version 2, this lvr-lite reads version 1"


DAMAGES = (removed, truncated, changed, other_tokenizer, half_a_manifest, later_version)


@pytest.mark.parametrize(
    ("command", "damage"),
    [
        *(("run", damage) for damage in DAMAGES),
        *((command, changed) for command in ("eval", "bench", "quantize")),
        ("inspect", half_a_manifest),
    ],
)
def test_a_damaged_bundle_is_refused_by_the_name_of_its_file(
    call: Call,
    copied: Callable[[Path], Path],
    small_fp32: Path,
    picture: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], str],
) -> None:
    bundle = copied(small_fp32)
    words = damage(bundle)
    rest: dict[str, list[object]] = {"run": [picture, "q"], "quantize": [tmp_path / "out"]}
    done = call(command, bundle, *rest.get(command, []))
    assert done.code == 1
    assert words in done.error
    assert not (tmp_path / "out").exists()
