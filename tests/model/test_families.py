"""The parity suite that every family passes: a small random model, in transformers' own forward
pass, in ours, and as a bundle.

A new family adds its configuration to SMALL and nothing else (docs/families.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from lvr_lite.config import LatentSettings, load_settings
from lvr_lite.data.samples import Sample
from lvr_lite.export.hf import write_hf
from lvr_lite.export.parity import StartsWithLatents, compare
from lvr_lite.export.weights import StoredWeights, code_of, empty_model, origins
from lvr_lite.generate.ask import PictureCache, prepare_prompt
from lvr_lite.generate.decode import Options, Prompt, decode
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.runtime import Runtime
from lvr_lite.generate.torch import TorchRuntime, visual_tokens
from lvr_lite.model import families
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.families import Grid, ImageSpec
from lvr_lite.model.spec import LatentSpec
from lvr_lite.quant.products import Products
from lvr_lite.quant.quantize import quantize_bundle
from lvr_lite.quant.tune import Tuning
from lvr_lite.toy import build
from lvr_lite.train import load as nf4
from lvr_lite.train.batches import Collator
from lvr_lite.train.finetune import finetune
from lvr_lite.train.methods import METHODS
from lvr_lite.train.sft import LatentSFT
from tests.short_run import SHORT_RUN

STEPS = 3
# Of every family's text_config.
TEXT = {
    "num_hidden_layers": 3,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
}


@dataclass(frozen=True)
class Small:
    """A family's small model.

    config: transformers' class of its configuration.
    vision: its vision_config.
    text: what its text_config has beside TEXT.
    preprocessor: what its preprocessor_config.json has other than that of the embedded model.
    tokens: what its vocabulary has beside the embedded model's.
    template: its chat template; None for the embedded model's.
    """

    config: str
    vision: dict[str, object]
    text: dict[str, object] = field(default_factory=dict)
    preprocessor: dict[str, object] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    template: str | None = None


SMALL = {
    "qwen2_5_vl": Small(
        config="Qwen2_5_VLConfig",
        vision={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_heads": 3,
            "out_hidden_size": 128,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
    ),
    "qwen2_vl": Small(
        config="Qwen2VLConfig",
        vision={
            "depth": 3,
            "embed_dim": 96,
            "hidden_size": 128,
            "num_heads": 3,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
    ),
    "qwen3_vl": Small(
        config="Qwen3VLConfig",
        vision={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_heads": 3,
            "out_hidden_size": 128,
            "patch_size": 16,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        },
        text={"head_dim": 32},
        preprocessor={"patch_size": 16},
    ),
    "smolvlm": Small(
        config="SmolVLMConfig",
        vision={
            "num_hidden_layers": 2,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_attention_heads": 3,
            "image_size": 84,
            "patch_size": 14,
        },
        text={
            "model_type": "llama",
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        preprocessor={
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 168},
            "max_image_size": {"longest_edge": 84},
            "do_image_splitting": True,
            "min_pixels": None,
            "max_pixels": None,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        tokens=(
            "<image>",
            "<fake_token_around_image>",
            "<global-img>",
            *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)),
        ),
        template=(
            "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
            "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}Assistant:{% endif %}"
        ),
    ),
}


# Another name for the same architecture, with a configuration class of its own.
SMALL["idefics3"] = replace(SMALL["smolvlm"], config="Idefics3Config")


@dataclass(frozen=True)
class Case:
    """A family's small model and its checkpoint folder, read."""

    model: Any
    checkpoint: Checkpoint


def make_model(model_type: str) -> tuple[Any, Any]:
    """(model with random weights in float32, tokenizer)"""
    import transformers

    small = SMALL[model_type]
    family = families.get(model_type)
    tokenizer = build.make_tokenizer()
    tokenizer.add_special_tokens(list(small.tokens))
    ids = {name: tokenizer.token_to_id(name) for name in build.SPECIALS}
    vocabulary = {
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    config = getattr(transformers, small.config)(
        text_config=TEXT | small.text | vocabulary,
        vision_config=small.vision,
        tie_word_embeddings=True,
        image_token_id=tokenizer.token_to_id(family.image_token),
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(3)
    model = getattr(transformers, family.architecture)(config).float().eval()
    return model, tokenizer


@pytest.fixture(scope="module", params=families.KNOWN)
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    noticeable: Callable[[Any], Any],
) -> Case:
    small = SMALL[request.param]
    model, tokenizer = make_model(request.param)
    model = noticeable(model)
    folder = tmp_path_factory.mktemp("families") / request.param
    build.save(model, tokenizer, folder, torch.float32)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | small.preprocessor))
    if small.template is not None:
        (folder / "chat_template.jinja").write_text(small.template)
    return Case(model, replace(read_checkpoint(folder), latent=LatentSpec(steps=STEPS)))


@pytest.fixture(scope="module")
def bundle(
    case: Case, tmp_path_factory: pytest.TempPathFactory, export: Callable[[Any, Path], Any]
) -> Path:
    """The case as an fp32 bundle; writing it runs the export's own gate: each graph, and decodings
    through the latent loop.
    """
    target = tmp_path_factory.mktemp("bundles") / case.checkpoint.processor.family.model_type
    export(case.checkpoint, target)
    return target


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng([seed, width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES: dict[str, list[list[Image.Image]]] = {
    "square": [[noise(112, 112)]],
    "wide": [[noise(300, 100)]],
    "tall and small": [[noise(40, 130)]],
    "two pictures": [[noise(120, 64), noise(64, 180, 1)]],
    "none": [[]],
    "a padded batch": [[noise(200, 120)], [noise(64, 64), noise(90, 70)], [], [noise(56, 140)]],
}


QUESTIONS = ("what colour is the star", "where heart", "describe", "how many are red")


def runtimes(case: Case, bundle: Path) -> list[Runtime]:
    """The case under torch and under ONNX Runtime."""
    return [TorchRuntime(case.model, case.checkpoint), OnnxRuntime(Bundle.open(bundle))]


def prompts_of(
    runtime: Runtime, groups: Sequence[Sequence[Image.Image]], questions: Sequence[str]
) -> list[Prompt]:
    pairs = zip(groups, questions, strict=True)
    return [prepare_prompt(runtime, pictures, question)[0] for pictures, question in pairs]


def inputs_of_transformers(case: Case, groups: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
    """The pictures of a batch as transformers' own image processor prepares them."""
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen
    from transformers.models.smolvlm import image_processing_pil_smolvlm as smolvlm

    settings = json.loads((case.checkpoint.base / "preprocessor_config.json").read_text())
    if case.checkpoint.processor.family.tiled:
        names = ("size", "max_image_size", "do_image_splitting", "image_mean", "image_std")
        processor = smolvlm.SmolVLMImageProcessorPil(**{n: settings[n] for n in names})
        inputs = processor([list(group) for group in groups], return_tensors="pt")
        return {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
    size = {"shortest_edge": settings["min_pixels"], "longest_edge": settings["max_pixels"]}
    names = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
    processor = qwen.Qwen2VLImageProcessorPil(size=size, **{n: settings[n] for n in names})
    return dict(processor([picture for group in groups for picture in group], return_tensors="pt"))


def by_transformers(
    case: Case, groups: Sequence[Sequence[Image.Image]], questions: Sequence[str]
) -> list[np.ndarray]:
    """The last prompt position's hidden state (H,) of each row, from the model's own forward pass
    over a batch padded on the left, with the positions, the merging of visual tokens and all else
    that transformers does by itself.
    """
    processor = case.checkpoint.processor
    prompts = prompts_of(TorchRuntime(case.model, case.checkpoint), groups, questions)
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), processor.tokens.end[0])
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        first = longest - len(prompt.ids)
        ids[row, first:] = torch.from_numpy(prompt.ids)
        mask[row, first:] = 1
    inputs: dict[str, Any] = {}
    if any(groups):
        inputs = inputs_of_transformers(case, groups)
        if processor.family.position_axes == 3:
            inputs["mm_token_type_ids"] = (ids == processor.tokens.image).int()
    with torch.no_grad():
        out = case.model.model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs)
    return [state.numpy() for state in out.last_hidden_state[:, -1]]


def test_weights_are_read_one_by_one_as_transformers_reads_them(case: Case) -> None:
    empty = empty_model(case.checkpoint.config, case.checkpoint.processor.family)
    stored = StoredWeights(case.checkpoint, empty)
    wanted = nf4.load_plain(case.checkpoint).state_dict()
    assert set(stored) == set(dict(case.model.named_parameters(remove_duplicate=False)))
    for name, weight in stored.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, wanted[name]), name
    codes = origins(empty)
    assert len(codes) == len(list(case.model.parameters()))
    assert all(name == codes[code_of(parameter)] for name, parameter in empty.named_parameters())


@pytest.mark.parametrize("name", PICTURES)
def test_prompts_are_read_as_transformers_reads_them(case: Case, bundle: Path, name: str) -> None:
    groups = PICTURES[name]
    questions = QUESTIONS[: len(groups)]
    want = by_transformers(case, groups, questions)
    for runtime in runtimes(case, bundle):
        options = Options(max_tokens=1, steps=0, keep_hidden=True)
        results = decode(runtime, prompts_of(runtime, groups, questions), options)
        for result, state in zip(results, want, strict=True):
            compare(f"{name} under {type(runtime).__name__}", result.hidden[0], state, 1e-4)


@pytest.mark.parametrize("mode", ["open", "bottleneck"])
def test_torch_and_onnx_say_the_same_through_latents(case: Case, bundle: Path, mode: str) -> None:
    groups = [PICTURES["wide"][0], PICTURES["two pictures"][0], PICTURES["tall and small"][0]]
    questions = ["what pattern is the cross"] * len(groups)
    options = Options(max_tokens=5, min_tokens=5, keep_hidden=True)
    outcomes = []
    for runtime in runtimes(case, bundle):
        runtime.latent = LatentSpec(STEPS, "norm-matched", mode, 5.0)
        prompts = prompts_of(runtime, groups, questions)
        outcomes.append(decode(StartsWithLatents(runtime, STEPS), prompts, options))
    for want, got in zip(*outcomes, strict=True):
        assert got.tokens == want.tokens
        assert len(want.latents) == STEPS
        compare("latents", np.stack(got.latents), np.stack(want.latents), 1e-4)
        compare("hidden states", np.stack(got.hidden), np.stack(want.hidden), 1e-4)


@pytest.mark.parametrize("mode", ["open", "bottleneck"])
def test_a_decoder_graph_is_read_in_torch_as_by_onnxruntime(bundle: Path, mode: str) -> None:
    """What trains scales and norms after rounding (quant/tune.py) computes what the runtime does,
    through latents and deepstack.
    """
    opened = Bundle.open(bundle)
    runtime = OnnxRuntime(opened)
    runtime.latent = LatentSpec(STEPS, "norm-matched", mode, 5.0)
    prompts = [
        prepare_prompt(runtime, pictures, "where heart")[0]
        for pictures in (PICTURES["two pictures"][0], [])
    ]
    readings = Products(StartsWithLatents(runtime, STEPS), prompts, opened).readings()
    tuning = Tuning(opened, runtime, readings)
    assert len(readings) == (2 if mode == "open" else 4)
    for reading in readings:
        assert (reading.ids == runtime.processor.tokens.lvr).sum() > 0
        with torch.no_grad():
            compare("states", tuning.states(reading).numpy(), reading.states, 1e-5)


@pytest.mark.parametrize("mode", ["open", "bottleneck"])
@pytest.mark.parametrize("name", ["wide", "two pictures"])
def test_another_question_about_the_same_pictures_is_answered_as_if_they_were_read_again(
    case: Case, bundle: Path, mode: str, name: str
) -> None:
    options = Options(max_tokens=5, min_tokens=5, keep_hidden=True)
    for runtime in runtimes(case, bundle):
        runtime.latent = LatentSpec(STEPS, "norm-matched", mode, 5.0)
        known = PictureCache(runtime)
        for question in ("what pattern is the cross", "where heart", "how many are red"):
            pictures = [picture.copy() for picture in PICTURES[name][0]]  # known by what they show
            (again,) = decode(
                StartsWithLatents(runtime, STEPS),
                [known.prepare_prompt(pictures, question)[0]],
                options,
            )
            (anew,) = decode(
                StartsWithLatents(runtime, STEPS),
                [prepare_prompt(runtime, pictures, question)[0]],
                options,
            )
            assert again.tokens == anew.tokens
            compare("hidden states", np.stack(again.hidden), np.stack(anew.hidden), 1e-4)


def test_int8_says_nearly_the_same(case: Case, bundle: Path, tmp_path: Path) -> None:
    quantize_bundle(Bundle.open(bundle), tmp_path / "int8", "int8", print)
    prompts = [
        prepare_prompt(
            TorchRuntime(case.model, case.checkpoint), PICTURES["square"][0], "describe"
        )[0]
    ]
    folders = (bundle, tmp_path / "int8")
    whole, rounded = (
        decode(
            OnnxRuntime(Bundle.open(f)), prompts, Options(max_tokens=1, steps=0, keep_hidden=True)
        )[0].hidden[0]
        for f in folders
    )
    compare("int8", rounded, whole, 0.1)
    assert not np.array_equal(rounded, whole)


@pytest.mark.parametrize("feedback", ["identity", "norm-matched"])
def test_latents_are_trained_as_they_run(
    case: Case, feedback: Literal["identity", "norm-matched"]
) -> None:
    """Free-running latents of the training pass, over a padded batch, are those of the decode loop;
    targets are as wide as they.
    """
    settings = LatentSettings(method="lvr-free", steps=STEPS, feedback=feedback)
    groups = [PICTURES["wide"][0], PICTURES["tall and small"][0]]
    questions = QUESTIONS[:2]
    box = (0.1, 0.2, 0.7, 0.6)
    samples = [Sample(q, (), q, "red", boxes=(box,)) for q in questions]
    items = [(sample, tuple(group)) for sample, group in zip(samples, groups, strict=True)]
    sft = sft_of(case, settings)
    batch = Collator(case.checkpoint, settings)(items)
    with torch.no_grad():
        features = visual_tokens(case.model, batch["pixel_values"], batch["grid_thw"])
        embeds = sft.embed(batch["ids"], features)
        _, latents = sft.method.run(sft, embeds, batch, features[:0], forced=False)
        assert latents is not None
        targets = batch["pool"] @ features[:, : latents.shape[-1]]
        _, forced = sft.method.run(sft, embeds, batch, targets, forced=True)
    assert forced is not None
    assert latents.shape[-1] == case.model.config.text_config.hidden_size
    torch.testing.assert_close(forced.flatten(0, 1), sft.spec.fed(targets))
    runtime = TorchRuntime(case.model, replace(case.checkpoint, latent=sft.spec))
    prompts = prompts_of(runtime, groups, questions)
    results = decode(StartsWithLatents(runtime, STEPS), prompts, Options(max_tokens=1))
    for row, result in zip(latents, results, strict=True):
        compare("latents", row.numpy(), np.stack(result.latents), 1e-4)


def test_every_method_has_a_loss_of_its_own(case: Case) -> None:
    sample = Sample("one", (), "where heart", "red", boxes=((0.1, 0.2, 0.7, 0.6),))
    items = [(sample, tuple(PICTURES["wide"][0]))]
    losses = []
    for method in METHODS:
        settings = LatentSettings(method=method, steps=STEPS, loss="contrastive")  # type: ignore[arg-type]
        batch = Collator(case.checkpoint, settings)(items)
        with torch.no_grad():
            losses.append(float(sft_of(case, settings)(**batch)["loss"]))
    assert np.isfinite(losses).all()
    assert len(set(losses)) == len(METHODS), "two methods are one"


def sft_of(case: Case, settings: LatentSettings) -> LatentSFT:
    """The case in training, in eval mode."""
    tuned = SimpleNamespace(get_base_model=lambda: case.model)
    return LatentSFT(tuned, case.checkpoint.processor.tokens, settings, 5.0).eval()


def test_it_is_tuned_in_4_bits_and_exported(
    case: Case, tmp_path: Path, export: Callable[[Any, Path], Any]
) -> None:
    """Two steps of the default method: the right linears are in 4 bits and adapted, and what comes
    out passes the export's gate.
    """
    overrides = [
        "latent.method=lvr-bottleneck",
        "latent.loss=contrastive",
        "latent.feedback=norm-matched",
        f"latent.steps={STEPS}",
        "train.gradient_checkpointing=true",
        "train.dequantize=never",
    ]
    out = tmp_path / "tuned"
    settings = load_settings(None, [*SHORT_RUN, *overrides])
    metrics = finetune(case.checkpoint, "scenes", out, settings, say=print)
    assert metrics["steps"] == 2
    tuned = read_checkpoint(out)
    assert tuned.processor.family.model_type == case.checkpoint.processor.family.model_type
    assert (tuned.latent.mode, tuned.latent.steps) == ("bottleneck", STEPS)
    manifest = export(tuned, tmp_path / "bundle")
    assert manifest.parity["decoding"]["relative"] < 1e-4


def test_transformers_answers_from_its_folder_for_other_tools_as_the_decode_loop_does(
    case: Case, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    record = write_hf(case.checkpoint, nf4.load_merged(case.checkpoint), folder, "fp32", print)
    assert record["gate"]["prompts"] == 5
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [case.checkpoint.processor.family.architecture]
    again = read_checkpoint(folder)
    assert again.processor.tokens == case.checkpoint.processor.tokens
    assert again.processor.image == case.checkpoint.processor.image


def test_the_text_of_a_picture_is_that_of_transformers() -> None:
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    family = families.get("smolvlm")
    spec = ImageSpec(14, 2, 1, (0.5,) * 3, (0.5,) * 3, 84**2, 168**2, "lanczos", {"tile": 84})
    for rows, columns in ((0, 0), (1, 2), (3, 2)):
        wanted = get_image_prompt_string(
            rows, columns, 9, "<fake_token_around_image>", "<image>", "<global-img>"
        )
        assert family.picture_text(Grid(rows, columns), spec) == wanted


@pytest.mark.parametrize("side", [6, 27, 32, 14])
def test_learned_places_are_rounded_as_in_transformers(side: int) -> None:
    """It finds them by comparing fractions in float32; where 1 / side is not exact, that is not
    always the patch's own number.
    """
    from transformers.models.smolvlm.modeling_smolvlm import (
        SmolVLMVisionConfig,
        SmolVLMVisionEmbeddings,
    )

    embeddings = SmolVLMVisionEmbeddings(
        SmolVLMVisionConfig(hidden_size=1, image_size=2 * side, patch_size=2)
    ).requires_grad_(False)
    for parameter in embeddings.parameters():
        parameter.zero_()
    embeddings.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
    found = embeddings(
        torch.zeros(1, 3, 2 * side, 2 * side), torch.ones(1, side, side, dtype=torch.bool)
    )
    places = families.get("smolvlm").learned_places(side, 1)
    assert places.tolist() == found.flatten().long().tolist()


@pytest.mark.parametrize(
    ("model_type", "patch", "merge", "own", "pixels", "tokens"),
    [
        ("qwen2_vl", 14, 2, {}, 401_408, 494),
        ("qwen2_5_vl", 14, 2, {}, 401_408, 494),
        ("qwen3_vl", 16, 2, {}, 524_288, 494),
        ("smolvlm", 16, 4, {"tile": 512, "longest": 2048, "split": 1}, 786_432, 320),
        ("smolvlm", 14, 3, {"tile": 384, "longest": 1536, "split": 1}, 442_368, 405),
    ],
)
def test_recipes_shrink_a_photo_to_some_512_visual_tokens(
    model_type: str, patch: int, merge: int, own: dict[str, int], pixels: int, tokens: int
) -> None:
    """A photo of 4 : 3; the processor's own limit holds where it is lower."""
    family = families.get(model_type)
    image = ImageSpec(patch, merge, 2, (0.5,) * 3, (0.5,) * 3, 3136, 12_845_056, "bicubic", own)
    processor = replace(read_checkpoint("tiny").processor, family=family, image=image)
    assert processor.default_max_pixels == pixels
    small = processor.with_max_pixels(pixels)
    assert small.visual_tokens(small.grid_of(3000, 4000)) == tokens
    assert processor.with_max_pixels(50_176).default_max_pixels == 50_176
