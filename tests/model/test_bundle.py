"""Bundles: what is missing, changed or foreign is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from lvr_lite.errors import BundleError
from lvr_lite.export import onnxfile
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


def graph_with(location: str, offset: int = 0, length: int = 16) -> onnx.ModelProto:
    """A graph with one weight, which is said to lie there."""
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        weight.external_data.add(key=key, value=str(value))
    node = helper.make_node("Identity", ["w"], ["y"])
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    return helper.make_model(helper.make_graph([node], "g", [], [output], [weight]))


@pytest.mark.parametrize("kind", [30, onnx.TensorProto.BFLOAT16, onnx.TensorProto.STRING])
def test_a_weight_of_a_type_that_no_bundle_has_is_refused(tmp_path: Path, kind: int) -> None:
    model = graph_with("graph.onnx_data")
    model.graph.initializer[0].data_type = kind
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    (tmp_path / "graph.onnx_data").write_bytes(bytes(64))
    with pytest.raises(BundleError, match=f"weight w is of type {kind}"):
        onnxfile.load(path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    graphs = {}
    for name in GRAPHS:
        paths = [f"onnx/{name}.onnx", f"onnx/{name}.onnx_data"]
        (folder / paths[0]).write_bytes(graph_with(f"{name}.onnx_data").SerializeToString())
        (folder / paths[1]).write_bytes(f"{name} weights".encode() * 50)
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


@pytest.mark.parametrize("name", ["onnx\\x.onnx", "C:x.onnx", "./onnx/x.onnx", "onnx//x", ""])
def test_a_path_that_systems_read_differently_is_refused(bundle: Path, name: str) -> None:
    edit_graph(bundle, "decoder", files={name: "0" * 64})
    with pytest.raises(BundleError, match="lies outside the bundle"):
        Bundle.open(bundle, check=False)


def test_a_tokenizer_that_is_a_link_out_of_the_bundle_is_refused(bundle: Path) -> None:
    outside = bundle.parent / "outside.json"
    (bundle / "tokenizer.json").rename(outside)
    (bundle / "tokenizer.json").symlink_to(outside)
    assert "file tokenizer.json lies outside the bundle" in refusal(bundle)


def rewrite_graph(bundle: Path, model: onnx.ModelProto, others: tuple[str, ...] = ()) -> None:
    """Another decoder, with the hashes of its files in the manifest."""
    (bundle / "onnx/decoder.onnx").write_bytes(model.SerializeToString())
    paths = ["onnx/decoder.onnx", *(f"onnx/{name}" for name in others)]
    digests, size = hashes_and_bytes(bundle, paths)
    edit_graph(bundle, "decoder", files=digests, bytes=size)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("../../outside", "no file beside the graph"),
        ("/etc/hostname", "no file beside the graph"),
        ("..", "no file beside the graph"),
        ("", "no file beside the graph"),
        ("*/_ORT_MEM_ADDR_/*", "no file beside the graph"),
        ("C:\\x", "no file beside the graph"),
        ("link", "is a link out of its folder"),
        ("nowhere", "missing"),
        ("unlisted", "which the bundle does not list"),
    ],
)
def test_weights_lie_in_files_of_the_bundle(bundle: Path, location: str, said: str) -> None:
    (bundle.parent / "outside").write_bytes(bytes(64))
    (bundle / "onnx/link").symlink_to(bundle.parent / "outside")
    (bundle / "onnx/unlisted").write_bytes(bytes(64))
    model = graph_with(location)
    rewrite_graph(bundle, model)
    assert said in refusal(bundle)
    if location == "unlisted":
        return
    with pytest.raises(BundleError, match=said):
        onnxfile.load(bundle / "onnx/decoder.onnx")
    (weight,) = model.graph.initializer
    for use in (onnxfile.read, onnxfile.fingerprint):
        with pytest.raises(BundleError, match=said):
            use(weight, bundle / "onnx")
    with pytest.raises(BundleError, match=said):
        onnxfile.overwrite(weight, bundle / "onnx", np.zeros(4, np.float32))


@pytest.mark.parametrize(("offset", "length"), [(-8, 16), (0, 10**9), (10**9, 16), (0, -4)])
def test_weights_lie_within_their_file(bundle: Path, offset: int, length: int) -> None:
    model = graph_with("decoder.onnx_data", offset, length)
    rewrite_graph(bundle, model, ("decoder.onnx_data",))
    assert "weight w is said to lie at bytes" in refusal(bundle)
    with pytest.raises(BundleError, match="weight w is said to lie at bytes"):
        onnxfile.read(model.graph.initializer[0], bundle / "onnx")


def test_a_weight_has_as_many_bytes_as_its_shape_takes(bundle: Path) -> None:
    weight = graph_with("decoder.onnx_data").graph.initializer[0]
    for dims, said in (([1000], "holds fewer bytes"), ([1 << 40, 1 << 40], "has the shape")):
        weight.dims[:] = dims
        with pytest.raises(BundleError, match=said):
            onnxfile.read(weight, bundle / "onnx")


def test_values_in_a_file_are_weights_of_the_graph(bundle: Path) -> None:
    model = graph_with("decoder.onnx_data")
    constant = model.graph.initializer[0]
    node = model.graph.node.add(op_type="Constant", output=["c"])
    node.attribute.append(helper.make_attribute("value", constant))
    rewrite_graph(bundle, model, ("decoder.onnx_data",))
    assert "w has its values in a file and is no weight" in refusal(bundle)
    model = graph_with("decoder.onnx_data")
    sparse = onnx.SparseTensorProto(values=constant, dims=[4])
    model.graph.sparse_initializer.append(sparse)
    rewrite_graph(bundle, model, ("decoder.onnx_data",))
    assert "w has its values in a file and is no weight" in refusal(bundle)


def test_weights_of_a_graph_within_a_node_are_checked_too(bundle: Path) -> None:
    model = graph_with("decoder.onnx_data")
    inner = graph_with("../../outside").graph
    node = model.graph.node.add(op_type="If", input=["c"], output=["i"])
    node.attribute.append(helper.make_attribute("then_branch", inner))
    rewrite_graph(bundle, model, ("decoder.onnx_data",))
    assert "no file beside the graph" in refusal(bundle)


@pytest.mark.parametrize(
    ("operator", "domain"),
    [("PyOp", "pyopmulti_2"), ("Mine", "me.org"), ("EPContext", "com.microsoft")],
)
def test_an_operator_that_needs_code_from_elsewhere_is_refused(
    bundle: Path, operator: str, domain: str
) -> None:
    model = graph_with("decoder.onnx_data")
    model.graph.node.add(op_type=operator, domain=domain, input=["w"], output=["z"])
    rewrite_graph(bundle, model, ("decoder.onnx_data",))
    assert f"holds the operator {domain}:{operator}" in refusal(bundle)


@pytest.mark.parametrize("content", [b"", b"\x0f", b"\x3a\xff\xff\xff\x0f", b"\xff" * 40, b"{}"])
def test_what_is_no_graph_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "decoder.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=re.escape(str(path))):
        onnxfile.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {
            "decoder": {
                "layers": 10**12,
                "kv_heads": 1,
                "head_dim": 4,
                "hidden_size": 4,
                "vocab_size": 9,
            }
        },
        {
            "decoder": {
                "layers": "1",
                "kv_heads": 1,
                "head_dim": 4,
                "hidden_size": 4,
                "vocab_size": 9,
            }
        },
        {"tokens": {"image": 1, "end": [], "lvr_start": 3, "lvr": 4, "lvr_end": 5}},
        {"tokens": {"image": -1, "end": [2], "lvr_start": 3, "lvr": 4, "lvr_end": 5}},
        {"latent": {"steps": 10**9}},
        {"latent": {"steps": "4"}},
        {"chat_template": 3},
        {"rope": []},
        {"graphs": []},
    ],
)
def test_values_beyond_all_use_are_refused_by_name(bundle: Path, change: dict[str, Any]) -> None:
    edit(bundle, **change)
    assert refusal(bundle).startswith(
        f"{bundle / 'lvr.json'}: a field is missing, unknown or wrong"
    )


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"version": ' + "9" * 5000 + "}"]
)
def test_json_that_no_parser_reads_is_refused_by_name(bundle: Path, text: str) -> None:
    (bundle / "lvr.json").write_text(text, encoding="utf-8")
    assert refusal(bundle).startswith(f"{bundle / 'lvr.json'}: not valid JSON")


def test_no_folder_and_a_folder_without_a_manifest_say_how_to_make_one(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "not a bundle" in refusal(tmp_path)
    assert not is_bundle(tmp_path)
