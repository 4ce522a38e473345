"""Fine-tuning runs of a few steps on a small random model: what they leave, how they go on, and how
they end.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lvr_lite.config import Settings
from lvr_lite.errors import OutputError, UsageError
from lvr_lite.model.checkpoint import LVR_CONFIG, read_checkpoint
from lvr_lite.model.families import ImageSpec
from lvr_lite.train import finetune as module
from lvr_lite.train import load as nf4
from lvr_lite.train.run_folder import (
    COMPLETE,
    check_resumed,
    last_whole_checkpoint,
    origin_of,
    resume_point,
)
from tests.command_line import two_processes
from tests.tuning import TINY_RUN, losses, settings, tune


@pytest.fixture(scope="module")
def run(
    small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[str]]:
    """A whole run of four steps with two checkpoints and one evaluation: its folder, its metrics,
    what it lines.
    """
    out = tmp_path_factory.mktemp("run") / "out"
    metrics, lines = tune(small_checkpoint, out)
    return out, metrics, lines


Run = tuple[Path, dict[str, Any], list[str]]


def test_a_run_leaves_all_that_makes_a_checkpoint(run: Run, small_checkpoint: Path) -> None:
    out, _, _ = run
    expected = {
        "adapter_model.safetensors",
        "adapter_config.json",
        "lvr_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }
    expected |= {
        "preprocessor_config.json",
        "settings.yaml",
        "metrics.json",
        COMPLETE,
        "checkpoint-2",
        "checkpoint-4",
    }
    assert expected <= {p.name for p in out.iterdir()}
    assert not list(out.glob("**/*.bin"))
    assert not list(out.glob("**/model*.safetensors")), "the base was saved along"
    checkpoint = read_checkpoint(out)
    assert checkpoint.base == small_checkpoint.resolve()
    assert checkpoint.adapter
    assert checkpoint.latent.steps == 4


def test_a_run_leaves_its_resolved_settings(run: Run) -> None:
    assert yaml.safe_load((run[0] / "settings.yaml").read_text()) == settings().to_json()


def test_metrics_tell_every_step_and_the_evaluation(run: Run) -> None:
    out, metrics, lines = run
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["steps"] == 4
    assert list(losses(metrics)) == [1, 2, 3, 4]
    assert all(math.isfinite(v) for v in losses(metrics).values())
    parts = [h for h in metrics["history"] if "loss" in h]
    assert all(h["loss"] == pytest.approx(h["ce"] + 0.1 * h["latent"], rel=1e-2) for h in parts)
    evaluated = [h for h in metrics["history"] if "eval_loss" in h]
    assert [h["step"] for h in evaluated] == [4]
    assert {"eval_ce", "eval_latent", "eval_right", "eval_found"} <= set(evaluated[0])
    assert [h["step"] for h in metrics["history"] if "eval_accuracy" in h] == [4]
    assert [h["step"] for h in metrics["history"] if "eval_looked" in h] == [4]
    assert any("16 samples, 2 held out" in line for line in lines)
    assert metrics["trainable_parameters"] < 10**6


def test_training_learns(small_checkpoint: Path, tmp_path: Path) -> None:
    metrics, _ = tune(
        small_checkpoint,
        tmp_path / "out",
        "train.steps=12",
        "train.lr=5e-3",
        "data.count=2",
        "train.save_every=12",
        "train.eval_every=12",
    )
    found = losses(metrics)
    assert found[12] < 0.7 * found[1]


@pytest.mark.parametrize("step", [2, 4])
def test_every_saved_step_is_a_checkpoint_of_its_own(run: Run, step: int) -> None:
    folder = run[0] / f"checkpoint-{step}"
    assert (folder / COMPLETE).is_file()
    assert read_checkpoint(folder).latent.steps == 4
    nf4.load_trained(read_checkpoint(folder), torch.float32)


def test_the_last_checkpoint_holds_the_weights_of_the_run(run: Run) -> None:
    from safetensors.torch import load_file

    mine, last, before = (
        load_file(run[0] / p / "adapter_model.safetensors")
        for p in ("", "checkpoint-4", "checkpoint-2")
    )
    assert all(torch.equal(mine[n], last[n]) for n in mine)
    assert any(not torch.equal(mine[n], before[n]) for n in mine)


def killed(run: Run, folder: Path) -> Path:
    """The run as it would lie there had it been killed while it wrote its second checkpoint."""
    out = Path(shutil.copytree(run[0], folder))
    for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.json", COMPLETE):
        (out / name).unlink()
    (out / "checkpoint-4" / COMPLETE).unlink()
    (out / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"half")
    return out


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint_as_if_nothing_had_been(
    run: Run, small_checkpoint: Path, tmp_path: Path
) -> None:
    out = killed(run, tmp_path / "out")
    assert last_whole_checkpoint(out) == out / "checkpoint-2"
    metrics, lines = tune(small_checkpoint, out, resume=True)
    assert f"resuming from {out / 'checkpoint-2'}" in lines
    assert metrics["steps"] == 4
    again, whole = losses(metrics), losses(run[1])
    for step in (3, 4):
        assert again[step] == pytest.approx(whole[step], abs=1e-4)
    assert last_whole_checkpoint(out) == out / "checkpoint-4"
    assert (out / COMPLETE).is_file()


def test_resuming_brings_back_the_trained_weights(
    run: Run, small_checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    out = killed(run, tmp_path / "out")
    tune(small_checkpoint, out, resume=True)
    mine, whole = (load_file(folder / "adapter_model.safetensors") for folder in (out, run[0]))
    for name, weight in whole.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_without_its_marker_does_not_count(tmp_path: Path) -> None:
    for name, whole in (
        ("checkpoint-2", True),
        ("checkpoint-10", True),
        ("checkpoint-12", False),
        ("checkpoint-x", True),
    ):
        (tmp_path / name).mkdir()
        if whole:
            (tmp_path / name / COMPLETE).touch()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_folder_with_a_run_is_not_overwritten_unasked(run: Run, small_checkpoint: Path) -> None:
    before = (run[0] / "metrics.json").read_bytes()
    with pytest.raises(
        UsageError, match=r"exists; continue it with --resume, or choose another --out"
    ):
        tune(small_checkpoint, run[0])
    assert (run[0] / "metrics.json").read_bytes() == before


def test_a_file_in_the_place_of_out_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        tune(small_checkpoint, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_resuming_a_finished_run_trains_no_further(
    run: Run, small_checkpoint: Path, copied: Callable[[Path], Path]
) -> None:
    from safetensors.torch import load_file

    finished, before, _ = run
    out = copied(finished)
    (
        out / "adapter_model.safetensors"
    ).unlink()  # as after a kill between the last checkpoint and the end
    metrics, _ = tune(small_checkpoint, out, resume=True)
    assert metrics["steps"] == before["steps"] == 4
    mine, first = (
        load_file(str(folder / "adapter_model.safetensors")) for folder in (out, finished)
    )
    assert all(torch.equal(mine[name], first[name]) for name in first)


def test_a_run_is_not_resumed_over_another_base(
    run: Run, small_checkpoint: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    out, other = copied(run[0]), tmp_path / "other"
    shutil.copytree(small_checkpoint, other)
    weights = next(other.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    before = (out / "lvr_config.json").read_bytes()
    with pytest.raises(
        UsageError,
        match=r"was begun over another base than .*other, "
        r"whose weights have another sha256; give that one$",
    ):
        tune(other, out, resume=True)
    assert (out / "lvr_config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("latent.method=lvr-free", "latent.method: lvr-free, and lvr then"),
        ("latent.steps=8", "latent.steps: 8, and 4 then"),
        ("lora.alpha=64", "lora.alpha: 64, and 32 then"),
        ("lora.rank=8", "lora.rank: 8, and 4 then"),
        ("train.optimizer=adamw_torch", "train.optimizer: adamw_torch, and paged_adamw_8bit then"),
        ("train.lr=1e-2", "train.lr: 0.01, and 0.001 then"),
        ("max_pixels=50176", "max_pixels: 50176, and null then"),
        ("data.seed=3", "data.seed: 3, and 0 then"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(
    run: Run, small_checkpoint: Path, tmp_path: Path, override: str, said: str
) -> None:
    out = killed(run, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="was begun with other settings") as caught:
        tune(small_checkpoint, out, override, resume=True)
    key, then = said.split(":")[0], said.split(", and ")[1].removesuffix(" then")
    assert f"({said}); go on with --set {key}={then}, or choose" in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_may_go_on_longer_and_report_otherwise(
    run: Run, small_checkpoint: Path, tmp_path: Path
) -> None:
    out = killed(run, tmp_path / "out")
    longer = ("train.steps=5", "train.save_every=1", "train.log_every=2", "train.keep=1")
    metrics, _ = tune(small_checkpoint, out, *longer, "train.eval_every=5", resume=True)
    assert metrics["steps"] == 5


@pytest.mark.parametrize("which", ["data", "data.replay", "data.eval_file"])
def test_a_run_is_not_resumed_on_other_samples(
    scenes_file: Path, tmp_path: Path, which: str
) -> None:
    samples = Path(shutil.copyfile(scenes_file, tmp_path / "samples.jsonl"))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(scenes_file.read_text().splitlines(keepends=True)[1:]))
    own = settings(f"data.replay={samples}", f"data.eval_file={samples}")
    last = tmp_path / "checkpoint-2"
    last.mkdir()
    (last / LVR_CONFIG).write_text(json.dumps({"origin": origin_of(str(samples), own)}))
    moved = samples.rename(tmp_path / "renamed.jsonl")
    same = settings(f"data.replay={moved}", f"data.eval_file={moved}")
    check_resumed(last, same, origin_of(str(moved), same))
    name = str(moved)
    if which == "data":
        name = str(other)
    else:
        same = settings(
            *(f"{k}={other if k == which else moved}" for k in ("data.replay", "data.eval_file"))
        )
    with pytest.raises(UsageError, match=rf"was begun on other samples \({which}: \w+, and \w+ "):
        check_resumed(last, same, origin_of(name, same))


def test_drawn_samples_are_other_samples_than_a_files(scenes_file: Path, tmp_path: Path) -> None:
    (tmp_path / LVR_CONFIG).write_text(json.dumps({"origin": origin_of("scenes", settings())}))
    with pytest.raises(UsageError, match=r"\(data: \w{12}, and scenes then\)"):
        check_resumed(tmp_path, settings(), origin_of(str(scenes_file), settings()))


def test_a_run_of_an_earlier_version_is_resumed(
    run: Run, small_checkpoint: Path, tmp_path: Path
) -> None:
    """It recorded neither samples nor all settings."""
    out = killed(run, tmp_path / "out")
    last = out / "checkpoint-2"
    recorded = json.loads((last / LVR_CONFIG).read_text())
    del recorded["origin"]
    (last / LVR_CONFIG).write_text(json.dumps(recorded))
    older = yaml.safe_load((last / "settings.yaml").read_text())
    del older["grpo"], older["latent"]["samples"]
    (last / "settings.yaml").write_text(yaml.safe_dump(older))
    check_resumed(last, settings(), origin_of("scenes", settings()))


@pytest.mark.parametrize("there", [False, True])
def test_without_a_whole_checkpoint_there_is_nothing_to_resume(
    small_checkpoint: Path, tmp_path: Path, there: bool
) -> None:
    out = tmp_path / "out"
    if there:
        (out / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(UsageError, match="nothing to resume"):
        tune(small_checkpoint, out, resume=True)


def test_pictures_are_shrunk_in_training_as_they_will_be_later(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = []

    def stop(*arguments: Any) -> None:
        *_, collator = arguments
        images.append(collator.collator.checkpoint.processor.image)
        raise _Stopped

    monkeypatch.setattr(module, "LatentTrainer", stop)
    with pytest.raises(_Stopped):
        tune(small_checkpoint, tmp_path / "out", "max_pixels=6272")
    assert images == [read_checkpoint_spec(tmp_path / "out")]
    assert images[0].max_pixels == 6272


def test_pictures_have_the_usual_size_where_a_recipe_names_none(small_checkpoint: Path) -> None:
    checkpoint = read_checkpoint(small_checkpoint)
    large = replace(checkpoint, processor=checkpoint.processor.with_max_pixels(12_845_056))
    sized, settings = module.with_picture_size(large, Settings())
    assert settings.max_pixels == sized.processor.image.max_pixels == 401_408
    # A model's own smaller limit is kept, and not written down.
    assert module.with_picture_size(checkpoint, Settings()) == (checkpoint, Settings())
    chosen, settings = module.with_picture_size(large, Settings(max_pixels=6272))
    assert settings.max_pixels == chosen.processor.image.max_pixels == 6272


class _Stopped(Exception):
    pass


def read_checkpoint_spec(out: Path) -> ImageSpec:
    """The picture sizes with which a run that was stopped early would be read."""
    (out / "adapter_model.safetensors").write_bytes(b"weights")
    return read_checkpoint(out).processor.image


def test_a_full_disk_ends_the_run_in_one_line(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        OutputError, match=r"cannot be written \(No space left on device\); free some space"
    ):
        tune(small_checkpoint, tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# files of samples


def test_a_file_of_samples_trains(
    small_checkpoint: Path, scenes_file: Path, tmp_path: Path
) -> None:
    metrics, lines = tune(
        small_checkpoint,
        tmp_path / "out",
        "train.steps=1",
        "train.eval_every=1",
        "train.save_every=1",
        data=str(scenes_file),
    )
    assert metrics["steps"] == 1
    assert any("11 samples, 1 held out" in line for line in lines)


def official(scenes_file: Path, folder: Path) -> Path:
    """The first samples of a project file as an official LVR list."""
    items = []
    for i, line in enumerate(scenes_file.read_text().splitlines()[:6]):
        sample = json.loads(line)
        marks = "<lvr>" * len(sample["boxes"])
        turns = [
            {"from": "human", "value": f"<image>\n{sample['question']}"},
            {"from": "gpt", "value": f"{marks}\n<answer> {sample['answer']} </answer>"},
        ]
        image = str((scenes_file.parent / sample["image"]).resolve())
        items.append(
            {
                "dataset": "d",
                "split": "train",
                "question_id": i,
                "image": [image],
                "conversations": turns,
                "bboxes": sample["boxes"],
            }
        )
    (folder / "official.json").write_text(json.dumps(items))
    return folder / "official.json"


def test_an_official_lvr_list_trains(
    small_checkpoint: Path, scenes_file: Path, tmp_path: Path
) -> None:
    path = official(scenes_file, tmp_path)
    metrics, lines = tune(
        small_checkpoint,
        tmp_path / "out",
        "train.steps=1",
        "train.eval_every=1",
        "train.save_every=1",
        data=str(path),
    )
    assert metrics["steps"] == 1
    assert any("5 samples, 1 held out" in line for line in lines)


# --------------------------------------------------------------------------------------------------
# more than one process


@pytest.mark.processes
def test_two_processes_train_one_model_and_write_it_once(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    overrides = [f"--set={o}" for o in (*TINY_RUN, "train.steps=2", "train.eval_every=2")]
    run = ("finetune", "--model", small_checkpoint, "--data", "scenes", "--out", out)
    assert "Traceback" not in two_processes(*run, *overrides)
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["steps"], metrics["processes"]) == (2, 2)
    assert (out / COMPLETE).is_file()
    assert [p.name for p in out.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert not list(out.glob(".*tmp*"))
    nf4.load_trained(read_checkpoint(out), torch.float32)


def test_a_process_that_comes_late_does_not_take_the_run_for_an_earlier_one(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_checkpoint(small_checkpoint)
    (tmp_path / "settings.yaml").write_text("what the first process has begun to write")
    monkeypatch.setenv("RANK", "1")
    assert resume_point(tmp_path, False, checkpoint) is None
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="exists"):
        resume_point(tmp_path, False, checkpoint)
