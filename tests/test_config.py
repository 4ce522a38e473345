"""Settings: what is wrong is named with its file, key and value; what ships parses."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from lvr_lite.config import Settings, load_settings
from lvr_lite.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
RECIPES = [*sorted((ROOT / "configs").glob("*.y*ml")), Path(str(resources.files("lvr_lite") / "tiny" / "recipe.yaml"))]


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_settings(path, list(overrides))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_that_ships_parses(path: Path) -> None:
    assert load_settings(path) != Settings(), "a recipe that changes nothing"


def test_no_recipe_gives_the_defaults() -> None:
    assert load_settings(None) == Settings()


def test_an_empty_recipe_gives_the_defaults(tmp_path: Path) -> None:
    assert load_settings(recipe(tmp_path, "# nothing yet\n")) == Settings()


def test_a_recipe_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    found = load_settings(recipe(tmp_path, "train:\n  steps: 7\nmax_pixels: 50176\n")).to_json()
    expected = Settings().to_json()
    expected["train"]["steps"], expected["max_pixels"] = 7, 50176
    assert found == expected


def test_resolved_settings_read_back_the_same(tmp_path: Path) -> None:
    settings = load_settings(None, ["train.lr=3e-4", "data.eval_file=held-out.jsonl", "latent.targets=all"])
    assert load_settings(recipe(tmp_path, yaml.safe_dump(settings.to_json()))) == settings


@pytest.mark.parametrize(
    ("text", "key"), [("train:\n  stepz: 3\n", "train.stepz"), ("trane:\n  steps: 3\n", "trane"), ("steps: 3\n", "steps")]
)
def test_an_unknown_key_is_named_with_its_file_and_what_is_known(tmp_path: Path, text: str, key: str) -> None:
    said = refusal(recipe(tmp_path, text))
    assert said.startswith(f"{tmp_path / 'recipe.yaml'}: unknown key {key}; known here: ")
    assert ("steps" if "." in key else "train") in said.split("known here: ")[1]


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.steps=many", "train.steps must be int, not 'many'"),
        ("train.steps=1.5", "train.steps must be int, not 1.5"),
        ("train.steps=true", "train.steps must be int, not True"),
        ("train.lr=fast", "train.lr must be float, not 'fast'"),
        ("train.lr=true", "train.lr must be float, not True"),
        ("train.lr=[1]", "train.lr must be float, not [1]"),
        ("train.gradient_checkpointing=1", "train.gradient_checkpointing must be bool, not 1"),
        ("data.eval_file=3", "data.eval_file must be str or nothing, not 3"),
        ("max_pixels=big", "max_pixels must be int or nothing, not 'big'"),
        ("latent.targets=some", "latent.targets must be one of pooled, all, not 'some'"),
        ("latent.inputs=own", "latent.inputs must be one of teacher, free, not 'own'"),
        ("data.eval_file=[a]", "data.eval_file must be str or nothing, not ['a']"),
        ("train.precision=fp16", "train.precision must be one of auto, bf16, fp32, not 'fp16'"),
        ("train=3", "train is a section; write train.key"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(override: str, wanted: str) -> None:
    assert refusal(None, override) == f"--set: {wanted}"


@pytest.mark.parametrize(
    "override",
    [
        "latent.steps=0",
        "latent.weight=-0.1",
        "lora.rank=0",
        "lora.dropout=1.0",
        "data.count=0",
        "data.seed=-1",
        "train.steps=0",
        "train.batch=0",
        "train.accumulation=0",
        "train.lr=0",
        "train.lr=.nan",
        "train.lr=.inf",
        "train.warmup=1.0",
        "train.weight_decay=-1",
        "train.max_grad_norm=0",
        "train.save_every=0",
        "train.workers=-1",
        "train.seed=-1",
        "max_pixels=0",
        "max_pixels=-4",
    ],
)
def test_a_value_out_of_range_is_named(override: str) -> None:
    key, value = override.split("=")
    said = refusal(None, override)
    assert said.startswith(f"{key} must lie between ")
    assert said.endswith(f"not {float(value.replace('.nan', 'nan').replace('.inf', 'inf')):g}")


@pytest.mark.parametrize(
    ("overrides", "other"),
    [
        (["latent.targets=all", "train.gradient_checkpointing=false"], "latent.targets"),
        (["train.gradient_checkpointing=true"], "train.gradient_checkpointing"),
        ([], "train.gradient_checkpointing"),  # it is on by default
    ],
)
def test_free_latents_with_what_they_cannot_have_are_refused_by_both_keys(overrides: list[str], other: str) -> None:
    said = refusal(None, "latent.inputs=free", *overrides)
    assert "latent.inputs=free" in said
    assert other in said


def test_free_latents_are_taken_without_checkpointing() -> None:
    assert load_settings(None, ["latent.inputs=free", "train.gradient_checkpointing=false"]).latent.inputs == "free"


@pytest.mark.parametrize("optimizer", ["adam_of_mine", "", "3"])
def test_an_optimizer_that_is_not_supported_is_named(optimizer: str) -> None:
    assert "train.optimizer" in refusal(None, f"train.optimizer='{optimizer}'")


@pytest.mark.parametrize(("written", "read"), [("1e-4", 1e-4), ("2.5e-05", 2.5e-5), ("0.001", 1e-3), ("1", 1.0)])
def test_a_learning_rate_may_be_written_in_every_usual_way(tmp_path: Path, written: str, read: float) -> None:
    for settings in (load_settings(None, [f"train.lr={written}"]), load_settings(recipe(tmp_path, f"train:\n  lr: {written}\n"))):
        assert settings.train.lr == pytest.approx(read)
        assert type(settings.train.lr) is float


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("data.eval_file=a=b.jsonl", "data", "eval_file", "a=b.jsonl"),
        ("data.eval_file=null", "data", "eval_file", None),
        ("train.gradient_checkpointing=false", "train", "gradient_checkpointing", False),
        ("latent.targets=all", "latent", "targets", "all"),
    ],
)
def test_an_override_reads_its_value_as_yaml(override: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(load_settings(None, [override]), section), key) == value


def test_the_last_override_wins_over_the_recipe_and_those_before(tmp_path: Path) -> None:
    path = recipe(tmp_path, "train:\n  steps: 3\n  batch: 2\n")
    settings = load_settings(path, ["train.steps=4", "train.steps=5"])
    assert (settings.train.steps, settings.train.batch) == (5, 2)


@pytest.mark.parametrize("override", ["train.steps", "=3", ""])
def test_an_override_without_key_or_value_shows_how_to_write_one(override: str) -> None:
    assert "write it as section.key=value" in refusal(None, override)


def test_an_override_into_a_value_is_refused() -> None:
    assert "max_pixels is a value, not a section" in refusal(None, "max_pixels=9", "max_pixels.x=3")


def test_an_unknown_override_is_named() -> None:
    assert "unknown key train.stepz" in refusal(None, "train.stepz=3")


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert "--set train.lr=[: the value is not valid YAML" in refusal(None, "train.lr=[")


@pytest.mark.parametrize("text", ["train: [\n", "a: b: c\n", "\ttrain: 1\n"])
def test_malformed_yaml_is_refused_by_file(tmp_path: Path, text: str) -> None:
    assert refusal(recipe(tmp_path, text)).startswith(f"{tmp_path / 'recipe.yaml'}: not valid YAML (")


def test_bytes_that_are_no_text_are_refused_by_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"train: \xff\xfe\n")
    assert "not valid YAML" in refusal(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("text", ["- train\n", "steps\n", "3\n"])
def test_a_recipe_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    assert "must hold sections" in refusal(recipe(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml").startswith(f"{tmp_path / 'none.yaml'}: cannot be read")
