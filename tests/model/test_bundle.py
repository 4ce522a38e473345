"""Bundles: what is missing, changed or foreign is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lvr_lite.errors import BundleError
from lvr_lite.files import sha256
from lvr_lite.model.bundle import (
    GRAPHS,
    Bundle,
    DecoderShape,
    Graph,
    Manifest,
    hashes_and_bytes,
    is_bundle,
    write_manifest,
)
from lvr_lite.model.families import ImageSpec
from lvr_lite.model.spec import LatentSpec, TokenIds


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    graphs = {}
    for name in GRAPHS:
        paths = [f"onnx/{name}.onnx", f"onnx/{name}.onnx_data"]
        for path in paths:
            (folder / path).write_bytes(f"{path} weights".encode() * 50)
        graphs[name] = Graph(*hashes_and_bytes(folder, paths), "fp32", inputs={}, outputs={})
    source = {"tokenizer_sha256": sha256(folder / "tokenizer.json")}
    decoder = DecoderShape(layers=1, kv_heads=1, head_dim=4, hidden_size=4, vocab_size=9)
    tokens = TokenIds(image=1, end=(2,), lvr_start=3, lvr=4, lvr_end=5)
    image = ImageSpec(14, 2, 2, (0.5,) * 3, (0.5,) * 3, 784, 7840, "bicubic", {"window": 112})
    write_manifest(
        folder,
        Manifest(
            "qwen2_5_vl",
            "fp32",
            graphs,
            LatentSpec(4),
            tokens,
            "{{ messages }}",
            image,
            decoder,
            {},
            source,
        ),
    )
    return folder


def edit(folder: Path, **fields: Any) -> None:
    data = json.loads((folder / "lvr.json").read_text())
    (folder / "lvr.json").write_text(
        json.dumps({k: v for k, v in {**data, **fields}.items() if v is not ...})
    )


def edit_graph(folder: Path, name: str, **fields: Any) -> None:
    graphs = json.loads((folder / "lvr.json").read_text())["graphs"]
    edit(folder, graphs={**graphs, name: {**graphs[name], **fields}})


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_written_is_read_back(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert is_bundle(bundle)
    assert manifest.latent == LatentSpec(4)
    assert list(manifest.graphs) == list(GRAPHS)
    assert manifest.graphs["decoder"].path == "onnx/decoder.onnx"
    assert manifest.graphs["decoder"].bytes == sum(
        (bundle / p).stat().st_size for p in manifest.graphs["decoder"].files
    )
    assert manifest.to_json() == json.loads((bundle / "lvr.json").read_text())


@pytest.mark.parametrize("name", ["onnx/decoder.onnx_data", "onnx/lm_head.onnx", "tokenizer.json"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert refusal(bundle).startswith(f"{bundle / name}: missing")


@pytest.mark.parametrize("name", ["onnx/vision_encoder.onnx_data", "tokenizer.json"])
def test_a_changed_file_of_the_same_size_is_named(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[-1] ^= 1
    (bundle / name).write_bytes(bytes(data))
    assert refusal(bundle).startswith(f"{bundle / name}: changed or truncated")


def test_a_truncated_file_is_named(bundle: Path) -> None:
    path = bundle / "onnx/embed_tokens.onnx_data"
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(bundle).startswith(f"{path}: changed or truncated")


def test_files_are_not_hashed_where_no_check_is_asked(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    assert Bundle.open(bundle, check=False).manifest.family == "qwen2_5_vl"


def test_another_version_is_refused_with_both_numbers(bundle: Path) -> None:
    edit(bundle, version=7)
    assert "version 7" in refusal(bundle)
    assert "reads version 1" in refusal(bundle)


@pytest.mark.parametrize("field", ["version", "graphs", "latent", "family", "tokens"])
def test_a_missing_field_is_named(bundle: Path, field: str) -> None:
    edit(bundle, **{field: ...})
    assert f"{field}'" in refusal(bundle)


def test_an_unknown_field_is_named(bundle: Path) -> None:
    edit(bundle, surprise=1)
    assert "surprise" in refusal(bundle)


def test_a_missing_graph_is_named(bundle: Path) -> None:
    graphs = json.loads((bundle / "lvr.json").read_text())["graphs"]
    edit(bundle, graphs={k: v for k, v in graphs.items() if k != "lm_head"})
    assert "graph lm_head is missing" in refusal(bundle)


def test_a_latent_loop_from_the_future_is_refused(bundle: Path) -> None:
    edit(bundle, latent={"steps": 4, "feedback": "teleport", "mode": "open"})
    assert "teleport" in refusal(bundle)


@pytest.mark.parametrize("text", ["{", "", "\xff", "[1]", '"text"', "null"])
def test_a_malformed_manifest_is_refused_by_name(bundle: Path, text: str) -> None:
    (bundle / "lvr.json").write_bytes(text.encode("latin-1"))
    assert refusal(bundle).startswith(f"{bundle / 'lvr.json'}: ")


@pytest.mark.parametrize("path", ["../outside.onnx", "/etc/hostname", "onnx/../../outside.onnx"])
def test_a_file_outside_the_bundle_is_not_opened(bundle: Path, path: str) -> None:
    (bundle.parent / "outside.onnx").write_bytes(b"x")
    edit_graph(bundle, "decoder", files={path: "0" * 64})
    assert f"file {path} lies outside the bundle" in refusal(bundle)


def test_a_link_out_of_the_bundle_is_not_followed(bundle: Path) -> None:
    (bundle.parent / "outside.onnx").write_bytes(b"x")
    (bundle / "onnx/link.onnx").symlink_to(bundle.parent / "outside.onnx")
    edit_graph(bundle, "decoder", files={"onnx/link.onnx": sha256(bundle.parent / "outside.onnx")})
    assert "lies outside the bundle" in refusal(bundle)


def test_no_folder_and_a_folder_without_a_manifest_say_how_to_make_one(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "not a bundle" in refusal(tmp_path)
    assert not is_bundle(tmp_path)
