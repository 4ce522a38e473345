"""Tuned checkpoints one weight at a time: as merged in memory, bit for bit, and as they were
trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lvr_lite.config import load_settings
from lvr_lite.errors import BundleError, LvrError
from lvr_lite.export import apart, onnxfile
from lvr_lite.export import weights as weights_module
from lvr_lite.export.parity import StartsWithLatents, compare
from lvr_lite.export.weights import StoredWeights
from lvr_lite.export.write import write_bundle
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, decode
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.bundle import Bundle, Manifest
from lvr_lite.model.checkpoint import LVR_CONFIG, Checkpoint, read_checkpoint
from lvr_lite.model.weight_files import INDEX
from lvr_lite.quant.exact import ExactConvert
from lvr_lite.toy import build
from lvr_lite.train import load as nf4
from lvr_lite.train.finetune import finetune
from lvr_lite.train.trained_weights import TrainedWeights
from tests.short_run import SHORT_RUN

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
# names and shapes to the last tensor, by torch's loading and by export's reading

Tensors = dict[str, torch.Tensor]
Read = Callable[[Any], Mapping[str, torch.Tensor]]


def by_torch(checkpoint: Checkpoint) -> Tensors:
    return dict(nf4.load_plain(checkpoint).state_dict())


READS: list[Read] = [by_torch, TrainedWeights]


@pytest.fixture
def stored(
    small_checkpoint: Path, copied: Callable[[Path], Path]
) -> Callable[[Callable[[Tensors], Tensors]], Path]:
    """A copy of the small checkpoint whose file holds other tensors."""

    def change(how: Callable[[Tensors], Tensors]) -> Path:
        folder = copied(small_checkpoint)
        file = folder / "model.safetensors"
        save_file(how(load_file(file)), file, {"format": "pt"})
        return folder

    return change


def old_name(name: str) -> str:
    """As releases of transformers before 4.52 named it."""
    return name.replace("model.visual", "visual").replace("model.language_model", "model")


def new_name(name: str) -> str:
    """As transformers names it now."""
    if name.startswith("visual"):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


LAYOUTS: dict[str, Callable[[str], str]] = {
    "older": old_name,
    "newer": new_name,
    "ddp": lambda name: f"module.{name}",
    "ddp, newer": lambda name: f"module.{new_name(name)}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "peft": lambda name: f"base_model.model.{name}".replace("_proj.", "_proj.base_layer."),
    "ddp and peft": lambda name: f"module.base_model.model.{name}",
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_known_layouts_are_read(
    stored: Any, small_checkpoint: Path, layout: str, read: Read
) -> None:
    rename = LAYOUTS[layout]
    folder = stored(lambda tensors: {rename(old_name(n)): t for n, t in tensors.items()})
    got = read(read_checkpoint(folder))
    for name, value in by_torch(read_checkpoint(small_checkpoint)).items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("read", READS)
def test_shards_are_read_and_strays_are_not(
    small_checkpoint: Path, copied: Callable[[Path], Path], read: Read
) -> None:
    folder = copied(small_checkpoint)
    tensors = load_file(folder / "model.safetensors")
    half = len(tensors) // 2
    places: dict[str, str] = {}
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    # As large as the model: what is left of before it was sharded, and an EMA copy.
    stale = {name: tensor + 1 for name, tensor in tensors.items()}
    for name in ("model.safetensors", "model_ema.safetensors"):
        save_file(stale, folder / name, {"format": "pt"})
    got = read(read_checkpoint(folder))
    for name, value in by_torch(read_checkpoint(small_checkpoint)).items():
        assert torch.equal(got[name], value), name


UP_PROJ = "layers.1.mlp.up_proj.weight"


def key_of(tensors: Iterable[str], end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


def without(tensors: Tensors) -> Tensors:
    del tensors[key_of(tensors, UP_PROJ)]
    return tensors


def with_scale(tensors: Tensors) -> Tensors:
    key = key_of(tensors, UP_PROJ)
    return tensors | {f"{key}_scale_inv": torch.ones(6, 2)}


def packed(tensors: Tensors) -> Tensors:
    key = key_of(tensors, UP_PROJ)
    path = key.removesuffix("weight")
    codes = torch.zeros(32, 768, dtype=torch.int32)
    return without(tensors) | {f"{path}qweight": codes, f"{path}scales": torch.ones(2, 768)}


def in_fp8(tensors: Tensors) -> Tensors:
    key = key_of(tensors, UP_PROJ)
    return tensors | {key: tensors[key].to(torch.float8_e4m3fn)}


def of_another_shape(tensors: Tensors) -> Tensors:
    key = key_of(tensors, UP_PROJ)
    return tensors | {key: tensors[key][:5].clone()}


def twice(tensors: Tensors) -> Tensors:
    key = key_of(tensors, UP_PROJ)
    return tensors | {f"module.{key}": tensors[key].clone()}


def with_another_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors[key_of(tensors, "embed_tokens.weight")] + 1}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without, rf"1 weights are missing \(first: model\.language_model\.{UP_PROJ}\); give"),
        (with_scale, r"nothing takes 1 that are there \(first: \S+up_proj\.weight_scale_inv\)"),
        (
            packed,
            r"are missing .*, and nothing takes 2 \S.*first: \S+up_proj\.(scales|qweight)",
        ),
        (in_fp8, r"up_proj\.weight is stored as F8_E4M3; the weights are quantized already"),
        (of_another_shape, r"up_proj\.weight is \[5, 256\], config\.json asks for \[768, 256\]"),
        (twice, r"up_proj\.weight and \S+up_proj\.weight are both model\.language_model\."),
        (with_another_head, r"differs from \S+, and config\.json ties them"),
        (lambda tensors: {f"x.{n}": t for n, t in tensors.items()}, r"nothing takes \d+ .* x\."),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_refused_alike(
    stored: Any, change: Callable[[Tensors], Tensors], said: str, read: Read
) -> None:
    with pytest.raises(BundleError, match=said) as caught:
        read(read_checkpoint(stored(change)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", READS)
def test_a_head_that_is_not_tied_must_be_there(stored: Any, read: Read) -> None:
    folder = stored(dict)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        part["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"1 weights are missing \(first: lm_head\.weight\)"):
        read(read_checkpoint(folder))


@pytest.mark.parametrize("read", READS)
def test_what_transformers_passes_over_may_be_there(stored: Any, read: Read) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    read(read_checkpoint(stored(lambda tensors: tensors | {name: torch.ones(4)})))


# --------------------------------------------------------------------------------------------------
# adapters of other kinds


@pytest.mark.parametrize("load", [TrainedWeights, nf4.load_merged])
@pytest.mark.parametrize(
    ("settings", "tensor", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, None, r"holds lm_head trained whole \(modules_to_save"),
        ({"bias": "lora_only"}, None, r"holds trained biases \(bias: lora_only\)"),
        ({"peft_type": "IA3"}, None, "is IA3, not LoRA"),
        ({}, "lm_head.lora_A.weight", "adapts the embedding or the head"),
        ({}, "model.language_model.embed_tokens.lora_embedding_A", "adapts the embedding or"),
        ({}, "model.language_model.layers.0.self_attn.q_proj.bias", "itself, trained whole"),
        ({}, "lm_head.weight", "lm_head.weight itself, trained whole"),
    ],
)
def test_an_adapter_of_another_kind_is_said_as_what_it_is(
    small_tuned: Path,
    copied: Callable[[Path], Path],
    settings: dict[str, Any],
    tensor: str | None,
    said: str,
    load: Callable[[Any], Any],
) -> None:
    folder = copied(small_tuned)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    if tensor is not None:
        file = folder / "adapter_model.safetensors"
        save_file(load_file(file) | {f"base_model.model.{tensor}": torch.ones(4, 4)}, file)
    with pytest.raises(BundleError, match=said) as caught:
        load(read_checkpoint(folder))
    assert str(caught.value).endswith("and give the result as a base")


@pytest.mark.parametrize("settings", [{"alpha_pattern": [1]}, {"lora_alpha": [16]}])
def test_settings_of_an_adapter_of_another_kind_are_one_line(
    small_tuned: Path, copied: Callable[[Path], Path], settings: dict[str, Any]
) -> None:
    folder = copied(small_tuned)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | settings)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match="the adapter does not fit its base"):
        nf4.load_merged(read_checkpoint(folder))


def test_an_adapter_that_lacks_a_weight_is_refused(
    small_tuned: Path, copied: Callable[[Path], Path]
) -> None:
    """PEFT would start it at random."""
    folder = copied(small_tuned)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "1.self_attn.q_proj.lora_A" in name)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(
        BundleError, match=r"1 weights of the adapter are missing \(first \S+q_proj"
    ):
        nf4.load_merged(read_checkpoint(folder))


# --------------------------------------------------------------------------------------------------
# the gate's independent side


def test_all_weights_are_what_transformers_reads(small_tuned: Path) -> None:
    checkpoint = read_checkpoint(small_tuned)
    weights = TrainedWeights(checkpoint)
    assert apart.check_reading(checkpoint, weights.base()) == len(weights)


@pytest.mark.parametrize(
    "name", [f"{Q_PROJ}.weight", "lm_head.weight", "model.visual.merger.mlp.0.bias"]
)
def test_a_weight_that_is_misread_fails_the_gate(
    small_checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_checkpoint(small_checkpoint)
    read = StoredWeights.__getitem__

    def misread(self: StoredWeights, asked: str) -> torch.Tensor:
        weight = read(self, asked)
        return weight * 1.001 if asked == name else weight

    monkeypatch.setattr(StoredWeights, "__getitem__", misread)
    with pytest.raises(LvrError, match=rf"^parity: {name} is .*read"):
        apart.check_reading(checkpoint, TrainedWeights(checkpoint).base())


def test_weights_that_change_places_fail_the_gate(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_checkpoint(small_checkpoint)
    right = weights_module.parameter_names

    def swapped(keys: Sequence[str], model: Any) -> dict[str, str]:
        names = right(keys, model)
        one, other = (key_of(names, f"0.mlp.{n}_proj.weight") for n in ("up", "gate"))
        return names | {one: names[other], other: names[one]}

    monkeypatch.setattr(weights_module, "parameter_names", swapped)
    with pytest.raises(LvrError, match="is read as something else than transformers reads"):
        apart.check_reading(checkpoint, TrainedWeights(checkpoint).base())


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


# --------------------------------------------------------------------------------------------------
# a vocabulary without spare rows


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_vocabulary_grows_by_the_markers(
    small_checkpoint: Path,
    copied: Callable[[Path], Path],
    tmp_path: Path,
    export: Callable[[Any, Path], Any],
    tied: bool,
) -> None:
    """Tuned, merged and exported; the gate compares graphs with torch."""
    folder = copied(small_checkpoint)
    rows = read_checkpoint(folder).processor.tokens.lvr_start
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    config["text_config"]["vocab_size"] = rows
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    table = key_of(tensors, "embed_tokens.weight")
    tensors[table] = tensors[table][:rows].clone()
    if not tied:
        tensors["lm_head.weight"] = tensors[table].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    base = read_checkpoint(folder)
    assert apart.check_reading(base, TrainedWeights(base).base()) > 0
    out = tmp_path / "tuned"
    overrides = ["train.lr=1e-2", "latent.steps=2", "latent.method=lvr-free"]
    finetune(base, "scenes", out, load_settings(None, [*SHORT_RUN, *overrides]), say=print)
    tuned = read_checkpoint(out)
    merged = nf4.load_merged(tuned)
    markers = merged.get_output_embeddings().weight[rows:]
    assert markers.shape[0] == 3
    assert markers.abs().max() > 0
    export(tuned, tmp_path / "bundle")
