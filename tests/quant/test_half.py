"""fp16 bundles answer as fp32 ones do, hold positions of any size, and refuse what 16 bits cannot
hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lvr_lite.errors import BundleError
from lvr_lite.export import onnxfile
from lvr_lite.export.layers import DecoderLayers, LayerCall
from lvr_lite.export.parity import StartsWithLatents, compare
from lvr_lite.generate.decode import Options, decode
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.model.bundle import Bundle
from lvr_lite.quant import half
from lvr_lite.quant.prompts import load_prompts
from lvr_lite.quant.quantize import quantize_bundle


@pytest.fixture(scope="module")
def made(small_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("half") / "fp16"
    report = quantize_bundle(Bundle.open(small_fp32), folder, "fp16", print)
    return folder, report.to_json()


def test_fp16_answers_as_fp32_does(made: tuple[Path, dict[str, Any]], small_fp32: Path) -> None:
    outcomes = []
    for folder in (small_fp32, made[0]):
        runtime = OnnxRuntime(Bundle.open(folder))
        options = Options(max_tokens=3, min_tokens=3, keep_hidden=True)
        outcomes.append(
            decode(StartsWithLatents(runtime, 3), load_prompts(runtime, "scenes", 3), options)
        )
    for want, got in zip(*outcomes, strict=True):
        assert want.tokens == got.tokens
        compare("fp16", np.stack(got.hidden), np.stack(want.hidden), 0.02)
        assert not np.array_equal(np.stack(got.hidden), np.stack(want.hidden))


def test_fp16_takes_half_the_bytes_and_says_what_its_ports_are(
    made: tuple[Path, dict[str, Any]], small_fp32: Path
) -> None:
    folder, report = made
    manifest = Bundle.open(folder).manifest
    assert manifest.precision == "fp16"
    assert {graph.precision for graph in manifest.graphs.values()} == {"fp16"}
    assert 0.45 < report["bytes"] / report["bytes_before"] < 0.6
    assert report["bits_per_weight"] == 16
    decoder, before = manifest.graphs["decoder"], Bundle.open(small_fp32).manifest.graphs["decoder"]
    kinds = {name: port.dtype for name, port in {**decoder.inputs, **decoder.outputs}.items()}
    assert {name for name, kind in kinds.items() if kind == "float16"} == {
        f"{prefix}.{i}.{part}"
        for prefix in ("past_key_values", "present")
        for i in range(2)
        for part in ("key", "value")
    }
    assert {name: port.axes for name, port in decoder.inputs.items()} == {
        name: port.axes for name, port in before.inputs.items()
    }
    for graph in manifest.graphs.values():
        proto = onnxfile.load(folder / graph.path).graph
        large = [t for t in proto.initializer if onnxfile.size(t) > 1024]
        assert large
        assert {t.data_type for t in large} == {onnx.TensorProto.FLOAT16}


def test_positions_beyond_what_16_bits_hold_are_told_apart(
    made: tuple[Path, dict[str, Any]], small_fp32: Path
) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((1, 8, 256)).astype(np.float32)
    positions = np.broadcast_to(np.arange(30_001, 30_009), (3, 1, 8)).astype(np.int64)
    both = [DecoderLayers(Bundle.open(folder)) for folder in (small_fp32, made[0])]
    want, got = (layers.run(0, [LayerCall(hidden, positions, np.array([8]))])[0] for layers in both)
    compare("layer", got - hidden, want - hidden, 0.01)


def test_a_weight_beyond_16_bits_is_refused_by_name(small_fp32: Path, tmp_path: Path) -> None:
    path = small_fp32 / "onnx" / "decoder.onnx"
    large = "language_model.layers.1.mlp.up_proj.weight"

    def read(tensor: onnx.TensorProto) -> np.ndarray:
        array = np.array(onnxfile.read(tensor, path.parent))
        if tensor.name == large:
            array[3, 3] = -65_600
        return array

    with (
        onnxfile.data_file(tmp_path / "decoder.onnx") as data,
        pytest.raises(BundleError, match=f"weight {large} has values beyond 65504"),
    ):
        half.convert(onnxfile.load(path), read, data)
