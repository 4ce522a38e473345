"""What `inspect` tells of folders that are written here by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from lvr_lite.commands import inspect
from lvr_lite.errors import BundleError
from lvr_lite.files import sha256
from lvr_lite.model import bundle
from lvr_lite.model.families import ImageSpec
from lvr_lite.model.spec import LatentSpec, TokenIds
from lvr_lite.model.weight_files import read_header


def write_bundle(folder: Path) -> Path:
    (folder / "onnx").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    graphs = {}
    for name in bundle.GRAPHS:
        (folder / "onnx" / f"{name}.onnx").write_bytes(name.encode() * 100)
        hashes, size = bundle.hashes_and_bytes(folder, [f"onnx/{name}.onnx"])
        cache = bundle.TensorInfo("float32", ["batch", 4])
        graphs[name] = bundle.Graph(
            hashes,
            size,
            precision="int4",
            inputs={f"past_key_values.{i}.key": cache for i in range(6)},
            outputs={"logits": bundle.TensorInfo("float32", ["batch", 8])},
        )
    source = {"base": "tiny", "tokenizer_sha256": sha256(folder / "tokenizer.json")}
    manifest = bundle.Manifest(
        "qwen2_5_vl",
        "int4",
        graphs,
        LatentSpec(4),
        TokenIds(image=1, end=(2,), lvr_start=3, lvr=4, lvr_end=5),
        "",
        ImageSpec(14, 2, 2, (0.5,) * 3, (0.5,) * 3, 784, 7840, "bicubic"),
        bundle.DecoderShape(layers=6, kv_heads=1, head_dim=4, hidden_size=4, vocab_size=9),
        {},
        source,
        {"decoder": 1e-6},
    )
    bundle.write_manifest(folder, manifest)
    (folder / "report.json").write_text(json.dumps({"drift": {"layers": [0.1, 0.2]}}))
    return folder


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    header: dict[str, Any] = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
        for name, (dtype, shape) in tensors.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def test_a_bundle_shows_its_graphs_latents_parity_and_report(tmp_path: Path) -> None:
    data = json.loads(json.dumps(inspect.inspect(write_bundle(tmp_path / "b")).to_json()))
    assert (data["kind"], data["precision"], data["intact"]) == ("bundle", "int4", True)
    assert list(data["graphs"]) == list(bundle.GRAPHS)
    assert data["graphs"]["decoder"]["outputs"]["logits"]["axes"] == ["batch", 8]
    assert data["bytes"] == sum(100 * len(name) for name in bundle.GRAPHS)
    assert data["latent"] == {"steps": 4, "feedback": "identity", "mode": "open", "norm": 0.0}
    assert data["parity"] == {"decoder": 1e-6}
    assert data["report"] == {"drift": {"layers": [0.1, 0.2]}}


def test_a_changed_and_a_missing_file_are_named(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b")
    (folder / "onnx/decoder.onnx").write_bytes(b"other")
    (folder / "onnx/lm_head.onnx").unlink()
    contents = inspect.inspect(folder)
    assert isinstance(contents, inspect.BundleContents)
    assert not contents.intact
    assert contents.graph_states["decoder"] == "onnx/decoder.onnx is changed"
    assert contents.graph_states["lm_head"] == "onnx/lm_head.onnx is missing"
    assert contents.graph_states["embed_tokens"] == "ok"


def test_a_whole_model_shows_its_type_and_parameters(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    tensors = {"a": ("BF16", [3, 4]), "b": ("F32", [5]), "scalar": ("F32", [])}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    data = inspect.inspect(tmp_path).to_json()
    assert data["kind"] == "checkpoint"
    assert data["model_type"] == "qwen2_5_vl"
    assert data["parameters"] == 18
    assert data["weights"]["model.safetensors"]["dtypes"] == {"BF16": 12, "F32": 6}


def test_packed_weights_count_two_parameters_a_byte(tmp_path: Path) -> None:
    tensors = {
        "w.weight": ("U8", [8, 1]),
        "w.weight.absmax": ("U8", [2]),
        "w.weight.quant_map": ("F32", [16]),
        "w.weight.quant_state.bitsandbytes__nf4": ("U8", [90]),
        "norm.weight": ("F32", [4]),
    }
    write_safetensors(tmp_path / "m.safetensors", tensors)
    assert inspect.read_weights(tmp_path / "m.safetensors").dtypes == {"4-bit": 16, "F32": 4}


def test_a_tuned_checkpoint_shows_base_latents_and_adapter(tmp_path: Path) -> None:
    tuned = {"base": "tiny", "latent": {"steps": 4, "feedback": "identity", "mode": "open"}}
    (tmp_path / "lvr_config.json").write_text(json.dumps(tuned))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16}))
    write_safetensors(tmp_path / "adapter_model.safetensors", {"lora_A": ("F32", [16, 8])})
    data = inspect.inspect(tmp_path).to_json()
    assert (data["kind"], data["base"]) == ("tuned checkpoint", "tiny")
    assert (data["latent"]["steps"], data["adapter"]["r"], data["parameters"]) == (4, 16, 128)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
    ],
)
def test_weights_that_are_cut_off_or_something_else_are_refused_by_name(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"w\.safetensors"):
        read_header(tmp_path / "w.safetensors")


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="neither a bundle"):
        inspect.inspect(tmp_path)
    with pytest.raises(BundleError, match="no such folder"):
        inspect.inspect(tmp_path / "none")


def test_a_configuration_that_is_not_json_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BundleError, match=r"config\.json"):
        inspect.inspect(tmp_path)
