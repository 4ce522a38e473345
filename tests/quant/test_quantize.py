"""Integer weights: what they stand for, that ONNX Runtime reads them so, and that nothing is left
out unnoticed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lvr_lite.errors import BundleError, OutputError, UsageError
from lvr_lite.export import onnxfile
from lvr_lite.generate.onnx import OnnxRuntime, open_session, share_pools
from lvr_lite.model import bundle
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.quant import blocks, drift
from lvr_lite.quant.form import check_form
from lvr_lite.quant.integers import MICROSOFT, change_operator
from lvr_lite.quant.quantize import Converter, quantize_bundle
from lvr_lite.quant.reports import Conversion
from lvr_lite.quant.schemes import COMPACT, INT4, INT8, RoundingPlan, Scheme, plan_of
from lvr_lite.toy import build

COLUMNS = (
    192,
    256,
    512,
    768,
    1176,
    70,
)  # the embedded model's sizes, and one that no block divides


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, export: Callable[[Any, Path], Any]) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles")
    tokenizer = build.make_tokenizer()
    model = build.make_model(tokenizer, seed=5).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(2)
    build.save(model, tokenizer, folder / "checkpoint", torch.float32)
    export(read_checkpoint(folder / "checkpoint"), folder / "fp32")
    return Bundle.open(folder / "fp32")


@pytest.fixture(scope="module")
def reports(source: Bundle) -> dict[str, dict[str, Any]]:
    return {
        name: quantize_bundle(source, source.folder.parent / name, name, print).to_json()
        for name in ("int8", "int4")
    }


def _matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def _run(
    nodes: list[onnx.NodeProto],
    initializers: list[TensorProto],
    feed: dict[str, np.ndarray],
    opset: int = 23,
) -> np.ndarray:
    inputs = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for k, v in feed.items()
    ]
    graph = helper.make_graph(
        nodes,
        "one",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    # Once a process has the shared pool, a session with a pool of its own does not load.
    share_pools()
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, feed)[0])


class Inline:
    """In place of a file of weights: they stay in the graph."""

    def add(self, name: str, array: np.ndarray) -> TensorProto:
        return numpy_helper.from_array(np.ascontiguousarray(array), name)


def _rewritten(
    node: onnx.NodeProto, weight: np.ndarray, scheme: Scheme
) -> tuple[onnx.ModelProto, Conversion]:
    graph = helper.make_graph([node], "one", [], [], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph)
    converter = Converter(RoundingPlan({"decoder": scheme}))
    return model, converter.convert("decoder", model, numpy_helper.to_array, Inline())  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", COLUMNS)
def test_rounding_keeps_a_matrix_within_the_error_of_its_bits(
    bits: int, symmetric: bool, columns: int
) -> None:
    matrix = _matrix(24, columns)
    found = blocks.quantize(matrix, Scheme(bits, 32, symmetric)).dense()
    assert found.shape == matrix.shape
    assert np.linalg.norm(found - matrix) / np.linalg.norm(matrix) < {4: 0.09, 8: 0.007}[bits]


def test_rounding_at_four_bits_is_closer_than_that_of_onnxruntime() -> None:
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    matrix = _matrix(64, 256)
    packed, scales = np.zeros((64, 8, 16), np.uint8), np.zeros((64, 8), np.float32)
    zeros = np.zeros((64, 4), np.uint8)
    quantize_matmul_4bits(packed, np.ascontiguousarray(matrix.T), scales, zeros, 32, 64, 256, False)
    halves = [
        np.stack([a & 15, a >> 4], -1).reshape(64, 8, -1).astype(np.float32)
        for a in (packed, zeros)
    ]
    theirs = ((halves[0] - halves[1]) * scales[..., None]).reshape(64, 256)
    mine = blocks.quantize(matrix, Scheme(4, 32, symmetric=False)).dense()
    assert np.linalg.norm(mine - matrix) < np.linalg.norm(theirs - matrix)


def test_blocks_of_zeros_stay_zero() -> None:
    for symmetric in (True, False):
        assert (
            not blocks.quantize(np.zeros((3, 64), np.float32), Scheme(4, 32, symmetric))
            .dense()
            .any()
        )


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_stored_in_float16_and_none_becomes_zero(size: float, symmetric: bool) -> None:
    found = blocks.quantize(_matrix(8, 64) * np.float32(size), Scheme(4, 32, symmetric))
    np.testing.assert_array_equal(found.scales, found.scales.astype(np.float16))
    assert np.all(found.scales != 0)
    assert np.abs(found.dense()).max() < 4 * size + 1e-6


def test_a_weight_whose_scales_float16_would_not_hold_is_an_error() -> None:
    with pytest.raises(BundleError, match="weight w has values beyond"):
        _rewritten(
            helper.make_node("MatMul", ["x", "w"], ["y"], name="n"),
            _matrix(64, 64) * np.float32(1e8),
            INT8,
        )


@pytest.mark.parametrize("scheme", [INT8, INT4, Scheme(4, 32, True), Scheme(8, 64, False)], ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_onnxruntime_multiplies_by_the_matrix_that_the_integers_stand_for(
    scheme: Scheme, columns: int
) -> None:
    weight = _matrix(columns, 96)
    model, _ = _rewritten(helper.make_node("MatMul", ["x", "w"], ["y"], name="n"), weight, scheme)
    x = _matrix(5, columns, seed=1)
    got = _run(list(model.graph.node), list(model.graph.initializer), {"x": x})
    want = x @ blocks.quantize(np.ascontiguousarray(weight.T), scheme.fit(columns)).dense().T
    assert (
        np.linalg.norm(got - want) / np.linalg.norm(want) < 0.015
    )  # the kernel rounds activations to 8 bits


@pytest.mark.parametrize("scheme", [INT8, INT4, Scheme(4, 32, True)], ids=str)
@pytest.mark.parametrize("columns", [256, 192, 96])
def test_onnxruntime_gathers_the_rows_that_the_integers_stand_for(
    scheme: Scheme, columns: int
) -> None:
    weight = _matrix(50, columns)
    model, _ = _rewritten(
        helper.make_node("Gather", ["w", "ids"], ["y"], name="n", axis=0), weight, scheme
    )
    ids = np.array([[3, 49, 0]], np.int64)
    got = _run(list(model.graph.node), list(model.graph.initializer), {"ids": ids})
    want = blocks.quantize(weight, scheme.fit(columns)).dense()[ids]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_large_weight_of_an_operator_that_cannot_be_replaced_is_an_error() -> None:
    for node in (
        helper.make_node("Gemm", ["x", "w"], ["y"], name="n"),
        helper.make_node("Transpose", ["w"], ["y"], name="n"),
    ):
        with pytest.raises(BundleError, match=f"weight w .*{node.op_type} cannot be quantized"):
            _rewritten(node, _matrix(64, 64), INT8)


def test_a_small_weight_is_kept_with_its_reason() -> None:
    model, conversion = _rewritten(
        helper.make_node("MatMul", ["x", "w"], ["y"], name="n"), _matrix(8, 8), INT8
    )
    assert model.graph.node[0].op_type == "MatMul"
    assert conversion.kept == {"w": "64 values, fewer than 4096"}


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = _matrix(64, 64)
    weight[3, 3] = np.nan
    with pytest.raises(BundleError, match="not finite"):
        _rewritten(helper.make_node("MatMul", ["x", "w"], ["y"], name="n"), weight, INT8)


@pytest.mark.parametrize(("precision", "least"), [("int8", 3.3), ("int4", 4.6)])
def test_a_quantized_bundle_is_that_much_smaller(
    reports: dict[str, Any], precision: str, least: float
) -> None:
    assert reports[precision]["bytes_before"] / reports[precision]["bytes"] > least


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_every_weight_of_every_graph_is_replaced_and_counted(
    source: Bundle, reports: dict[str, Any], precision: str
) -> None:
    counts = {name: graph["replaced"] for name, graph in reports[precision]["graphs"].items()}
    assert counts == {
        "vision_encoder": 1 + 5 * 5 + 2,
        "embed_tokens": 1,
        "decoder": 6 * 7,
        "lm_head": 1,
    }
    assert all(graph["kept"] == {} for graph in reports[precision]["graphs"].values())
    folder = source.folder.parent / precision
    manifest = Bundle.open(folder).manifest  # with its hashes
    assert manifest.precision == precision
    assert {name: graph.precision for name, graph in manifest.graphs.items()} == {
        "vision_encoder": "int8", "embed_tokens": "int8", "decoder": precision, "lm_head": "int8",
    }  # fmt: skip
    assert (folder / "drift.png").stat().st_size > 10_000
    told = json.loads((folder / "report.json").read_text())
    assert told == {
        name: value
        for name, value in reports[precision].items()
        if name not in ("seconds", "peak_rss_mb")
    }


def test_inputs_and_outputs_stay_those_of_the_source(
    source: Bundle, reports: dict[str, Any]
) -> None:
    before, after = source.manifest, Bundle.open(source.folder.parent / "int4").manifest
    assert reports
    for name in bundle.GRAPHS:
        assert after.graphs[name].inputs == before.graphs[name].inputs
        proto = onnx.load(
            str(source.folder.parent / "int4" / after.graphs[name].path), load_external_data=False
        ).graph
        assert [value.name for value in proto.input] == list(after.graphs[name].inputs)
        assert [value.name for value in proto.output] == list(after.graphs[name].outputs)


def test_drift_is_small_at_eight_bits_and_reported_for_every_layer_and_latent_step(
    reports: dict[str, dict[str, Any]],
) -> None:
    for report, limit in ((reports["int8"], 0.1), (reports["int4"], 0.6)):
        found = report["drift"]
        for feeding in ("fed_back", "token_fed"):
            assert {
                name: len(steps) for name, steps in found["decoder"][feeding].items()
            } == dict.fromkeys(("relative", "cosine", "norm"), drift.LATENT_STEPS)
            assert 0 < max(found["decoder"][feeding]["relative"]) < limit
            assert 1 - limit < min(found["decoder"][feeding]["cosine"]) < 1
        assert 0 < found["decoder"]["prefill"] < limit
        assert 0 < found["vision_encoder"] < 0.1
        assert 0 < found["lm_head"] < 0.03
        assert len(found["layers"]) == 6
        assert 0 < min(found["layers"]) <= max(found["layers"]) < limit
    assert min(reports["int4"]["drift"]["layers"]) > max(reports["int8"]["drift"]["layers"])


def test_a_large_bundle_is_compared_layer_by_layer_alone(
    source: Bundle, reports: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "LARGE", 0)
    found = drift.measure(source, Bundle.open(source.folder.parent / "int8"))
    assert found.to_json() == {"layers": reports["int8"]["drift"]["layers"], "decoder": None}


def test_the_report_says_how_each_weight_was_rounded(
    source: Bundle, reports: dict[str, Any]
) -> None:
    for precision, bits in (("int8", 8), ("int4", 4)):
        folder, told = source.folder.parent / precision, reports[precision]["graphs"]
        for name, graph in Bundle.open(folder).manifest.graphs.items():
            nodes = [
                n
                for n in onnxfile.load(folder / graph.path).graph.node
                if n.domain == MICROSOFT and "bits" in attributes(n)
            ]
            assert told[name]["bits"] == {node.name: attributes(node)["bits"] for node in nodes}
            assert set(told[name]["bits"].values()) == {bits if name == "decoder" else 8}
        assert (
            told["decoder"]["schemes"]
            == {"int8": ["8 bits, block 32, zero points"], "int4": ["4 bits, block 128"]}[precision]
        )
        assert told["decoder"]["what"] == f"{bits} bits"
        assert set(told["decoder"]["layers"]) == {f"layers.{i}" for i in range(6)}
        assert len(told["decoder"]["errors"]) == 6 * 7
    assert (
        8.72 < reports["int8"]["bits_per_weight"] < 8.8
    )  # 32 values share a scale of 16 bits and a zero point of 8
    assert 4.15 < reports["int4"]["bits_per_weight"] < 5


def attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def test_a_block_is_that_of_weights_of_four_bits(source: Bundle, tmp_path: Path) -> None:
    report = quantize_bundle(source, tmp_path / "out", "int4", print, block=32)
    assert report.graphs["decoder"].conversion.schemes == ["4 bits, block 32"]
    assert report.graphs["lm_head"].conversion.schemes == ["8 bits, block 128"]


@pytest.mark.parametrize("block", [48, 8, 0, -32])
def test_a_block_that_the_kernels_do_not_have_is_a_usage_error(
    source: Bundle, tmp_path: Path, block: int
) -> None:
    with pytest.raises(UsageError, match=f"block {block}: must be a power of two, 16 or more"):
        quantize_bundle(source, tmp_path / "out", "int4", print, block=block)
    assert not list(tmp_path.iterdir())


def test_a_matrix_that_the_block_does_not_divide_gets_half_of_it_or_a_quarter() -> None:
    assert [COMPACT.fit(columns).block for columns in (256, 192, 96, 70)] == [128, 64, 32, 128]
    assert [INT4.fit(columns).block for columns in (256, 192, 96, 48)] == [128, 64, 32, 128]


# --------------------------------------------------------------------------------------------------
# one matrix for two graphs


def test_an_embedding_and_its_head_share_their_bytes(
    source: Bundle, reports: dict[str, Any], tmp_path: Path
) -> None:
    folder, told = source.folder.parent / "int8", reports["int8"]["graphs"]
    manifest = Bundle.open(folder).manifest
    head, table = manifest.graphs["lm_head"], manifest.graphs["embed_tokens"]
    assert (told["lm_head"]["shared"], told["embed_tokens"]["shared"]) == (True, False)
    assert list(head.files) == ["onnx/lm_head.onnx", "onnx/embed_tokens.onnx_data"]
    assert head.bytes == (folder / head.path).stat().st_size < 10_000 < table.bytes
    assert not (folder / "onnx" / "lm_head.onnx_data").exists()

    model, at = onnxfile.load(source.path("lm_head")), source.folder / "onnx"
    with onnxfile.data_file(tmp_path / "alone.onnx") as data:
        converter = Converter(plan_of("int8"))
        alone = converter.convert("lm_head", model, partial(onnxfile.read, folder=at), data)
    assert not alone.shared
    hidden = _matrix(4, 256)
    both = [open_session(folder / head.path), open_session(model.SerializeToString(), tmp_path)]
    mine, apart = (
        np.asarray(session.run(None, {"last_hidden_state": hidden[:, None]})[0]) for session in both
    )
    np.testing.assert_array_equal(mine, apart)
    rows = OnnxRuntime(Bundle.open(folder)).embed(np.array([[3, 400]]))[0]
    np.testing.assert_allclose(
        mine[:, 0, [3, 400]], hidden @ rows.T, atol=0.02 * float(np.abs(mine).max())
    )


@pytest.mark.parametrize(
    "columns", [96, 72]
)  # 72: what no block divides is padded for the head, and cannot be shared
@pytest.mark.parametrize("tied", [True, False])
def test_what_a_head_shares_is_what_it_multiplies_by(columns: int, tied: bool) -> None:
    converter, table = Converter(plan_of("int8")), _matrix(64, columns)
    head, x = table if tied else _matrix(64, columns, 1), _matrix(2, columns, 3)
    cases = [
        (
            "embed_tokens",
            helper.make_node("Gather", ["w", "x"], ["y"], name="n"),
            table,
            np.array([[1, 2]]),
            table[[[1, 2]]],
        ),
        (
            "lm_head",
            helper.make_node("MatMul", ["x", "w"], ["y"], name="n"),
            head.T.copy(),
            x,
            x @ head.T,
        ),
    ]
    for name, node, weight, feed, want in cases:
        model = helper.make_model(
            helper.make_graph([node], "one", [], [], [numpy_helper.from_array(weight, "w")])
        )
        done = converter.convert(name, model, numpy_helper.to_array, Inline())  # type: ignore[arg-type]
        assert done.shared == (name == "lm_head" and tied and columns == 96)
        assert done.replaced == 1
        got = _run(list(model.graph.node), list(model.graph.initializer), {"x": feed})
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.015


# --------------------------------------------------------------------------------------------------
# the last check


def without_level(model: onnx.ModelProto) -> str:
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
    del node.attribute[:]
    node.attribute.extend(kept)
    return f"decoder: {node.name} has no accuracy_level 4"


def with_gemm(model: onnx.ModelProto) -> str:
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    change_operator(node, "Gemm", list(node.input[:2]), {})
    return f"decoder: {node.name} is a Gemm"


def with_float(model: onnx.ModelProto) -> str:
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    model.graph.initializer.append(numpy_helper.from_array(_matrix(64, 64), "w"))
    change_operator(node, "MatMul", [node.input[0], "w"], {})
    return f"decoder: {node.name} is a MatMul with its weight in float"


@pytest.mark.parametrize("spoil", [without_level, with_gemm, with_float])
def test_a_form_that_runs_slowly_is_refused_by_its_node(
    source: Bundle, reports: dict[str, Any], tmp_path: Path, spoil: Callable[[onnx.ModelProto], str]
) -> None:
    assert reports
    folder = Path(shutil.copytree(source.folder.parent / "int8", tmp_path / "copy"))
    opened = Bundle.open(folder)
    check_form(opened)
    path = opened.path("decoder")
    model = onnxfile.load(path)
    said = spoil(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError) as caught:
        check_form(opened)
    assert str(caught.value).startswith(said)


def test_the_same_bytes_written_twice_are_refused(
    source: Bundle, reports: dict[str, Any], tmp_path: Path
) -> None:
    assert reports
    folder = Path(shutil.copytree(source.folder.parent / "int8", tmp_path / "copy"))
    opened = Bundle.open(folder)
    shutil.copy(folder / "onnx" / "embed_tokens.onnx_data", folder / "onnx" / "lm_head.onnx_data")
    model = onnxfile.load(opened.path("lm_head"))
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = entry.value.replace("embed_tokens", "lm_head")
    opened.path("lm_head").write_bytes(model.SerializeToString())
    with pytest.raises(
        BundleError, match=r"lm_head: .* holds the same bytes as embed_tokens\.onnx_data at 0"
    ):
        check_form(opened)


def test_a_quantized_bundle_decodes(source: Bundle, reports: dict[str, Any]) -> None:
    assert reports
    from PIL import Image

    from lvr_lite.generate.ask import prepare_prompt
    from lvr_lite.generate.decode import Options, decode

    runtime = OnnxRuntime(Bundle.open(source.folder.parent / "int4"))
    prompt, _ = prepare_prompt(runtime, [Image.new("RGB", (90, 60), "red")], "What is here?")
    assert len(decode(runtime, [prompt], Options(max_tokens=3, min_tokens=3))[0].tokens) == 3


def test_an_unknown_precision_is_a_usage_error_that_names_the_known_ones(
    source: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError, match="'int3' is not known; quantize writes int8, int4, mixed, fp16"
    ):
        quantize_bundle(source, tmp_path / "out", "int3", print)


def test_a_source_that_is_quantized_already_is_refused(
    source: Bundle, reports: dict[str, Any], tmp_path: Path
) -> None:
    assert reports
    with pytest.raises(BundleError, match="its precision is int8"):
        quantize_bundle(Bundle.open(source.folder.parent / "int8"), tmp_path / "out", "int4", print)
    assert not list(tmp_path.iterdir())


def test_the_source_is_never_its_own_target(source: Bundle) -> None:
    with pytest.raises(BundleError, match="is the source itself"):
        quantize_bundle(source, source.folder, "int8", print)


def test_a_failure_midway_leaves_nothing(
    source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        drift, "measure", lambda *_: (_ for _ in ()).throw(BundleError("cannot load it"))
    )
    with pytest.raises(BundleError, match="cannot load it"):
        quantize_bundle(source, tmp_path / "out", "int8", print)
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_said_before_anything_is_written(
    source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9 - 10**6, free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        OutputError,
        match=r"out: needs [1-9][0-9]* MB of free disk, 1 MB are left; free some or choose another",
    ):
        quantize_bundle(source, tmp_path / "out", "int8", print)
    assert not list(tmp_path.iterdir())


def test_exact_is_not_made_from_a_bundle(source: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="precision exact: is written from the checkpoint"):
        quantize_bundle(source, tmp_path / "out", "exact", print)
