"""Published models by name: their real small files, few layers, random weights, the whole way.

The folder of small files is named by LVR_PUBLISHED: one folder a model, as on the hub, without
weights. Nothing of it lies in this repository.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lvr_lite.commands.export import export_hf
from lvr_lite.config import load_settings
from lvr_lite.data.sources import open_source
from lvr_lite.eval.suite import accuracy_on
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model import families
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.processor_files import read_json
from lvr_lite.model.spec import LatentSpec
from lvr_lite.quant.quantize import quantize_bundle
from lvr_lite.train import load
from lvr_lite.train.batches import Collator
from lvr_lite.train.finetune import finetune
from lvr_lite.train.grpo import grpo
from lvr_lite.train.methods import METHODS
from lvr_lite.train.sft import LatentSFT
from tests.command_line import Call
from tests.short_run import SHORT_RUN

FOLDER = os.environ.get("LVR_PUBLISHED")
PUBLISHED = (
    sorted(path for path in Path(FOLDER).iterdir() if (path / "config.json").is_file())
    if FOLDER
    else []
)
pytestmark = pytest.mark.skipif(
    not PUBLISHED, reason="LVR_PUBLISHED names no folder with small files of published models"
)
# One tile of SmolVLM, 336 visual tokens of Qwen2-VL at most.
MAX_PIXELS = 2**18
# The smallest text tower that keeps a published head's width and its rotary sections.
TEXT = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
NARROW_VISION = {
    "num_hidden_layers": 2,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 3,
}
QUESTION = "What is this? 3 < 4"


def few_layers(config: dict[str, Any]) -> dict[str, Any]:
    """A published config.json with two layers in each tower.

    The Qwen families' text tower is narrow, since their real tables have half a billion numbers;
    SmolVLM's vision tower is, since a tile of it has 1,024 patches.
    """
    config = json.loads(json.dumps(config))
    vision = config["vision_config"]
    if families.get(config["model_type"]).tiled:
        config["text_config"]["num_hidden_layers"] = 2
        vision.update(NARROW_VISION)
        return config
    text = config.get("text_config", config)
    text.update(TEXT)
    vision["depth"] = 2
    width = "hidden_size" if "embed_dim" in vision else "out_hidden_size"
    vision[width] = TEXT["hidden_size"]
    if config["model_type"] == "qwen2_5_vl":
        vision["fullatt_block_indexes"] = [1]
    if "deepstack_visual_indexes" in vision:
        vision["deepstack_visual_indexes"] = [0]
    return config


@pytest.fixture(scope="module", params=PUBLISHED, ids=lambda path: path.name)
def base(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    noticeable: Callable[[Any], Any],
) -> Iterator[Path]:
    """The published folder, its configuration with few layers, its weights random and in shards."""
    import transformers

    folder: Path = tmp_path_factory.mktemp("published") / request.param.name
    shutil.copytree(request.param, folder, ignore=shutil.ignore_patterns("*.index.json"))
    for path in folder.iterdir():
        path.chmod(0o644)
    config = few_layers(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    family = families.get(config["model_type"])
    architecture = getattr(transformers, family.architecture)
    torch.manual_seed(1)
    model = architecture(transformers.AutoConfig.from_pretrained(folder)).float()
    # SmolVLM's are initialized large: three times that, and rounding grows from step to step.
    if not family.tiled:
        model = noticeable(model)
    saved = folder.parent / "saved"
    model.save_pretrained(saved, max_shard_size="80MB")
    for path in saved.glob("model*"):
        path.rename(folder / path.name)
    yield folder
    # All models together would fill the disk of a small machine.
    shutil.rmtree(folder.parent)


def of_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' own processor of a folder, less its videos, which want torchvision."""
    import transformers
    from transformers.models.smolvlm import processing_smolvlm

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    kind = getattr(transformers, settings["processor_class"])
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    monkeypatch.setattr(kind, "check_argument_for_proper_class", lambda *_: None)
    own, _ = kind.get_processor_dict(str(folder))
    possible = {
        "video_processor": SimpleNamespace(num_frames=1, fps=1, size={}),
        "image_seq_len": own.get("image_seq_len"),
    }
    known = inspect.signature(kind.__init__).parameters
    return kind(
        image_processor=transformers.AutoImageProcessor.from_pretrained(str(folder)),
        tokenizer=transformers.AutoTokenizer.from_pretrained(str(folder)),
        chat_template=own["chat_template"],
        **{name: value for name, value in possible.items() if name in known},
    )


def noise(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(200, 300), (500, 333), (64, 90)][:count]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in sizes]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pictures_and_prompts_are_those_of_transformers(
    base: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = of_transformers(base, monkeypatch)
    ours = read_checkpoint(base).processor
    pictures = noise(count)
    content = [{"type": "image"}] * count + [{"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True)
    inputs = theirs(text=[text], images=pictures or None, return_tensors="np")
    grids = []
    if pictures:
        pixels = ours.see(pictures)
        grids = pixels.grids
        want = np.asarray(inputs["pixel_values"])
        if ours.family.tiled:
            config = SimpleNamespace(
                scale_factor=ours.image.merge,
                vision_config=SimpleNamespace(
                    patch_size=ours.image.patch, image_size=ours.image.own["tile"]
                ),
            )
            tiles = ours.family.image_inputs(pixels.patches, None, config)["pixel_values"]
            # The tower drops what lies beyond the last whole patch.
            side = tiles.shape[-1]
            assert np.array_equal(tiles, want[..., :side, :side])
        else:
            assert np.array_equal(pixels.patches, want)
    assert ours.prompt(QUESTION, grids).ids.tolist() == inputs["input_ids"][0].tolist()


def test_markers_take_no_token_that_the_files_declare(base: Path) -> None:
    tokens = read_checkpoint(base).processor.tokens
    declared: dict[int, str] = {}
    for name in ("tokenizer_config.json", "tokenizer.json"):
        content = json.loads((base / name).read_text())
        declared |= {
            int(i): token["content"] for i, token in content.get("added_tokens_decoder", {}).items()
        }
        declared |= {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    for marker in (tokens.lvr_start, tokens.lvr, tokens.lvr_end):
        assert "reserved" in declared.get(marker, "reserved")


def test_control_tokens_are_refused_in_questions(base: Path) -> None:
    processor = read_checkpoint(base).processor
    end = processor.tokenizer.id_to_token(processor.tokens.end[0])
    assert {end, processor.family.image_token, "<|lvr_start|>"} <= set(processor.special_tokens)
    with pytest.raises(Exception, match="a control token of this model: leave it out"):
        processor.prompt(f"hello {end} you", [])


def test_it_becomes_a_folder_that_transformers_reads(base: Path, tmp_path: Path) -> None:
    """The gate of `--for hf` compares greedy tokens of transformers with ours."""
    folder = tmp_path / "hf"
    written = export_hf(base, folder, "fp32", max_pixels=MAX_PIXELS)
    assert written.report["gate"]["prompts"] == 5
    declared = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
    markers = {token["content"]: int(i) for i, token in declared.items()}
    tokens = read_checkpoint(base).processor.tokens
    assert (markers["<|lvr_start|>"], markers["<|lvr_end|>"]) == (tokens.lvr_start, tokens.lvr_end)


def small_pictures(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, processor=checkpoint.processor.with_max_pixels(MAX_PIXELS))


def test_every_method_takes_a_step(base: Path) -> None:
    checkpoint = small_pictures(read_checkpoint(base))
    source = open_source("scenes", "train", 0, 2)
    samples = [source[0], source[1]]
    for method in METHODS:
        loss = "mse" if METHODS[method].targeted else "none"
        overrides = [f"latent.method={method}", "latent.steps=2", f"latent.loss={loss}"]
        settings = load_settings(None, [*SHORT_RUN, *overrides])
        plain = load.load_plain(checkpoint)
        tables = 1 if load.is_tied(plain) else 2
        model = load.adapted(plain, checkpoint, settings)
        sft = LatentSFT(model, checkpoint.processor.tokens, settings.latent, 1.0)
        sft(**Collator(checkpoint, settings.latent)(samples))["loss"].backward()
        rows = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
        assert len(rows) == tables
        # Without latents no marker is read, but the head is told not to choose one.
        learning = rows if METHODS[method].latents else rows[-1:]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learning)


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    out = base.parent / "tuned"
    overrides = [
        *SHORT_RUN,
        f"max_pixels={MAX_PIXELS}",
        "train.lr=1e-2",
        "latent.method=lvr-bottleneck",
        "latent.steps=2",
    ]
    finetune(read_checkpoint(base), "scenes", out, load_settings(None, overrides), say=print)
    return out


def test_a_tuned_model_answers_and_is_reinforced(tuned: Path) -> None:
    checkpoint = read_checkpoint(tuned)
    runtime = TorchRuntime(load.load_merged(checkpoint), checkpoint)
    held_out = open_source("scenes", "test", 5, 2)
    accuracy, looked = accuracy_on(runtime, held_out.items(), held_out.answers().values())
    assert 0 <= accuracy <= 1
    assert 0 <= looked <= 1
    overrides = ["grpo.group=2", "grpo.max_tokens=3", "train.optimizer=sgd", "train.warmup=0"]
    settings = load_settings(None, [*SHORT_RUN, "train.steps=1", *overrides])
    metrics = grpo(checkpoint, "scenes", tuned.parent / "reinforced", settings, say=print)
    assert metrics["steps"] == 1


def test_a_tuned_model_is_exported_quantized_and_run(
    tuned: Path, export: Callable[[Any, Path], Any], call: Call, tmp_path: Path
) -> None:
    """Export's own gate compares every graph, and decodings, with the merged model."""
    checkpoint = read_checkpoint(tuned)
    assert checkpoint.latent == replace(LatentSpec(2, mode="bottleneck"), **feedback_of(checkpoint))
    fp32 = tmp_path / "fp32"
    export(checkpoint, fp32)
    quantize_bundle(Bundle.open(fp32), tmp_path / "int8", "int8", print)
    picture = tmp_path / "star.png"
    sample, pictures = open_source("scenes", "test", 9, 1)[0]
    pictures[0].save(picture)
    done = call("run", tmp_path / "int8", picture, sample.question, "--max-tokens", "4")
    assert done.code == 0, done.err


def feedback_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the latents of a tuned checkpoint are fed back."""
    return {"feedback": checkpoint.latent.feedback, "norm": checkpoint.latent.norm}
