"""Scales and norms trained after rounding: the gradient is right, answers come nearer to fp32's,
and nothing else changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvr_lite.errors import BundleError, DataError
from lvr_lite.export import onnxfile
from lvr_lite.generate.onnx import OnnxRuntime, open_session
from lvr_lite.model.bundle import Bundle
from lvr_lite.quant import answers, calibration, torchgraph, tune
from lvr_lite.quant.answers import answer_loss, reference_answers
from lvr_lite.quant.blocks import pack, unpack
from lvr_lite.quant.calibrated import quantize_calibrated
from lvr_lite.quant.products import Products
from lvr_lite.quant.prompts import load_prompts
from lvr_lite.quant.quantize import quantize_bundle
from lvr_lite.toy.make import write_scenes


@pytest.fixture(scope="module")
def trained(
    small_fp32: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """int4 with and without training, in one folder."""
    folder = tmp_path_factory.mktemp("tune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "PROMPTS", 16)
        patch.setattr(answers, "TOKENS", 8)
        source = Bundle.open(small_fp32)
        quantize_calibrated(source, folder / "rounded", "int4", "scenes", print, steps=0)
        report = quantize_calibrated(source, folder / "trained", "int4", "scenes", print, steps=8)
        return folder, report.to_json()


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    path = folder / "onnx" / "decoder.onnx"
    return {
        tensor.name: onnxfile.read(tensor, path.parent)
        for tensor in onnxfile.load(path).graph.initializer
    }


def test_only_scales_and_norms_change_and_they_do(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, report = trained
    before, after = weights_of(folder / "rounded"), weights_of(folder / "trained")
    assert list(before) == list(after)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    norms = {name for name in before if "norm.weight" in name}
    scales = {name for name, values in before.items() if values.dtype == np.float16}
    assert (len(norms), len(scales)) == (2 * 2 + 1, 2 * 7)
    assert changed == norms | scales
    for name in changed:
        assert before[name].shape == after[name].shape
        assert (
            np.abs(after[name].astype(np.float64) / before[name] - 1).max() < 0.1 or name in norms
        )
    sizes = [
        {p.name: p.stat().st_size for p in (folder / name / "onnx").iterdir()}
        for name in ("rounded", "trained")
    ]
    assert sizes[0] == sizes[1]
    # Its hashes are those of the files as they are now.
    Bundle.open(folder / "trained")
    assert report["tuning"]["kept"]
    assert report["tuning"]["steps"] == 8


def test_training_mends_scales_that_were_spoiled(
    small_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned from some questions, seen in the answers to others, under ONNX Runtime."""
    monkeypatch.setattr(tune, "RATE", 5e-3)  # the way back is long
    source = Bundle.open(small_fp32)
    quantize_bundle(source, tmp_path / "int8", "int8", print)
    int8 = Bundle.open(tmp_path / "int8")
    reference = OnnxRuntime(source)
    prompts = load_prompts(reference, "scenes", 32)
    readings = Products(reference, prompts[:16], source).readings()
    held_out = prompts[16:]
    references = reference_answers(reference, held_out)
    losses = []
    spoiled = torchgraph.TorchGraph(int8.path("decoder"))
    with torch.no_grad():
        for factors in spoiled.factors.values():
            factors *= 1.1
    spoiled.write()
    for steps in (0, 24):
        tuning = tune.Tuning(int8, reference, readings)
        if steps:
            assert tuning.run(steps).kept
        runtime = reference.with_graphs(decoder=open_session(int8.path("decoder")))
        losses.append(answer_loss(runtime, held_out, references).total)
    assert losses[1] < 0.5 * losses[0]


def test_what_does_not_help_is_not_kept(
    trained: tuple[Path, dict[str, Any]],
    small_fp32: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "PROMPTS", 16)
    monkeypatch.setattr(answers, "TOKENS", 8)
    monkeypatch.setattr(tune, "RATE", 0.5)
    lines: list[str] = []
    report = quantize_calibrated(
        Bundle.open(small_fp32), tmp_path / "out", "int4", "scenes", lines.append, steps=3
    )
    assert report.tuning is not None
    assert not report.tuning.kept
    assert any("no better, so not kept" in line for line in lines)
    rounded = weights_of(trained[0] / "rounded")
    assert all(
        np.array_equal(values, rounded[name])
        for name, values in weights_of(tmp_path / "out").items()
    )


@pytest.mark.parametrize("columns", [32, 27])
def test_the_gradient_of_a_product_is_its_difference_quotient(columns: int) -> None:
    """27: the last block is padded."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-8, 8, (5, 2, 16), dtype=torch.int8, generator=generator)
    scales = torch.rand(5, 2, dtype=torch.float64, generator=generator).requires_grad_()
    x = torch.randn(1, 3, columns, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, scales: torchgraph._Product.apply(x, integers, scales), (x, scales)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_packed_is_unpacked(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, (3, 2, 16), dtype=np.uint8)
    np.testing.assert_array_equal(unpack(pack(values, bits), bits), values)


def test_integers_scales_and_zero_points_are_read_as_they_were_rounded(
    small_fp32: Path, tmp_path: Path
) -> None:
    """A product of the graph in torch, activations in float, against the dense matrix of ONNX
    Runtime's rounding.
    """
    # int8 has zero points.
    quantize_bundle(Bundle.open(small_fp32), tmp_path / "int8", "int8", print)
    graph = torchgraph.TorchGraph(tmp_path / "int8" / "onnx" / "lm_head.onnx")
    x = torch.randn(
        4,
        OnnxRuntime(Bundle.open(small_fp32)).hidden_size,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        found = graph({"last_hidden_state": x}).numpy()
    head = next(
        t
        for t in onnxfile.load(small_fp32 / "onnx" / "lm_head.onnx").graph.initializer
        if len(t.dims) == 2
    )
    exact = x.numpy() @ onnxfile.read(head, small_fp32 / "onnx")
    assert 0 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.01


def test_a_single_prompt_cannot_be_trained_on_and_held_out(
    small_fp32: Path, tmp_path: Path
) -> None:
    path = write_scenes(tmp_path / "scenes", 1, 0, "train")
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(
        DataError,
        match="takes two prompts or more to calibrate on; give more samples, or --tune-steps 0",
    ):
        quantize_calibrated(Bundle.open(small_fp32), tmp_path / "out", "int4", str(path), print)
    assert [p.name for p in tmp_path.iterdir()] == ["scenes"]


def test_a_graph_with_an_operator_that_torch_has_no_rule_for_is_refused(
    small_fp32: Path, tmp_path: Path
) -> None:
    model = onnxfile.load(small_fp32 / "onnx" / "lm_head.onnx")
    model.graph.node.add(op_type="Tanh", name="capped", input=["logits"], output=["capped"])
    (tmp_path / "capped.onnx").write_bytes(model.SerializeToString())
    for file in (small_fp32 / "onnx").glob("lm_head.onnx_data"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        BundleError, match="cannot be trained through Tanh; --tune-steps 0 goes without"
    ):
        torchgraph.TorchGraph(tmp_path / "capped.onnx")
