"""Settings: what is wrong is named with its file, key and value; what ships parses."""

from __future__ import annotations

import typing
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from lvr_lite.config import LatentSettings, Settings, TrainSettings, load_settings
from lvr_lite.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
TINY = Path(str(resources.files("lvr_lite") / "toy" / "recipe.yaml"))
RECIPES = [*sorted((ROOT / "configs").glob("**/*.y*ml")), TINY]
METHODS = typing.get_args(typing.get_type_hints(LatentSettings)["method"])


def recipe(tmp_path: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
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


def test_the_recipes_of_the_methods_differ_in_their_latents_alone() -> None:
    tiny = load_settings(TINY)
    recipes = [load_settings(path) for path in (ROOT / "configs" / "methods").iterdir()]
    assert {settings.latent.method for settings in recipes} == set(METHODS)
    assert all(replace(settings, latent=tiny.latent) == tiny for settings in recipes)


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_of_a_method_is_named_after_it(method: str) -> None:
    assert load_settings(ROOT / "configs" / "methods" / f"{method}.yaml").latent.method == method


def test_no_recipe_gives_the_defaults() -> None:
    assert load_settings(None) == Settings()


def test_an_empty_recipe_gives_the_defaults(tmp_path: Path) -> None:
    assert load_settings(recipe(tmp_path, "# nothing yet\n")) == Settings()


def test_a_recipe_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    settings = load_settings(recipe(tmp_path, "train:\n  steps: 7\nmax_pixels: 50176\n"))
    assert settings == Settings(train=TrainSettings(steps=7), max_pixels=50176)


def test_resolved_settings_read_back_the_same(tmp_path: Path) -> None:
    settings = load_settings(
        None, ["train.lr=3e-4", "data.eval_file=held-out.jsonl", "latent.targets=all"]
    )
    assert load_settings(recipe(tmp_path, yaml.safe_dump(settings.to_json()))) == settings


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("train:\n  stepz: 3\n", "train.stepz"),
        ("trane:\n  steps: 3\n", "trane"),
        ("steps: 3\n", "steps"),
    ],
)
def test_an_unknown_key_is_named_with_its_file_and_what_is_known(
    tmp_path: Path, text: str, key: str
) -> None:
    message = refusal(recipe(tmp_path, text))
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}: unknown key {key}; known here: ")
    assert ("steps" if "." in key else "train") in message.split("known here: ")[1]


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
        (
            "latent.method=free",
            "latent.method must be one of sft, dummy, lvr, lvr-free, lvr-bottleneck, not 'free'",
        ),
        ("latent.loss=cosine", "latent.loss must be one of mse, contrastive, none, not 'cosine'"),
        # In YAML, none is a word.
        ("latent.loss=null", "latent.loss must be one of mse, contrastive, none, not None"),
        (
            "latent.feedback=token",
            "latent.feedback must be one of identity, norm-matched, not 'token'",
        ),
        ("latent.warmup=half", "latent.warmup must be float, not 'half'"),
        ("train.dequantize=true", "train.dequantize must be one of auto, never, not True"),
        ("data.eval_file=[a]", "data.eval_file must be str or nothing, not ['a']"),
        ("train.precision=fp8", "train.precision must be one of auto, bf16, fp16, fp32, not 'fp8'"),
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
        "latent.temperature=0",
        "latent.temperature=.nan",
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
    message = refusal(None, override)
    assert message.startswith(f"{key} must lie between ")
    assert message.endswith(f"not {float(value.replace('.nan', 'nan').replace('.inf', 'inf')):g}")


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lvr"])
def test_all_tokens_as_targets_are_for_lvr_alone(method: str) -> None:
    message = refusal(None, "latent.targets=all", f"latent.method={method}")
    assert "latent.targets=all" in message
    assert method in message
    assert load_settings(None, ["latent.targets=all", "latent.method=lvr"]).latent.targets == "all"


@pytest.mark.parametrize("method", METHODS)
def test_a_warm_up_is_for_methods_that_run_freely(method: str) -> None:
    overrides = [f"latent.method={method}", "latent.warmup=0.25"]
    if method in ("lvr-free", "lvr-bottleneck"):
        assert load_settings(None, overrides).latent.warmup == 0.25
    else:
        message = refusal(None, *overrides)
        assert "latent.warmup" in message
        assert f"latent.method={method}" in message


@pytest.mark.parametrize("method", ["lvr-free", "lvr-bottleneck"])
@pytest.mark.parametrize("value", ["-0.1", "1.5", ".nan"])
def test_a_warm_up_is_a_share(method: str, value: str) -> None:
    assert refusal(None, f"latent.method={method}", f"latent.warmup={value}").startswith(
        "latent.warmup must lie between 0 and 1, not "
    )


def test_lvr_without_a_loss_of_its_latents_is_refused_by_both_keys() -> None:
    message = refusal(None, "latent.method=lvr", "latent.loss=none")
    assert "latent.method=lvr" in message
    assert "latent.loss=none" in message
    assert (
        load_settings(None, ["latent.method=lvr-bottleneck", "latent.loss=none"]).latent.loss
        == "none"
    )


@pytest.mark.parametrize("optimizer", ["adam_of_mine", "", "3"])
def test_an_optimizer_that_is_not_supported_is_named(optimizer: str) -> None:
    assert "train.optimizer" in refusal(None, f"train.optimizer='{optimizer}'")


@pytest.mark.parametrize(
    ("written", "read"), [("1e-4", 1e-4), ("2.5e-05", 2.5e-5), ("0.001", 1e-3), ("1", 1.0)]
)
def test_a_learning_rate_may_be_written_in_every_usual_way(
    tmp_path: Path, written: str, read: float
) -> None:
    for settings in (
        load_settings(None, [f"train.lr={written}"]),
        load_settings(recipe(tmp_path, f"train:\n  lr: {written}\n")),
    ):
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
def test_an_override_reads_its_value_as_yaml(
    override: str, section: str, key: str, value: Any
) -> None:
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


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert "--set train.lr=[: the value is not valid YAML" in refusal(None, "train.lr=[")


@pytest.mark.parametrize("text", ["train: [\n", "a: b: c\n", "\ttrain: 1\n"])
def test_malformed_yaml_is_refused_by_file(tmp_path: Path, text: str) -> None:
    assert refusal(recipe(tmp_path, text)).startswith(
        f"{tmp_path / 'recipe.yaml'}: not valid YAML ("
    )


def test_bytes_that_are_no_text_are_refused_by_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"train: \xff\xfe\n")
    assert "not valid YAML" in refusal(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("text", ["- train\n", "steps\n", "3\n"])
def test_a_recipe_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    assert "must hold sections" in refusal(recipe(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml").startswith(f"{tmp_path / 'none.yaml'}: cannot be read")


# --------------------------------------------------------------------------------------------------
# extends


def test_a_recipe_over_another_changes_what_it_names_in_its_sections_and_nothing_else(
    tmp_path: Path,
) -> None:
    recipe(
        tmp_path,
        "train:\n  steps: 7\n  batch: 2\nlora:\n  rank: 8\nmax_pixels: 50176\n",
        "under.yaml",
    )
    path = recipe(
        tmp_path, "extends: under.yaml\ntrain:\n  steps: 9\n  keep: 5\ndata:\n  seed: 3\n"
    )
    expected = Settings().to_json()
    expected["train"] |= {"steps": 9, "batch": 2, "keep": 5}
    expected["lora"]["rank"] = 8
    expected["data"]["seed"] = 3
    expected["max_pixels"] = 50176
    assert load_settings(path).to_json() == expected
    assert load_settings(path, ["train.batch=4"]).train.batch == 4


def test_a_recipe_may_undo_a_value_of_the_one_below(tmp_path: Path) -> None:
    recipe(tmp_path, "max_pixels: 50176\n", "under.yaml")
    assert (
        load_settings(recipe(tmp_path, "extends: under.yaml\nmax_pixels: null\n")).max_pixels
        is None
    )


def test_a_path_in_extends_counts_from_the_recipes_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path, "train:\n  steps: 1\n", "a/bottom.yaml")
    recipe(tmp_path, "extends: ../a/bottom.yaml\ntrain:\n  batch: 3\n", "b/middle.yaml")
    recipe(tmp_path, "extends: b/middle.yaml\ntrain:\n  keep: 4\n", "top.yaml")
    recipe(tmp_path, "train:\n  steps: 99\n", "elsewhere/b/middle.yaml")
    monkeypatch.chdir(tmp_path / "elsewhere")
    train = load_settings(Path("..") / "top.yaml").train
    assert (train.steps, train.batch, train.keep) == (1, 3, 4)
    absolute = recipe(
        tmp_path, f"extends: {tmp_path / 'b' / 'middle.yaml'}\n", "elsewhere/deep/absolute.yaml"
    )
    assert load_settings(absolute).train.batch == 3


@pytest.mark.parametrize("ring", [["a"], ["a", "b"], ["a", "b", "c"]], ids=len)
def test_recipes_that_extend_each_other_in_a_ring_are_refused(
    tmp_path: Path, ring: list[str]
) -> None:
    for name, other in zip(ring, ring[1:] + ring[:1], strict=True):
        recipe(tmp_path, f"extends: ./{other}.yaml\n", f"{name}.yaml")
    message = refusal(tmp_path / "a.yaml")
    assert message == f"{tmp_path / ring[-1]}.yaml: extends ./a.yaml, which extends it again"


def test_a_ring_that_does_not_hold_the_first_recipe_is_refused(tmp_path: Path) -> None:
    recipe(tmp_path, "extends: a.yaml\n", "b.yaml")
    recipe(tmp_path, "extends: b.yaml\n", "a.yaml")
    assert "extends a.yaml, which extends it again" in refusal(
        recipe(tmp_path, "extends: a.yaml\n")
    )


def test_a_missing_recipe_below_is_named(tmp_path: Path) -> None:
    message = refusal(recipe(tmp_path, "extends: none.yaml\n"))
    assert message == f"{tmp_path / 'none.yaml'}: cannot be read (No such file or directory)"


def test_a_malformed_recipe_below_is_named(tmp_path: Path) -> None:
    recipe(tmp_path, "train: [\n", "under.yaml")
    assert refusal(recipe(tmp_path, "extends: under.yaml\n")).startswith(
        f"{tmp_path / 'under.yaml'}: not valid YAML ("
    )


@pytest.mark.parametrize(
    ("written", "read"),
    [("3", "3"), ("[a.yaml]", "['a.yaml']"), ("null", "None"), ("{a: b}", "{'a': 'b'}")],
)
def test_extends_must_be_a_path(tmp_path: Path, written: str, read: str) -> None:
    path = recipe(tmp_path, f"extends: {written}\n")
    assert refusal(path) == f"{path}: extends must be the path of another recipe, not {read}"


def test_a_key_from_below_that_is_unknown_is_named_with_the_recipe_that_was_asked_for(
    tmp_path: Path,
) -> None:
    recipe(tmp_path, "train:\n  stepz: 3\n", "under.yaml")
    path = recipe(tmp_path, "extends: under.yaml\n")
    assert refusal(path).startswith(f"{path}: unknown key train.stepz")


def test_an_automatic_size_of_pictures_is_none_that_is_named(tmp_path: Path) -> None:
    assert load_settings(recipe(tmp_path, "max_pixels: auto\n")).max_pixels is None
    assert (
        load_settings(recipe(tmp_path, "max_pixels: 50176\n"), ["max_pixels=auto"]).max_pixels
        is None
    )
