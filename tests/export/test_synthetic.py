"""Bundles of known shapes with random weights: every shape can be built, and one that is written
runs.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lvr_lite.errors import UsageError
from lvr_lite.export import graphs, synthetic
from lvr_lite.export.parity import StartsWithLatents
from lvr_lite.export.synthetic import SyntheticWeights, shape_of
from lvr_lite.export.weights import empty_model
from lvr_lite.export.write import write_bundle
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, decode
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.model import bundle
from lvr_lite.quant.form import check_form
from lvr_lite.quant.quantize import Converter
from lvr_lite.quant.schemes import plan_of

# What makes a shape small: {name: (changes of its text_config, of its vision_config)}
SMALL = {
    "qwen2-vl-2b": (
        {
            "num_hidden_layers": 2,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 1024,
        },
        {"depth": 2, "embed_dim": 96, "hidden_size": 256, "num_heads": 3, "mlp_ratio": 2},
    ),
    "smolvlm-256m": (
        {
            "num_hidden_layers": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 1024,
        },
        {
            "num_hidden_layers": 2,
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_attention_heads": 3,
            "image_size": 64,
        },
    ),
}


@pytest.mark.parametrize("name", synthetic.SHAPES)
def test_a_shape_is_a_checkpoint_whose_graphs_can_be_made(name: str) -> None:
    shape = shape_of(name)
    text = shape.config["text_config"]
    model = empty_model(shape.config, shape.processor.family)
    specs = graphs.specs(model, shape.processor)
    assert set(specs) == set(bundle.GRAPHS)
    assert len(specs["decoder"].outputs) == 1 + 2 * text["num_hidden_layers"]
    tokens = shape.processor.tokens
    tokenizer = shape.processor.tokenizer
    last = max(tokens.image, tokens.lvr_start, tokens.lvr_end, *tokens.end)
    assert last < tokenizer.get_vocab_size() <= text["vocab_size"]
    assert tokenizer.token_to_id(shape.processor.family.image_token) == tokens.image


def test_an_unknown_shape_is_a_usage_error_that_names_the_known_ones() -> None:
    with pytest.raises(
        UsageError,
        match=f"--synthetic nope: not known; choose one of {', '.join(synthetic.SHAPES)}",
    ):
        shape_of("nope")


def test_weights_are_the_same_each_time_and_differ_by_name_and_seed() -> None:
    shape = shape_of("smolvlm-256m")
    weights = SyntheticWeights(shape)
    third = "model.text_model.layers.3.mlp.up_proj.weight"
    fourth = "model.text_model.layers.4.mlp.up_proj.weight"
    assert torch.equal(weights[third], SyntheticWeights(shape)[third])
    assert not torch.equal(weights[third], weights[fourth])
    assert not torch.equal(weights[third], SyntheticWeights(shape, seed=1)[third])
    assert weights[third].std() == pytest.approx(0.02, rel=0.01)
    assert torch.equal(weights["model.text_model.layers.3.input_layernorm.weight"], torch.ones(576))
    assert not weights["model.vision_model.encoder.layers.0.mlp.fc1.bias"].any()


@pytest.mark.parametrize("name", SMALL)
def test_a_bundle_of_a_shape_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = deepcopy(synthetic.SHAPES[name])
    for part, changes in zip(("text_config", "vision_config"), SMALL[name], strict=True):
        config[part] |= changes
    monkeypatch.setitem(synthetic.SHAPES, name, config)
    shape = shape_of(name)
    written = write_bundle(
        shape,
        SyntheticWeights(shape),
        tmp_path / "out",
        print,
        precision="int4",
        convert=Converter(plan_of("int4")),
        source={"synthetic": name},
    )
    manifest = written.manifest
    assert manifest.parity == {}
    assert manifest.source["synthetic"] == name
    precisions = {graph: entry.precision for graph, entry in manifest.graphs.items()}
    assert precisions == dict.fromkeys(bundle.GRAPHS, "int8") | {"decoder": "int4"}
    reports = json.loads((written.folder / "report.json").read_text())["graphs"]
    assert reports["decoder"]["replaced"] == 2 * 7
    assert reports["lm_head"]["shared"] == config["tie_word_embeddings"]
    check_form(written)
    runtime = OnnxRuntime(written)
    noise = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    prompt, _ = prepare_prompt(runtime, [Image.fromarray(noise)], "what is here")
    options = Options(max_tokens=3, min_tokens=3, keep_hidden=True)
    (result,) = decode(StartsWithLatents(runtime, 4), [prompt], options)
    assert (len(result.latents), len(result.tokens)) == (4, 3)
    assert np.isfinite(np.stack(result.hidden)).all()
    assert len({state.tobytes() for state in result.hidden}) == len(result.hidden)
