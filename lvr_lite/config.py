"""Settings of a fine-tuning run: frozen dataclasses, filled from a YAML recipe and `--set
section.key=value`. May import: the core, yaml.

Unknown keys, wrong types and contradictions are errors that name the key; the resolved settings are
written beside each checkpoint.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from lvr_lite.errors import UsageError


@dataclass(frozen=True)
class LatentSettings:
    """method: what is trained (lvr_lite/train/methods.py): "sft" (no latents), "dummy" (K times
    <|lvr|>), "lvr" (the paper: fed the targets), "lvr-free" (fed their own hidden states, as when
    running), "lvr-bottleneck" (the same, and text sees the latents alone).

    samples: which are answered through latents: "boxed", those with boxes, the others at once; or
    "all". steps: latent steps K at run time, and the number of "pooled" targets. targets: "pooled"
    (K means over the visual tokens of the boxes) or "all" (the paper: each of them, `max_targets`
    at most; method lvr alone). loss: of the latents: "mse" to the targets (the paper),
    "contrastive" (the tokens of the box against all others of the batch's pictures, cosine over
    `temperature`), or "none". weight: its λ (paper: 0.1), of the mean over the latents of one batch
    of a device. relax: the last share of the steps, in which λ falls to 0. feedback: what is fed
    back, as in lvr_lite/model/spec.py. warmup: share of the steps in which those that run freely
    are fed the targets.
    """

    method: Literal["sft", "dummy", "lvr", "lvr-free", "lvr-bottleneck"] = "lvr"
    samples: Literal["boxed", "all"] = "boxed"
    steps: int = 4
    targets: Literal["pooled", "all"] = "pooled"
    loss: Literal["mse", "contrastive", "none"] = "mse"
    weight: float = 0.1
    relax: float = 0.0
    temperature: float = 0.1
    feedback: Literal["identity", "norm-matched"] = "identity"
    warmup: float = 0.0
    max_targets: int = 256

    @property
    def runs_freely(self) -> bool:
        """Whether latents are fed their own hidden states in training."""
        return self.method in ("lvr-free", "lvr-bottleneck")


@dataclass(frozen=True)
class LoraSettings:
    """rank and alpha of the adapters on every linear layer of the language model; dropout in [0,
    1).
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0


@dataclass(frozen=True)
class DataSettings:
    """count: scenes to draw for `--data scenes`. seed: of the scenes. eval_file: held-out samples
    (JSONL); without it the last `eval_count` samples of a file, by picture, are held out.
    eval_count: samples that evaluation during training answers. group_by_length: batches of samples
    of about one length, those of a file (scenes are all of about one, and come as they are drawn).
    replay: samples of what the base can do already, mixed in so that it keeps it: a file, or
    "skills", those of the embedded model (drawn); replay_share: their share of all training
    samples.
    """

    count: int = 8000
    seed: int = 0
    replay: str | None = None
    replay_share: float = 0.2
    eval_file: str | None = None
    eval_count: int = 96
    group_by_length: bool = True


@dataclass(frozen=True)
class TrainSettings:
    """steps: optimizer steps. batch: samples a device and step; accumulation: such batches a step.
    lr: peak, cosine to zero after `warmup` (share of steps). precision: "auto" takes bf16 where the
    machine computes in it, else fp32. dequantize: "auto" holds the NF4 values of a small base
    (below 1e9 parameters) unpacked on a CPU: the same numbers, a faster step. eval_every,
    save_every: steps.
    """

    steps: int = 2500
    batch: int = 1
    accumulation: int = 16
    lr: float = 1e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: Literal[
        "paged_adamw_8bit",
        "adamw_8bit",
        "paged_adamw_32bit",
        "adamw_torch",
        "adamw_torch_fused",
        "sgd",
    ] = "paged_adamw_8bit"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    dequantize: Literal["auto", "never"] = "auto"
    gradient_checkpointing: bool = True
    eval_every: int = 250
    save_every: int = 250
    keep: int = 2
    log_every: int = 10
    workers: int = 0
    seed: int = 0


@dataclass(frozen=True)
class GrpoSettings:
    """Of stage 2 alone (lvr_lite/train/grpo.py). There `train.batch` is questions a device and
    step, and `latent`, `lora` are those of the checkpoint that it begins from.

    group: answers to each question. temperature: at which they are drawn. max_tokens: of an answer.
    updates: optimizer steps with each batch of answers. clip: the ratio of a choice's probabilities
    now and when it was drawn counts up to 1 ± clip. beta: weight of the KL divergence from the
    policy at the start. rewards: as in lvr_lite/train/rewards.py. rows: answers drawn, or scored,
    at once. latents: whether those of an answer are constants when it is scored ("recorded") or
    trained with it ("recomputed").
    """

    group: int = 8
    temperature: float = 1.0
    max_tokens: int = 32
    updates: int = 1
    clip: float = 0.2
    beta: float = 0.0
    rewards: str = "accuracy=1,format=0.2"
    rows: int = 16
    latents: Literal["recorded", "recomputed"] = "recorded"


@dataclass(frozen=True)
class Settings:
    """All of a run. max_pixels: pictures are shrunk to this area (pixels) before they are cut into
    patches; None takes the model's own.
    """

    latent: LatentSettings = field(default_factory=LatentSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.latent.targets == "all" and self.latent.method != "lvr":
            raise UsageError(
                f"latent.targets=all is for latent.method=lvr; {self.latent.method} has K places: set latent.targets=pooled"
            )
        if self.latent.warmup and not self.latent.runs_freely:
            raise UsageError(
                f"latent.warmup is for lvr-free and lvr-bottleneck; leave it out with latent.method={self.latent.method}"
            )
        if self.latent.loss == "none" and self.latent.method == "lvr":
            raise UsageError(
                "latent.method=lvr learns nothing about its latents with latent.loss=none: use mse or contrastive"
            )
        limits: list[tuple[str, float, float, float]] = [
            ("latent.steps", self.latent.steps, 1, 1024),
            ("latent.weight", self.latent.weight, 0, 1000),
            ("latent.relax", self.latent.relax, 0, 1),
            ("latent.temperature", self.latent.temperature, 1e-3, 100),
            ("latent.warmup", self.latent.warmup, 0, 1),
            ("latent.max_targets", self.latent.max_targets, 1, 16384),
            ("lora.rank", self.lora.rank, 1, 4096),
            ("lora.alpha", self.lora.alpha, 1, 65536),
            ("lora.dropout", self.lora.dropout, 0, 0.99),
            ("data.count", self.data.count, 1, 10**9),
            ("data.replay_share", self.data.replay_share, 0.01, 0.9),
            (
                "data.seed",
                self.data.seed,
                0,
                499_999,
            ),  # evaluation takes the seeds above (train/finetune.py)
            ("data.eval_count", self.data.eval_count, 1, 10**6),
            ("train.steps", self.train.steps, 1, 10**9),
            ("train.batch", self.train.batch, 1, 65536),
            ("train.accumulation", self.train.accumulation, 1, 65536),
            ("train.lr", self.train.lr, 1e-9, 1.0),
            ("train.warmup", self.train.warmup, 0, 0.99),
            ("train.weight_decay", self.train.weight_decay, 0, 10),
            ("train.max_grad_norm", self.train.max_grad_norm, 1e-6, 1e6),
            ("train.eval_every", self.train.eval_every, 1, 10**9),
            ("train.save_every", self.train.save_every, 1, 10**9),
            ("train.keep", self.train.keep, 1, 10**6),
            ("train.log_every", self.train.log_every, 1, 10**9),
            ("train.workers", self.train.workers, 0, 256),
            ("train.seed", self.train.seed, 0, 2**32 - 1),
            ("grpo.group", self.grpo.group, 2, 1024),
            ("grpo.temperature", self.grpo.temperature, 1e-3, 100),
            ("grpo.max_tokens", self.grpo.max_tokens, 1, 65536),
            ("grpo.updates", self.grpo.updates, 1, 1000),
            ("grpo.clip", self.grpo.clip, 1e-3, 100),
            ("grpo.beta", self.grpo.beta, 0, 1000),
            ("grpo.rows", self.grpo.rows, 1, 65536),
        ]
        if self.max_pixels is not None:
            limits.append(("max_pixels", self.max_pixels, 28 * 28, 10**9))
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise UsageError(f"{name} must lie between {low:g} and {high:g}, not {value:g}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_settings(recipe: Path | None, overrides: list[str] | None = None) -> Settings:
    """Settings from a YAML recipe (or the defaults) with `section.key=value` overrides. Raises
    UsageError naming file, key and value.
    """
    data: dict[str, Any] = {}
    if recipe is not None:
        data = _read_recipe(recipe)
    for override in overrides or []:
        _override(data, override)
    set_here = {override.partition("=")[0].strip() for override in overrides or []}

    def where(name: str) -> str:
        """What the user must look at to mend the key `name`."""
        return (
            "--set"
            if recipe is None or any(name == key or key.startswith(f"{name}.") for key in set_here)
            else str(recipe)
        )

    made = _fill(Settings, data, "", where)
    assert isinstance(made, Settings)
    return made


def _read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe over the one that its `extends` names, a path from the recipe's own folder."""
    data = _read_yaml(path)
    if "extends" not in data:
        return data
    other = data.pop("extends")
    if not isinstance(other, str):
        raise UsageError(f"{path}: extends must be the path of another recipe, not {other!r}")
    if (path.parent / other).resolve() in (path.resolve(), *above):
        raise UsageError(f"{path}: extends {other}, which extends it again")
    return _merged(_read_recipe(path.parent / other, (*above, path.resolve())), data)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = [k for k, v in over.items() if isinstance(v, dict) and isinstance(under.get(k), dict)]
    return under | over | {k: _merged(under[k], over[k]) for k in both}


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(
            f"{path}: must hold sections such as `train:`, not a {type(data).__name__}"
        )
    return data


def _override(data: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UsageError(
            f"--set {override}: write it as section.key=value, for example --set train.lr=2e-4"
        )
    *sections, last = key.strip().split(".")
    at = data
    for section in sections:
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise UsageError(f"--set {override}: {section} is a value, not a section")
    try:
        at[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: the value is not valid YAML") from error


def _fill(kind: Any, data: dict[str, Any], prefix: str, where: Callable[[str], str]) -> Any:
    hints = typing.get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise UsageError(
                f"{where(name)}: unknown key {name}; known here: {', '.join(sorted(known))}"
            )
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise UsageError(f"{where(name)}: {name} is a section; write {name}.key")
            values[key] = _fill(hint, value, f"{name}.", where)
        else:
            values[key] = _checked(hint, value, name, where)
    return kind(**values)


def _checked(hint: Any, value: Any, name: str, where: Callable[[str], str]) -> Any:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise UsageError(
                f"{where(name)}: {name} must be one of {', '.join(map(str, typing.get_args(hint)))}, not {value!r}"
            )
        return value
    allowed = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    if float in allowed and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except (TypeError, ValueError):
            pass
    if any(type(value) is a for a in allowed):
        return value
    wanted = " or ".join("nothing" if a is type(None) else a.__name__ for a in allowed)
    raise UsageError(f"{where(name)}: {name} must be {wanted}, not {value!r}")
