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
from lvr_lite.model.bundle import Bundle
from lvr_lite.quant.form import check_form
from lvr_lite.quant.quantize import Converter
from lvr_lite.quant.schemes import plan_of


@pytest.mark.parametrize("name", synthetic.SHAPES)
def test_a_shape_is_a_checkpoint_whose_graphs_can_be_made(name: str) -> None:
    made = shape_of(name)
    model = empty_model(made.config, made.processor.family)
    found = graphs.specs(model, made.processor)
    assert set(found) == set(bundle.GRAPHS)
    layers = made.config["text_config"]["num_hidden_layers"]
    assert len(found["decoder"].outputs) == 1 + 2 * layers
    vocabulary = made.config["text_config"]["vocab_size"]
    assert (
        max(
            made.processor.tokens.image,
            made.processor.tokens.lvr_start,
            made.processor.tokens.lvr_end,
            *made.processor.tokens.end,
        )
        < made.processor.tokenizer.get_vocab_size()
        <= vocabulary
    )
    assert (
        made.processor.tokenizer.token_to_id(made.processor.family.image_token)
        == made.processor.tokens.image
    )


def test_an_unknown_shape_is_a_usage_error_that_names_the_known_ones() -> None:
    with pytest.raises(
        UsageError,
        match=f"--synthetic nope: not known; choose one of {', '.join(synthetic.SHAPES)}",
    ):
        shape_of("nope")


def test_weights_are_the_same_each_time_and_differ_by_name_and_seed() -> None:
    made = shape_of("smolvlm-256m")
    name = "model.text_model.layers.{}.mlp.up_proj.weight"
    one, two, other = SyntheticWeights(made), SyntheticWeights(made), SyntheticWeights(made, seed=1)
    assert torch.equal(one[name.format(3)], two[name.format(3)])
    assert not torch.equal(one[name.format(3)], one[name.format(4)])
    assert not torch.equal(one[name.format(3)], other[name.format(3)])
    assert one[name.format(3)].std() == pytest.approx(0.02, rel=0.01)
    assert torch.equal(one["model.text_model.layers.3.input_layernorm.weight"], torch.ones(576))
    assert not one["model.vision_model.encoder.layers.0.mlp.fc1.bias"].any()


@pytest.mark.parametrize("name", ["qwen2-vl-2b", "smolvlm-256m"])
def test_a_bundle_of_a_shape_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = deepcopy(synthetic.SHAPES[name])
    text, vision = shape["text_config"], shape["vision_config"]
    if name == "smolvlm-256m":
        text |= {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        text |= {"vocab_size": 1024}
        vision |= {
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 64,
        }
    else:
        text |= {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        text |= {"vocab_size": 1024}
        vision |= {"depth": 2, "embed_dim": 96, "hidden_size": 256, "num_heads": 3, "mlp_ratio": 2}
    monkeypatch.setitem(synthetic.SHAPES, name, shape)
    made = shape_of(name)
    convert = Converter(plan_of("int4"))
    manifest = write_bundle(
        made,
        SyntheticWeights(made),
        tmp_path / "out",
        [].append,
        precision="int4",
        convert=convert,
        source={"synthetic": name},
    ).manifest
    assert manifest.parity == {}
    assert manifest.source["synthetic"] == name
    assert {graph: one.precision for graph, one in manifest.graphs.items()} == dict.fromkeys(
        bundle.GRAPHS, "int8"
    ) | {"decoder": "int4"}
    told = json.loads((tmp_path / "out" / "report.json").read_text())["graphs"]
    assert told["decoder"]["replaced"] == 2 * 7
    assert told["lm_head"]["shared"] == shape["tie_word_embeddings"]
    opened = Bundle.open(tmp_path / "out")
    check_form(opened)
    runtime = OnnxRuntime(opened)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    )
    prompt, _ = prepare_prompt(runtime, [picture], "what is here")
    result = decode(
        StartsWithLatents(runtime, 4),
        [prompt],
        Options(max_tokens=3, min_tokens=3, keep_hidden=True),
    )[0]
    assert (len(result.latents), len(result.tokens)) == (4, 3)
    assert np.isfinite(np.stack(result.hidden)).all()
    assert len({state.tobytes() for state in result.hidden}) == len(result.hidden)
