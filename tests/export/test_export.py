"""A bundle written from a small random model equals that model, and a wrong one is never written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from lvr_lite import bundle
from lvr_lite.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.errors import BundleError, LvrError
from lvr_lite.export import graphs, parity
from lvr_lite.export.write import describe, write_bundle
from lvr_lite.latent import LatentSpec
from lvr_lite.runtime.onnx import OnnxRuntime
from lvr_lite.runtime.torch import TorchRuntime
from lvr_lite.tiny import build


@pytest.fixture(scope="module")
def model() -> Any:
    made = build.make_model(build.make_tokenizer(), seed=3).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3)  # as initialized, activations are so small that a wrong mask hardly shows
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms start at 0 and 1, where a lost one hardly shows
    return made


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    build.save(model, build.make_tokenizer(), folder, torch.float32)
    return read_checkpoint(folder)


@pytest.fixture(scope="module")
def written(model: Any, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundles") / "fp32"
    write_bundle(model, checkpoint, target, [].append)
    return target


def test_a_written_bundle_reads_back_with_its_hashes_and_its_parity(written: Path, model: Any) -> None:
    manifest = bundle.read_manifest(written)
    assert manifest.precision == "fp32"
    assert manifest.decoder == {
        "layers": 6,
        "kv_heads": 4,
        "head_dim": 32,
        "hidden_size": 256,
        "vocab_size": model.config.text_config.vocab_size,
    }
    assert set(manifest.parity["graphs"]) == set(bundle.GRAPHS)
    assert max(found["relative"] for found in manifest.parity["graphs"].values()) < 1e-4
    assert manifest.parity["decoding"]["relative"] < 1e-3
    assert json.loads((written / "report.json").read_text())["parity"] == manifest.parity


def test_the_manifest_names_inputs_and_outputs_in_the_order_of_the_graph(written: Path) -> None:
    found = bundle.read_manifest(written).graphs
    assert list(found["vision_encoder"].inputs) == [
        "pixel_values",
        "position_ids",
        "window_index",
        "reverse_index",
        "window_id",
        "image_id",
    ]
    assert found["vision_encoder"].inputs["pixel_values"] == {"dtype": "float32", "axes": ["4*tokens", 1176]}
    assert found["vision_encoder"].outputs == {"image_features": {"dtype": "float32", "axes": ["tokens", 256]}}
    decoder = found["decoder"]
    first = ["inputs_embeds", "position_ids", "seqlens_k", "total_sequence_length", "past_key_values.0.key", "past_key_values.0.value"]
    assert list(decoder.inputs)[:7] == [*first, "past_key_values.1.key"]
    assert list(decoder.outputs)[:4] == ["last_hidden_state", "present.0.key", "present.0.value", "present.1.key"]
    assert decoder.inputs["past_key_values.0.key"] == {"dtype": "float32", "axes": ["batch", 4, "capacity", 32]}
    assert decoder.inputs["total_sequence_length"] == {"dtype": "int32", "axes": []}
    assert list(found["lm_head"].outputs) == ["logits"]


def test_every_linear_layer_is_a_matmul_named_after_its_module(written: Path, model: Any) -> None:
    counts = {}
    for name in bundle.GRAPHS:
        graph = onnx.load(str(written / "onnx" / f"{name}.onnx"), load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        assert not [node for node in graph.node if node.op_type == "Gemm"]
        counts[name] = sum(node.op_type == "MatMul" and node.input[1] in weights for node in graph.node)
        assert "language_model.layers.0.mlp.up_proj/MatMul" in {node.name for node in graph.node} or name != "decoder"
    linears = {
        part: sum(isinstance(m, torch.nn.Linear) for m in model.get_submodule(part).modules())
        for part in ("model.visual", "model.language_model")
    }
    assert counts == {
        "vision_encoder": linears["model.visual"] + 1,  # the patch embedding, a convolution in transformers
        "embed_tokens": 0,
        "decoder": linears["model.language_model"],
        "lm_head": 1,
    }


def test_a_graph_says_nothing_about_the_machine_that_wrote_it(written: Path) -> None:
    for path in (written / "onnx").glob("*.onnx"):
        assert str(Path(graphs.__file__).parent).encode() not in path.read_bytes()


def test_two_pictures_together_are_as_each_alone(written: Path) -> None:
    runtime = OnnxRuntime(written)
    rng = np.random.default_rng(1)
    first, second = (rng.standard_normal((h * w, 1176)).astype(np.float32) for h, w in ((6, 8), (10, 4)))
    together = runtime.encode(np.concatenate([first, second]), [(6, 8), (10, 4)])
    apart = np.concatenate([runtime.encode(first, [(6, 8)]), runtime.encode(second, [(10, 4)])])
    np.testing.assert_allclose(together, apart, atol=1e-4)


def test_the_gate_fails_on_another_models_graphs(written: Path, model: Any, checkpoint: Checkpoint) -> None:
    weight = model.model.language_model.layers[4].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3] *= 1.5
        with pytest.raises(LvrError, match=r"decoder prefill of .*: max .*, mean .*, relative"):
            parity.check_graphs(OnnxRuntime(written), TorchRuntime(model, checkpoint))
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize("spec", [LatentSpec(), LatentSpec(2, "norm-matched", "bottleneck", 5.0)], ids=["open", "bottleneck"])
def test_the_gate_decodes_through_the_latent_loop_that_is_written(
    written: Path, model: Any, checkpoint: Checkpoint, spec: LatentSpec
) -> None:
    mine, theirs = OnnxRuntime(written), TorchRuntime(model, replace(checkpoint, latent=spec))
    mine.latent = spec
    found = parity.check_decoding(mine, theirs, latents=4, tokens=6)
    states = (
        4 + 6 + (1 if spec.mode == "bottleneck" else 2)
    )  # the last latent and <|lvr_end|> are not fed in a bottleneck, the prompt twice
    assert (found["prompts"], found["cases"]) == (6, 6 * states)
    mine.latent = replace(spec, feedback="norm-matched", norm=50.0)
    with pytest.raises(LvrError, match="parity: decoding"):
        parity.check_decoding(mine, theirs, latents=4, tokens=6)


def test_a_bundle_that_fails_the_gate_is_not_written(
    model: Any, checkpoint: Checkpoint, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {path.stem: path for path in (written / "onnx").glob("*.onnx")}

    def copy_with_a_changed_weight(_: graphs.Spec, path: Path) -> list[Path]:
        proto = onnx.load(str(other[path.stem]))
        if path.stem == "lm_head":
            weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2)
            changed = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
            weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
        onnx.save(proto, str(path), save_as_external_data=True, location=path.name + "_data", size_threshold=1024)
        return [path, path.with_name(path.name + "_data")]

    monkeypatch.setattr(graphs, "write_graph", copy_with_a_changed_weight)
    with pytest.raises(LvrError, match="lm_head differs from torch: max"):
        write_bundle(model, checkpoint, tmp_path / "out", [].append)
    assert list(tmp_path.iterdir()) == []


def test_compare_passes_equal_arrays_and_fails_a_perturbed_one() -> None:
    want = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    assert parity.compare("x", want.copy(), want).max_abs == 0
    got = want.copy()
    got[2, 3] += 0.1  # of 32 values
    with pytest.raises(LvrError, match=r"parity: x differs from torch: max 0\.1, mean 0\.0031\d, relative"):
        parity.compare("x", got, want)


@pytest.mark.parametrize("bad", [np.full((4, 8), np.nan, np.float32), np.zeros((4, 7), np.float32)], ids=["not a number", "another shape"])
def test_compare_fails_what_cannot_be_compared(bad: np.ndarray) -> None:
    with pytest.raises(LvrError, match="parity: x"):
        parity.compare("x", bad, np.ones((4, 8), np.float32))


def test_export_refuses_a_model_that_is_not_float32(checkpoint: Checkpoint, tmp_path: Path) -> None:
    half = build.make_model(build.make_tokenizer()).to(torch.bfloat16)
    with pytest.raises(LvrError, match="needs a float32 model"):
        write_bundle(half, checkpoint, tmp_path / "out", [].append)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_a_folder_that_is_not_a_bundle(model: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(BundleError, match="not an earlier result"):
        write_bundle(model, checkpoint, tmp_path / "out", [].append)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_graphs_description_counts_its_bytes(written: Path) -> None:
    files = ["onnx/lm_head.onnx", "onnx/lm_head.onnx_data"]
    assert describe(written, files, "fp32").bytes == sum((written / file).stat().st_size for file in files)
