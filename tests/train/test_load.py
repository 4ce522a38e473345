"""Tuned checkpoints one weight at a time: as merged in memory, bit for bit, and as they were
trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lvr_lite.errors import BundleError
from lvr_lite.export import onnxfile
from lvr_lite.export.parity import StartsWithLatents, compare
from lvr_lite.export.write import write_bundle
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, decode
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.bundle import Bundle, Manifest
from lvr_lite.model.checkpoint import LVR_CONFIG, read_checkpoint
from lvr_lite.quant.exact import ExactConvert
from lvr_lite.toy import build
from lvr_lite.train import load as nf4
from lvr_lite.train.trained_weights import TrainedWeights

Q_PROJ = "model.language_model.layers.1.self_attn.q_proj"


def test_weights_one_by_one_are_those_of_the_merged_model(small_tuned: Path) -> None:
    checkpoint = read_checkpoint(small_tuned)
    merged, base = (
        nf4.load_merged(checkpoint).state_dict(),
        nf4.load_plain(read_checkpoint(checkpoint.base)).state_dict(),
    )
    weights = TrainedWeights(checkpoint)
    changed = set()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, merged[name]), name
        changed |= set() if torch.equal(weight, base[name]) else {name}
    assert {
        f"{Q_PROJ}.weight",
        "lm_head.weight",
        "model.language_model.embed_tokens.weight",
    } <= changed
    assert not [name for name in changed if "visual" in name]
    rows = (merged["lm_head.weight"] != base["lm_head.weight"]).any(1).nonzero().flatten().tolist()
    assert rows == sorted(
        [
            checkpoint.processor.tokens.lvr_start,
            checkpoint.processor.tokens.lvr,
            checkpoint.processor.tokens.lvr_end,
        ]
    )


def test_unmerged_weights_and_their_adapters_make_the_merged_ones(small_tuned: Path) -> None:
    checkpoint = read_checkpoint(small_tuned)
    apart = TrainedWeights(checkpoint, unmerged=True)
    down, up = apart[f"{Q_PROJ}.lora_A"], apart[f"{Q_PROJ}.lora_B"]
    assert (tuple(down.shape), tuple(up.shape)) == ((4, 256), (256, 4))
    assert float((up @ down).abs().max()) > 1e-3, "the adapter is too small to show a mistake"
    merged = TrainedWeights(checkpoint)
    torch.testing.assert_close(
        apart[f"{Q_PROJ}.weight"] + up @ down, merged[f"{Q_PROJ}.weight"], atol=1e-6, rtol=1e-5
    )
    assert torch.equal(apart.merged()[f"{Q_PROJ}.weight"], merged[f"{Q_PROJ}.weight"])
    assert f"{Q_PROJ}.lora_A" in set(apart)
    assert f"{Q_PROJ}.lora_A" not in set(merged)


def test_a_base_checkpoint_is_not_rounded(small_checkpoint: Path) -> None:
    checkpoint = read_checkpoint(small_checkpoint)
    plain = nf4.load_plain(checkpoint).state_dict()
    assert all(
        torch.equal(weight, plain[name]) for name, weight in TrainedWeights(checkpoint).items()
    )


@pytest.fixture
def other_base(
    small_tuned: Path, small_model: Any, copied: Callable[[Path], Path], tmp_path: Path
) -> Path:
    """The tuned checkpoint as if its base had one layer less."""
    from copy import deepcopy

    from transformers import Qwen2_5_VLForConditionalGeneration

    config = deepcopy(small_model.config)
    config.text_config.num_hidden_layers, config.text_config.layer_types = (
        1,
        config.text_config.layer_types[:1],
    )
    build.save(
        Qwen2_5_VLForConditionalGeneration(config),
        build.make_tokenizer(),
        tmp_path / "shallow",
        torch.float32,
    )
    folder = copied(small_tuned)
    settings = json.loads((folder / LVR_CONFIG).read_text())
    (folder / LVR_CONFIG).write_text(json.dumps(settings | {"base": str(tmp_path / "shallow")}))
    return folder


@pytest.mark.parametrize("load", [TrainedWeights, nf4.load_merged, nf4.load_trained])
def test_an_adapter_of_another_base_is_refused_by_name(
    other_base: Path, load: Callable[[Any], Any]
) -> None:
    with pytest.raises(
        BundleError, match=r"shallow, which has no model\.language_model\.layers\.1\.\w+\.\w+$"
    ) as caught:
        load(read_checkpoint(other_base))
    assert str(caught.value).startswith(f"{other_base}: the adapter is of another base than ")


@pytest.fixture
def same_shapes(small_tuned: Path, copied: Callable[[Path], Path], tmp_path: Path) -> Path:
    """The tuned checkpoint over a base that differs from its own in one weight's last value."""
    from safetensors.torch import load_file, save_file

    folder, base = copied(small_tuned), tmp_path / "base"
    settings = json.loads((folder / LVR_CONFIG).read_text())
    shutil.copytree(settings["base"], base)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("1.self_attn.q_proj.weight"))
    weights[name][-1, -1] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (folder / LVR_CONFIG).write_text(json.dumps(settings | {"base": str(base)}))
    return folder


@pytest.mark.parametrize("load", [TrainedWeights, nf4.load_merged, nf4.load_trained])
def test_an_adapter_of_another_base_of_the_same_shapes_is_refused(
    same_shapes: Path, load: Callable[[Any], Any]
) -> None:
    checkpoint = read_checkpoint(same_shapes)
    with pytest.raises(
        BundleError,
        match=r"base, whose weights have another sha256; "
        r"name the one that .* as `base` in lvr_config\.json$",
    ):
        load(checkpoint)
    # Tuned before the sha256 was recorded.
    load(replace(checkpoint, trained_over=None))


def test_the_same_base_in_another_place_is_its_base(
    small_tuned: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copied(small_tuned)
    settings = json.loads((folder / LVR_CONFIG).read_text())
    shutil.copytree(settings["base"], tmp_path / "moved")
    (folder / LVR_CONFIG).write_text(json.dumps(settings | {"base": str(tmp_path / "moved")}))
    TrainedWeights(read_checkpoint(folder))


def test_a_truncated_adapter_is_one_line_with_its_name(
    small_tuned: Path, copied: Callable[[Path], Path]
) -> None:
    file = copied(small_tuned) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        BundleError, match=r"adapter_model\.safetensors: truncated, or not a safetensors file"
    ):
        TrainedWeights(read_checkpoint(file.parent))


# --------------------------------------------------------------------------------------------------
# as it was trained


@pytest.fixture(scope="module")
def exact(small_tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    checkpoint = read_checkpoint(small_tuned)
    weights, folder = (
        TrainedWeights(checkpoint, unmerged=True),
        tmp_path_factory.mktemp("exact") / "bundle",
    )
    return folder, write_bundle(
        checkpoint,
        weights,
        folder,
        print,
        lambda: nf4.load_trained(checkpoint, torch.float32),
        "exact",
        ExactConvert(weights),
    ).manifest


def test_an_exact_bundle_decodes_what_was_trained(
    exact: tuple[Path, Manifest], small_tuned: Path
) -> None:
    checkpoint = read_checkpoint(small_tuned)
    torch_runtime, outcomes = (
        TorchRuntime(nf4.load_trained(checkpoint, torch.float32), checkpoint),
        [],
    )
    noise = np.random.default_rng(4).integers(0, 256, (80, 110, 3), dtype=np.uint8)
    for runtime in (torch_runtime, OnnxRuntime(Bundle.open(exact[0]))):
        prompts = [
            prepare_prompt(runtime, [Image.fromarray(noise)], q)[0]
            for q in ("what colour is the star", "where heart")
        ]
        options = Options(max_tokens=6, min_tokens=6, keep_hidden=True)
        outcomes.append(decode(StartsWithLatents(runtime, 8), prompts, options))
    for trained, mine in zip(*outcomes, strict=True):
        assert trained.tokens == mine.tokens
        assert len(trained.latents) == len(mine.latents) == 8
        for i, (a, b) in enumerate(zip(mine.hidden, trained.hidden, strict=True)):
            compare(f"state {i}", a, b, 1e-5)


def test_an_exact_bundle_is_not_the_merged_one(
    exact: tuple[Path, Manifest], small_tuned: Path, tmp_path: Path, export: Any
) -> None:
    """Merged, the same weights differ by rounding alone; without its adapters the model is
    another.
    """
    checkpoint = read_checkpoint(small_tuned)
    hidden = {}
    prompt = prepare_prompt(OnnxRuntime(Bundle.open(exact[0])), [], "where heart")[0]
    bare = replace(checkpoint, adapter=False)
    weights = TrainedWeights(bare, unmerged=True)
    write_bundle(
        bare, weights, tmp_path / "bare", print, precision="exact", convert=ExactConvert(weights)
    )
    export(checkpoint, tmp_path / "merged")
    for name, folder in (
        ("exact", exact[0]),
        ("bare", tmp_path / "bare"),
        ("merged", tmp_path / "merged"),
    ):
        hidden[name] = decode(
            OnnxRuntime(Bundle.open(folder)),
            [prompt],
            Options(max_tokens=1, steps=0, keep_hidden=True),
        )[0].hidden[0]
    compare("merged", hidden["merged"], hidden["exact"], 1e-4)
    assert np.linalg.norm(hidden["bare"] - hidden["exact"]) / np.linalg.norm(hidden["exact"]) > 0.01


def test_every_linear_of_an_exact_decoder_reads_nf4_with_its_adapter_beside_it(
    exact: tuple[Path, Manifest],
) -> None:
    folder, manifest = exact
    assert manifest.precision == "exact"
    assert {name: graph.precision for name, graph in manifest.graphs.items()} == {
        "vision_encoder": "fp32",
        "embed_tokens": "fp32",
        "decoder": "nf4",
        "lm_head": "fp32",
    }
    graph = onnxfile.load(folder / manifest.graphs["decoder"].path).graph
    linears = 2 * 7
    assert sum(node.op_type == "MatMulBnb4" for node in graph.node) == linears
    weights = {tensor.name for tensor in graph.initializer}
    products = [
        node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights
    ]
    assert len(products) == 2 * linears
    assert all(".lora_" in node.input[1] for node in products)
    told = json.loads((folder / "report.json").read_text())["graphs"]
    assert (told["decoder"]["replaced"], told["decoder"]["adapters"]) == (linears, linears)
    assert [told[name]["adapters"] for name in ("vision_encoder", "embed_tokens", "lm_head")] == [
        0,
        0,
        0,
    ]


def test_exact_bytes_are_those_of_bitsandbytes(
    exact: tuple[Path, Manifest], small_tuned: Path
) -> None:
    folder, manifest = exact
    weights = TrainedWeights(read_checkpoint(small_tuned), unmerged=True)
    path = folder / manifest.graphs["decoder"].path
    stored = {
        tensor.name: onnxfile.read(tensor, path.parent)
        for tensor in onnxfile.load(path).graph.initializer
    }
    name = "language_model.layers.1.self_attn.q_proj.weight"
    packed, scales = weights.nf4(f"model.{name}")
    np.testing.assert_array_equal(stored[f"{name}_nf4"], packed)
    np.testing.assert_array_equal(stored[f"{name}_scales"], scales)
    assert packed.dtype == np.uint8
    assert (packed.size, scales.size) == (256 * 256 // 2, 256 * 256 // 64)
