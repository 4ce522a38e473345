"""A bundle written from a small random model equals that model, and a wrong one is never
written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from lvr_lite.errors import BundleError, LvrError, OutputError
from lvr_lite.export import apart, graphs, onnxfile, parity, weights, write
from lvr_lite.export.graphs.spec import GraphSpec
from lvr_lite.export.graphs.structure import Origin, structure
from lvr_lite.export.onnxfile import describe
from lvr_lite.export.weights import StoredWeights
from lvr_lite.export.write import write_bundle
from lvr_lite.files import JsonObject
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model import bundle
from lvr_lite.model.bundle import Bundle, TensorInfo
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.families import Grid
from lvr_lite.model.spec import LatentSpec
from lvr_lite.toy import build
from lvr_lite.train.load import load_merged
from lvr_lite.train.trained_weights import TrainedWeights


@pytest.fixture(scope="module")
def model(noticeable: Callable[[Any], Any]) -> Any:
    model = noticeable(build.make_model(build.make_tokenizer(), seed=3).float().eval())
    return model.requires_grad_(True)


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    build.save(model, build.make_tokenizer(), folder, torch.float32)
    return read_checkpoint(folder)


@pytest.fixture(scope="module")
def small(small_checkpoint: Path) -> Checkpoint:
    return read_checkpoint(small_checkpoint)


@pytest.fixture(scope="module")
def written(
    checkpoint: Checkpoint,
    tmp_path_factory: pytest.TempPathFactory,
    export: Callable[[Any, Path], Any],
) -> Path:
    target = tmp_path_factory.mktemp("bundles") / "fp32"
    export(checkpoint, target)
    return target


def test_a_written_bundle_reads_back_with_its_hashes_and_its_parity(
    written: Path, model: Any
) -> None:
    manifest = Bundle.open(written).manifest
    assert manifest.precision == "fp32"
    assert manifest.decoder == bundle.DecoderShape(
        layers=6,
        kv_heads=4,
        head_dim=32,
        hidden_size=256,
        vocab_size=model.config.text_config.vocab_size,
    )
    assert set(manifest.parity["graphs"]) == set(bundle.GRAPHS)
    assert max(worst["relative"] for worst in manifest.parity["graphs"].values()) < 1e-4
    assert manifest.parity["decoding"]["relative"] < 1e-3
    assert json.loads((written / "report.json").read_text())["parity"] == manifest.parity


def test_the_manifest_names_inputs_and_outputs_in_the_order_of_the_graph(written: Path) -> None:
    graphs = Bundle.open(written).manifest.graphs
    assert list(graphs["vision_encoder"].inputs) == [
        "pixel_values",
        "position_ids",
        "window_index",
        "reverse_index",
        "window_id",
        "image_id",
    ]
    vision = graphs["vision_encoder"]
    assert vision.inputs["pixel_values"] == TensorInfo("float32", ["4*tokens", 1176])
    assert vision.outputs == {"image_features": TensorInfo("float32", ["tokens", 256])}
    decoder = graphs["decoder"]
    first = [
        "inputs_embeds",
        "position_ids",
        "seqlens_k",
        "total_sequence_length",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert list(decoder.inputs)[:7] == [*first, "past_key_values.1.key"]
    assert list(decoder.outputs)[:4] == [
        "last_hidden_state",
        "present.0.key",
        "present.0.value",
        "present.1.key",
    ]
    cache = TensorInfo("float32", ["batch", 4, "capacity", 32])
    assert decoder.inputs["past_key_values.0.key"] == cache
    assert decoder.inputs["total_sequence_length"] == TensorInfo("int32", [])
    assert list(graphs["lm_head"].outputs) == ["logits"]


def test_every_linear_layer_is_a_matmul_named_after_its_module(written: Path, model: Any) -> None:
    counts = {}
    for name in bundle.GRAPHS:
        graph = onnx.load(str(written / "onnx" / f"{name}.onnx"), load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        assert not [node for node in graph.node if node.op_type == "Gemm"]
        counts[name] = sum(
            node.op_type == "MatMul" and node.input[1] in weights for node in graph.node
        )
        if name == "decoder":
            names = {node.name for node in graph.node}
            assert "language_model.layers.0.mlp.up_proj/MatMul" in names
    linears = {
        part: sum(isinstance(m, torch.nn.Linear) for m in model.get_submodule(part).modules())
        for part in ("model.visual", "model.language_model")
    }
    assert counts == {
        # The patch embedding is a convolution in transformers.
        "vision_encoder": linears["model.visual"] + 1,
        "embed_tokens": 0,
        "decoder": linears["model.language_model"],
        "lm_head": 1,
    }


def test_a_graph_says_nothing_about_the_machine_that_wrote_it(written: Path) -> None:
    for path in (written / "onnx").glob("*.onnx"):
        assert str(Path(graphs.__file__).parent).encode() not in path.read_bytes()


def test_two_pictures_together_are_as_each_alone(written: Path) -> None:
    runtime = OnnxRuntime(Bundle.open(written))
    rng = np.random.default_rng(1)
    first, second = (
        rng.standard_normal((h * w, 1176)).astype(np.float32) for h, w in ((6, 8), (10, 4))
    )
    wide, tall = Grid(6, 8), Grid(10, 4)
    together = runtime.encode(np.concatenate([first, second]), [wide, tall])
    apart = np.concatenate([runtime.encode(first, [wide]), runtime.encode(second, [tall])])
    np.testing.assert_allclose(together, apart, atol=1e-4)


def test_the_gate_fails_on_another_models_graphs(
    written: Path, model: Any, checkpoint: Checkpoint
) -> None:
    weight = model.model.language_model.layers[4].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3] *= 1.5
        with pytest.raises(LvrError, match=r"decoder prefill of .*: max .*, mean .*, relative"):
            parity.check_graphs(OnnxRuntime(Bundle.open(written)), TorchRuntime(model, checkpoint))
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@pytest.mark.parametrize(
    "spec",
    [LatentSpec(), LatentSpec(2, "norm-matched", "bottleneck", 5.0)],
    ids=["open", "bottleneck"],
)
def test_the_gate_decodes_through_the_latent_loop_that_is_written(
    written: Path, model: Any, checkpoint: Checkpoint, spec: LatentSpec
) -> None:
    got = OnnxRuntime(Bundle.open(written))
    want = TorchRuntime(model, replace(checkpoint, latent=spec))
    got.latent = spec
    outcome = parity.check_decoding(got, want, latents=4, tokens=6)
    # In a bottleneck the last latent and <|lvr_end|> are not fed, and the prompt is read twice.
    states = 4 + 6 + (1 if spec.mode == "bottleneck" else 2)
    assert outcome.prompts == 6
    assert outcome.worst.cases == 6 * states
    got.latent = replace(spec, feedback="norm-matched", norm=50.0)
    with pytest.raises(LvrError, match="parity: decoding"):
        parity.check_decoding(got, want, latents=4, tokens=6)


def changing(changed: str, weight: str) -> write.Convert:
    """Writes the weights as they are, but for one that it makes 5 % larger."""

    def convert(graph: str, model: Any, read: Any, data: Any, origins: Any) -> JsonObject:
        def altered(tensor: onnx.TensorProto) -> np.ndarray:
            larger = graph == changed and tensor.name == weight
            return np.asarray(read(tensor) * np.float32(1.05 if larger else 1))

        assert graph != changed or weight in origins
        return write.as_float32(graph, model, altered, data, origins)

    return convert


# {graph: (a weight of it, what the gate says where that one differs)}
CHANGED = {
    "vision_encoder": ("visual.blocks.1.mlp.down_proj.weight", "vision_encoder .* differs"),
    "embed_tokens": ("embed_tokens.weight", "embed_tokens differs"),
    "decoder": ("language_model.layers.1.self_attn.k_proj.weight", "decoder layer 1 differs"),
    "lm_head": ("lm_head.weight", "lm_head differs"),
}


@pytest.mark.parametrize(
    ("graph", "limit"), [("lm_head", write.SMALL), ("vision_encoder", 0)], ids=["small", "large"]
)
def test_a_bundle_that_fails_the_gate_is_not_written(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str, limit: int
) -> None:
    monkeypatch.setattr(write, "SMALL", limit)
    weight, message = CHANGED[graph]
    with pytest.raises(LvrError, match=rf"{message} from torch: max"):
        write_bundle(
            small,
            TrainedWeights(small),
            tmp_path / "out",
            print,
            lambda: load_merged(small),
            convert=changing(graph, weight),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("graph", CHANGED)
def test_a_weight_that_differs_on_disk_is_noticed_without_torchs_whole_model(
    small_fp32: Path, small: Checkpoint, copied: Callable[[Path], Path], graph: str
) -> None:
    weight, message = CHANGED[graph]
    copy = Bundle.open(copied(small_fp32))
    stored = TrainedWeights(small)

    def check() -> list[float]:
        by_graph = apart.check_graphs_apart(copy, small, stored)
        assert set(by_graph) == {"vision_encoder", "embed_tokens", "lm_head"}
        layers = apart.check_layers(copy, small, stored)
        return [*(worst.relative for worst in by_graph.values()), *layers]

    assert max(check()) < 1e-5
    path = copy.path(graph)
    tensor = next(t for t in onnxfile.load(path).graph.initializer if t.name == weight)
    values = onnxfile.read(tensor, path.parent)
    onnxfile.overwrite(tensor, path.parent, values * np.float32(1.05))
    with pytest.raises(LvrError, match=rf"{message} from torch"):
        check()


def test_a_large_model_whose_weights_are_misread_is_not_written(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs and what they are compared with are then wrong alike."""
    monkeypatch.setattr(write, "SMALL", 0)
    read = StoredWeights.__getitem__
    monkeypatch.setattr(StoredWeights, "__getitem__", lambda self, name: read(self, name) * 2)
    with pytest.raises(LvrError, match=r"^parity: \S+ is read as something else than transformers"):
        write_bundle(small, TrainedWeights(small), tmp_path / "out", print, lambda: None)
    assert list(tmp_path.iterdir()) == []


def test_a_large_models_bundle_says_that_decoding_was_not_compared(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "SMALL", 0)
    lines: list[str] = []
    outcome = write_bundle(
        small,
        TrainedWeights(small),
        tmp_path / "out",
        lines.append,
        lambda: pytest.fail("loaded whole"),
    ).manifest.parity
    assert outcome["decoding"] is None
    assert len(outcome["layers"]) == 2
    assert max(outcome["layers"]) < 1e-5
    assert any("decoding: not compared" in line for line in lines)


def test_a_bundle_without_a_reference_is_compared_with_nothing(
    small: Checkpoint, small_fp32: Path, tmp_path: Path
) -> None:
    manifest = write_bundle(
        small, TrainedWeights(small), tmp_path / "out", print, source={"origin": "mine"}
    ).manifest
    assert manifest.parity == {} == Bundle.open(tmp_path / "out").manifest.parity
    assert manifest.source["origin"] == "mine"
    assert {name: graph.files for name, graph in manifest.graphs.items()} == {
        name: graph.files for name, graph in Bundle.open(small_fp32).manifest.graphs.items()
    }


class Scaled(torch.nn.Module):
    """A linear layer whose result is scaled by a factor computed from weights alone, so that the
    exporter computes it beforehand.
    """

    def __init__(
        self,
        weight: torch.nn.Parameter,
        vector: torch.nn.Parameter,
        factor: Callable[[torch.Tensor], torch.Tensor],
        bias: bool,
    ) -> None:
        """bias: the vector is the layer's bias too."""
        super().__init__()
        self.proj = torch.nn.Linear(8, 16, bias=bias)
        self.proj.weight = weight
        self.norm = vector
        self.factor = factor
        if bias:
            self.proj.bias = torch.nn.Parameter(vector.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.proj(x) * self.factor(self.norm))


def structure_of(
    factor: Callable[[torch.Tensor], torch.Tensor], bias: bool
) -> tuple[onnx.ModelProto, dict[str, Origin]]:
    weight = weights.placeholder(0, (16, 8))
    vector = weights.placeholder(1, (16,))
    module = Scaled(weight, vector, factor, bias)
    spec = GraphSpec(module, (torch.zeros(2, 8),), ["x"], ["y"], ({},))
    return structure(spec, {weights.code_of(weight): "w", weights.code_of(vector): "v"})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "factor", [lambda v: v * 2 + 1, lambda v: -v, torch.sqrt], ids=["scaled", "negative", "root"]
)
def test_a_constant_that_the_exporter_computed_from_weights_is_refused(
    factor: Callable[[torch.Tensor], torch.Tensor], bias: bool
) -> None:
    message = r"Scaled: the exporter computed \w+ from weights, which it must not"
    with pytest.raises(LvrError, match=message):
        structure_of(factor, bias)


def test_a_weight_knows_which_parameter_it_is_and_whether_it_is_transposed() -> None:
    proto, origins = structure_of(lambda v: v, bias=False)
    assert origins == {
        "proj.weight": Origin("w", transposed=True),
        "norm": Origin("v", transposed=False),
    }
    assert {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer} == {
        "proj.weight": [8, 16],
        "norm": [16],
    }
    assert not any(tensor.raw_data for tensor in proto.graph.initializer)


def test_the_structure_of_a_graph_holds_no_weights(small: Checkpoint) -> None:
    model = weights.empty_model(small.config, small.processor.family)
    codes = weights.origins(model)
    proto, origins = structure(graphs.specs(model, small.processor)["decoder"], codes)
    assert proto.ByteSize() < 1e6
    assert {origin.parameter for origin in origins.values()} == {
        n for n in codes.values() if "language_model.layers" in n or n.endswith("model.norm.weight")
    }


def test_too_little_disk_is_said_before_anything_is_written(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9 - 10**6, free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        OutputError, match=r"far/out: needs [1-9][0-9]* MB of free disk, 1 MB are left"
    ):
        write_bundle(small, TrainedWeights(small), tmp_path / "far" / "out", print)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_not_finite_is_not_exported(
    small: Checkpoint, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(small.folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][1, 1] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    spoilt = read_checkpoint(folder)
    with pytest.raises(
        BundleError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"
    ):
        write_bundle(spoilt, TrainedWeights(spoilt), tmp_path / "out", print)
    assert list(tmp_path.iterdir()) == [folder]


def test_compare_passes_equal_arrays_and_fails_a_perturbed_one() -> None:
    want = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    assert parity.compare("x", want.copy(), want).max_abs == 0
    got = want.copy()
    got[2, 3] += 0.1  # of 32 values
    with pytest.raises(
        LvrError, match=r"parity: x differs from torch: max 0\.1, mean 0\.0031\d, relative"
    ):
        parity.compare("x", got, want)


@pytest.mark.parametrize(
    "bad",
    [np.full((4, 8), np.nan, np.float32), np.zeros((4, 7), np.float32)],
    ids=["not a number", "another shape"],
)
def test_compare_fails_what_cannot_be_compared(bad: np.ndarray) -> None:
    with pytest.raises(LvrError, match="parity: x"):
        parity.compare("x", bad, np.ones((4, 8), np.float32))


def test_export_refuses_a_model_that_is_not_float32(checkpoint: Checkpoint) -> None:
    half = build.make_model(build.make_tokenizer()).to(torch.bfloat16)
    with pytest.raises(LvrError, match="needs a float32 model"):
        graphs.specs(half, checkpoint.processor)


def test_export_refuses_a_folder_that_is_not_a_bundle(small: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an earlier result"):
        write_bundle(small, TrainedWeights(small), tmp_path / "out", print)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_graphs_description_counts_its_bytes(written: Path) -> None:
    files = ["onnx/lm_head.onnx", "onnx/lm_head.onnx_data"]
    found = describe(written, files[0], "fp32")
    assert (list(found.files), found.path) == (files, files[0])
    assert found.bytes == sum((written / file).stat().st_size for file in files)
