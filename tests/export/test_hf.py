"""A folder for other tools: transformers answers from it as the decode loop does, without this
project.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lvr_lite.commands.export import export_hf
from lvr_lite.errors import LvrError, OutputError, UsageError
from lvr_lite.export import hf
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, decode
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import LVR_CONFIG, read_checkpoint
from lvr_lite.toy.make import scene_samples
from lvr_lite.train.load import load_merged
from tests.command_line import Call

# What a user of the folder has: transformers and a picture, and nothing of this project.
READER = """
import json, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

folder, picture, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
images = AutoImageProcessor.from_pretrained(folder, backend="pil")
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
inputs = dict(images(images=[Image.open(picture)], return_tensors="pt"))
visual = int(inputs["image_grid_thw"].prod()) // images.merge_size**2
content = [{"type": "image"}, {"type": "text", "text": question}]
text = tokenizer.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
)
text = text.replace("<|image_pad|>", "<|image_pad|>" * visual)
ids = tokenizer(text, return_tensors="pt")["input_ids"]
inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
out = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, **inputs)
assert not [name for name in sys.modules if name.startswith("lvr_lite")]
print(json.dumps({"prompt": ids[0].tolist(), "tokens": out[0, ids.shape[1]:].tolist()}))
"""


@pytest.fixture(scope="module")
def written(small_tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "fp32"
    export_hf(small_tuned, folder, "fp32")
    return folder


@pytest.fixture
def bottleneck(small_tuned: Path, copied: Callable[[Path], Path]) -> Path:
    """The tuned checkpoint as if its loop were a bottleneck."""
    folder = copied(small_tuned)
    file = folder / LVR_CONFIG
    content = json.loads(file.read_text())
    content["latent"]["mode"] = "bottleneck"
    file.write_text(json.dumps(content))
    return folder


def test_transformers_alone_gives_the_tokens_of_the_decode_loop_without_latents(
    written: Path, small_tuned: Path, tmp_path: Path
) -> None:
    sample, picture = next(iter(scene_samples(1, 0, "test")))
    picture.save(tmp_path / "picture.png")
    checkpoint = read_checkpoint(small_tuned)
    runtime = TorchRuntime(load_merged(checkpoint), checkpoint)
    prompt, _ = prepare_prompt(runtime, [picture], sample.question)
    (ours,) = decode(runtime, [prompt], Options(max_tokens=6, min_tokens=6, steps=0))
    call = [sys.executable, "-c", READER, str(written), str(tmp_path / "picture.png")]
    call.append(sample.question)
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs == {"prompt": prompt.ids.tolist(), "tokens": ours.tokens}


def test_weights_have_their_published_names_and_the_merged_values(
    written: Path, small_tuned: Path
) -> None:
    merged = load_merged(read_checkpoint(small_tuned))
    with safe_open(str(written / "model.safetensors"), "pt") as opened:
        names = set(opened.keys())
        stored = opened.get_tensor("model.layers.1.mlp.up_proj.weight")
    # llama.cpp's converter takes a vision tower only under this name.
    assert "visual.blocks.0.attn.qkv.weight" in names
    assert "lm_head.weight" not in names
    expected = merged.model.language_model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(stored, expected, rtol=0, atol=0)


def test_markers_are_declared_and_never_chosen(written: Path) -> None:
    processor = read_checkpoint(written).processor
    tokens = processor.tokens
    generation = json.loads((written / "generation_config.json").read_text())
    never = {tokens.image, tokens.lvr_start, tokens.lvr, tokens.lvr_end}
    assert set(generation["suppress_tokens"]) == never
    assert generation["eos_token_id"] == list(tokens.end)
    assert not generation["do_sample"]
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        declared = json.loads((written / file).read_text())["additional_special_tokens"]
        assert [t for t in declared if "lvr" in t] == ["<|lvr_start|>", "<|lvr|>", "<|lvr_end|>"]


def test_a_repetition_penalty_and_a_text_only_template_of_the_base_are_left_out(
    small_checkpoint: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    base = copied(small_checkpoint)
    generation = base / "generation_config.json"
    changes = {"repetition_penalty": 1.5, "do_sample": True, "temperature": 0.1}
    generation.write_text(json.dumps(json.loads(generation.read_text()) | changes))
    tokenizer = base / "tokenizer_config.json"
    template = {"chat_template": "{{ messages[0]['content'] + 'text' }}"}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | template))
    export_hf(base, tmp_path / "hf", "fp32")
    kept = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert not {"repetition_penalty", "temperature"} & set(kept)
    assert "chat_template" not in json.loads((tmp_path / "hf" / tokenizer.name).read_text())


def test_pictures_keep_the_size_that_was_tuned(
    small_tuned: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copied(small_tuned)
    file = folder / LVR_CONFIG
    content = json.loads(file.read_text())
    content["image"] = {"max_pixels": 12544}
    file.write_text(json.dumps(content))
    export_hf(folder, tmp_path / "hf", "fp32")
    preprocessor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert preprocessor["max_pixels"] == 12544


@pytest.mark.parametrize(("precision", "bytes_"), [("bf16", 2), ("fp16", 2)])
def test_each_precision_says_itself_and_takes_its_bytes(
    small_checkpoint: Path, tmp_path: Path, call: Call, precision: str, bytes_: int
) -> None:
    report = tmp_path / "report.json"
    done = call(
        *("export", small_checkpoint, tmp_path / "hf", "--for", "hf", "--json", report),
        *(() if precision == "bf16" else ("--precision", precision)),
    )
    assert done.code == 0, done.err
    written = json.loads(report.read_text())
    assert (written["schema"], written["for"]) == ("lvr-lite/export", "hf")
    assert written["precision"] == precision
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    long = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    assert config["dtype"] == long
    parameters = sum(p.numel() for p in load_merged(read_checkpoint(small_checkpoint)).parameters())
    assert written["bytes"] == pytest.approx(bytes_ * parameters, rel=0.02)


def test_rounding_changes_parameters_and_no_buffer(small_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(small_checkpoint)
    model = load_merged(checkpoint)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    before = model.lm_head.weight.clone()
    hf.write_hf(checkpoint, model, tmp_path / "hf", "bf16", print)
    torch.testing.assert_close(model.lm_head.weight, before.bfloat16().float(), rtol=0, atol=0)
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=0, atol=0)


def test_a_bottleneck_is_refused_unless_text_alone_is_accepted(
    bottleneck: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"bottleneck.*--text-only"):
        export_hf(bottleneck, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    written = export_hf(bottleneck, tmp_path / "hf", text_only=True)
    assert "8 latent steps" in written.report["lost"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--for", "gguf"), "--for gguf: must be hf"),
        (("--text-only",), "--text-only is for --for hf"),
        (("--for", "hf", "--precision", "int8"), "--precision int8: a folder for hf holds"),
        (("--for", "hf", "--text-only"), "--text-only: tiny was not tuned with a bottleneck"),
        (("--for", "hf", "--block", "32"), "--block: nothing is quantized with --for hf"),
        (("--precision", "bf16"), "--precision bf16: must be exact"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    tmp_path: Path, call: Call, options: tuple[str, ...], message: str
) -> None:
    done = call("export", "tiny", tmp_path / "out", *options)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_answers_otherwise_is_not_written(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_checkpoint(small_checkpoint)
    answers = hf._our_answers

    def others(model: Any, of: Any) -> list[list[int]]:
        tokens = answers(model, of)
        tokens[2][-1] += 1
        return tokens

    monkeypatch.setattr(hf, "_our_answers", others)
    with pytest.raises(LvrError, match="transformers answers prompt 3 with tokens"):
        hf.write_hf(checkpoint, load_merged(checkpoint), tmp_path / "hf", "fp32", print)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_folder_is_replaced_and_any_other_left_alone(
    small_checkpoint: Path, tmp_path: Path, call: Call
) -> None:
    target = tmp_path / "hf"
    for _ in range(2):
        assert call("export", small_checkpoint, target, "--for", "hf").code == 0
    assert (target / hf.RECORD).is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an earlier result"):
        export_hf(small_checkpoint, other)
    assert [path.name for path in other.iterdir()] == ["precious.txt"]


def test_optimum_has_the_command_with_the_same_options(tmp_path: Path) -> None:
    optimum = pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")
    call = [sys.executable, "-m", optimum.__name__, "export", "lvr"]
    help_ = subprocess.run([*call, "--help"], capture_output=True, text=True, check=True)
    for option in ("--precision", "--for hf", "--text-only", "--synthetic SHAPE", "--json"):
        assert option in help_.stdout
    done = subprocess.run(
        [*call, "tiny", str(tmp_path / "out"), "--for", "gguf"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: --for gguf: must be hf, or left out for a bundle"
