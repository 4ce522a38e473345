"""Settings of a training run: frozen dataclasses, filled from a YAML recipe and `--set
section.key=value`. May import: the standard library, yaml (inside functions), `errors`, `files`.

Unknown keys, wrong types and contradictions are errors that name the key. The resolved settings are
written beside each checkpoint.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lvr_lite.errors import UsageError
from lvr_lite.files import JsonObject

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = TypeVar("Section", bound="DataclassInstance")


@dataclass(frozen=True)
class LatentSettings:
    """How latents are trained.

    method: what is fed in the places of latents, and what the text sees
        (lvr_lite/train/methods.py).
        "sft": there are no latents.
        "dummy": K times the embedding of <|lvr|>.
        "lvr": the targets (the paper).
        "lvr-free": the model's own hidden states, as when running.
        "lvr-bottleneck": the same, and the text sees the latents alone.
    samples: which are answered through latents; the others are answered at once. "boxed": those
        with boxes. "all": every one.
    steps: latent steps K at run time, and the number of "pooled" targets.
    targets: of latents. "pooled": K means over the visual tokens of the boxes. "all": each of these
        tokens, `max_targets` at most (the paper; for method "lvr" alone).
    loss: of latents. "mse": to the targets (the paper). "contrastive": the tokens of the box
        against all others of the batch's pictures, by cosine over `temperature`. "none".
    weight: of that loss, a mean over the latents of one batch of a device; the paper's λ is 0.1.
    relax: share of the steps, the last ones, in which `weight` falls to 0.
    temperature: of the contrastive loss.
    feedback: what a hidden state becomes before it is fed (lvr_lite/model/spec.py).
    warmup: share of the steps, the first ones, in which methods that run freely are fed the
        targets.
    max_targets: of a sample, with targets "all".
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
        """Whether training feeds latents their own hidden states."""
        return self.method in ("lvr-free", "lvr-bottleneck")


@dataclass(frozen=True)
class LoraSettings:
    """The adapters on every linear layer of the language model.

    rank, alpha: as LoRA has them; what an adapter adds is scaled by alpha / rank.
    dropout: share of an adapter's inputs, in [0, 1).
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0


@dataclass(frozen=True)
class DataSettings:
    """Which samples are trained on, and which are held out.

    count: scenes to draw for `--data scenes`.
    seed: of these scenes.
    replay: samples of what the base can do already, mixed in so that it does not forget it: a file,
        or "skills", which draws what the embedded model was pre-trained in.
    replay_share: share of the replayed ones in all samples of training.
    eval_file: held-out samples. Without it the last `eval_count` samples of a file are held out,
        by picture.
    eval_count: held-out samples that evaluation during training answers.
    group_by_length: put samples of about one length into a batch. Drawn scenes are all of about one
        length, and come in the order in which they are drawn.
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
    """How it is trained.

    steps: optimizer steps.
    batch: samples that a device reads at once.
    accumulation: batches a step.
    lr: the highest learning rate; it falls to zero along a cosine.
    warmup: share of the steps, the first ones, in which the learning rate rises.
    weight_decay, max_grad_norm: as transformers has them.
    optimizer: by its name in transformers.
    precision: "auto" takes bf16 where the machine is fast at it, else fp16 (with a gradient scaler)
        on a card and fp32 on a CPU. Losses, norms and what is fed back are in fp32 always.
    dequantize: "auto" holds the NF4 values of a small base (below 1e9 parameters) unpacked on a
        CPU: the same numbers, a faster step.
    gradient_checkpointing: compute again what the backward pass needs, instead of keeping it.
    cache_visual_tokens: GiB of the user's cache folder in which the visual tokens of the frozen
        tower are kept, for later epochs, evaluations and runs; 0 keeps none.
    eval_every, save_every, log_every: in steps.
    keep: how many of the last checkpoints stay.
    max_skipped: how many steps of the run may be left out because their loss or gradient is not
        finite; one more ends it.
    workers: processes that prepare batches; with 0 the training process does.
    seed: of adapters, the order of samples, and drawn answers.
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
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    dequantize: Literal["auto", "never"] = "auto"
    gradient_checkpointing: bool = True
    cache_visual_tokens: float = 0.0
    eval_every: int = 250
    save_every: int = 250
    keep: int = 2
    log_every: int = 10
    max_skipped: int = 10
    workers: int = 0
    seed: int = 0


@dataclass(frozen=True)
class GrpoSettings:
    """Stage 2 alone (lvr_lite/train/grpo.py). There `train.batch` counts questions, and `latent`
    and `lora` are those of the checkpoint that it begins from.

    group: answers to each question.
    temperature: at which they are drawn.
    max_tokens: of an answer.
    updates: optimizer steps with each batch of answers.
    clip: the probability of a choice now, over that when it was drawn, counts within 1 ± clip.
    beta: weight of the KL divergence from the policy at the start.
    rewards: names and weights (lvr_lite/train/rewards.py).
    rows: answers that are drawn, or scored, at once.
    latents: of an answer that is scored. "recorded": those that were drawn, as constants.
        "recomputed": found again, and trained with the answer.
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


# The lowest and the highest value of each number.
LIMITS: dict[str, tuple[float, float]] = {
    "latent.steps": (1, 1024),
    "latent.weight": (0, 1000),
    "latent.relax": (0, 1),
    "latent.temperature": (1e-3, 100),
    "latent.warmup": (0, 1),
    "latent.max_targets": (1, 16384),
    "lora.rank": (1, 4096),
    "lora.alpha": (1, 65536),
    "lora.dropout": (0, 0.99),
    "data.count": (1, 10**9),
    "data.replay_share": (0.01, 0.9),
    # Evaluation takes the seeds above (lvr_lite/train/examples.py).
    "data.seed": (0, 499_999),
    "data.eval_count": (1, 10**6),
    "train.steps": (1, 10**9),
    "train.batch": (1, 65536),
    "train.accumulation": (1, 65536),
    "train.lr": (1e-9, 1.0),
    "train.warmup": (0, 0.99),
    "train.weight_decay": (0, 10),
    "train.max_grad_norm": (1e-6, 1e6),
    "train.cache_visual_tokens": (0, 10**5),
    "train.eval_every": (1, 10**9),
    "train.save_every": (1, 10**9),
    "train.keep": (1, 10**6),
    "train.log_every": (1, 10**9),
    "train.max_skipped": (0, 10**9),
    "train.workers": (0, 256),
    "train.seed": (0, 2**32 - 1),
    "grpo.group": (2, 1024),
    "grpo.temperature": (1e-3, 100),
    "grpo.max_tokens": (1, 65536),
    "grpo.updates": (1, 1000),
    "grpo.clip": (1e-3, 100),
    "grpo.beta": (0, 1000),
    "grpo.rows": (1, 65536),
    "max_pixels": (28 * 28, 10**9),
}


@dataclass(frozen=True)
class Settings:
    """All of a run.

    max_pixels: pictures are shrunk to this area (pixels) before they are cut into patches; None,
        or "auto" in a recipe, takes what is usual for the family (`Processor.default_max_pixels`).

    Raises UsageError for a number out of its limits and for settings that contradict each other.
    """

    latent: LatentSettings = field(default_factory=LatentSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        method = self.latent.method
        if self.latent.targets == "all" and method != "lvr":
            raise UsageError(
                f"latent.targets=all is for latent.method=lvr; {method} has K places: "
                "set latent.targets=pooled"
            )
        if self.latent.warmup and not self.latent.runs_freely:
            raise UsageError(
                "latent.warmup is for lvr-free and lvr-bottleneck; "
                f"leave it out with latent.method={method}"
            )
        if self.latent.loss == "none" and method == "lvr":
            raise UsageError(
                "latent.method=lvr learns nothing about its latents with latent.loss=none: "
                "use mse or contrastive"
            )
        for name, (low, high) in LIMITS.items():
            value = self._number(name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} must lie between {low:g} and {high:g}, not {value:g}")

    def _number(self, name: str) -> float | None:
        section, _, key = name.rpartition(".")
        value: float | None = getattr(getattr(self, section) if section else self, key)
        return value

    def to_json(self) -> JsonObject:
        return asdict(self)


@dataclass(frozen=True)
class _Origin:
    """Where settings come from, for messages.

    recipe: the recipe that was given.
    overridden: the keys that `--set` names.
    """

    recipe: Path | None
    overridden: tuple[str, ...]

    def of(self, name: str) -> str:
        """What must be mended where the key or section `name` is wrong: "--set", or the recipe."""
        overridden = any(f"{key}.".startswith(f"{name}.") for key in self.overridden)
        return "--set" if self.recipe is None or overridden else str(self.recipe)


def load_settings(recipe: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a YAML recipe, or the defaults, with `section.key=value` overrides.

    Raises UsageError naming file, key and value.
    """
    data = {} if recipe is None else _read_recipe(recipe)
    for override in overrides:
        _override(data, override)
    if data.get("max_pixels") == "auto":
        data["max_pixels"] = None
    keys = tuple(override.partition("=")[0].strip() for override in overrides)
    return _fill(Settings, data, "", _Origin(recipe, keys))


def _read_recipe(path: Path, above: tuple[Path, ...] = ()) -> JsonObject:
    """A recipe over the one that its `extends` names by a path from its own folder.

    above: the recipes that extend this one.
    """
    data = _read_yaml(path)
    if "extends" not in data:
        return data
    base = data.pop("extends")
    if not isinstance(base, str):
        raise UsageError(f"{path}: extends must be the path of another recipe, not {base!r}")
    above = (*above, path.resolve())
    if (path.parent / base).resolve() in above:
        raise UsageError(f"{path}: extends {base}, which extends it again")
    return _merged(_read_recipe(path.parent / base, above), data)


def _merged(under: JsonObject, over: JsonObject) -> JsonObject:
    """`under` with the values of `over`, section by section."""
    merged = under | over
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            merged[key] = _merged(under[key], value)
    return merged


def _read_yaml(path: Path) -> JsonObject:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    # PyYAML itself raises ValueError for a date or a number that is none.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path}: not valid YAML ({reason})") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(
            f"{path}: must hold sections such as `train:`, not a {type(data).__name__}"
        )
    return data


def _override(data: JsonObject, override: str) -> None:
    """Put the value of "section.key=value" into `data`."""
    import yaml

    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UsageError(
            f"--set {override}: write it as section.key=value, for example --set train.lr=2e-4"
        )
    *sections, key = name.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UsageError(f"--set {override}: {section} is a value, not a section")
    try:
        data[key] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--set {override}: the value is not valid YAML") from error


def _fill(kind: type[Section], data: JsonObject, prefix: str, origin: _Origin) -> Section:
    """A section from its values, each checked against the type of its field.

    prefix: of the section's keys, such as "train.".
    """
    hints = typing.get_type_hints(kind)
    known = sorted(f.name for f in fields(kind))
    values: JsonObject = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise UsageError(
                f"{origin.of(name)}: unknown key {name}; known here: {', '.join(known)}"
            )
        if not is_dataclass(hints[key]):
            values[key] = _checked(hints[key], value, name, origin)
        elif isinstance(value, dict):
            values[key] = _fill(hints[key], value, f"{name}.", origin)
        else:
            raise UsageError(f"{origin.of(name)}: {name} is a section; write {name}.key")
    return kind(**values)


def _checked(hint: Any, value: Any, name: str, origin: _Origin) -> Any:
    """A value as its field has it. hint: the field's type: plain, optional, or a Literal."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        raise UsageError(
            f"{origin.of(name)}: {name} must be one of {', '.join(choices)}, not {value!r}"
        )
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and not isinstance(value, bool):
        try:
            # YAML reads 1e-4 as a string.
            return float(value)
        except (TypeError, ValueError):
            pass
    if type(value) in allowed:
        return value
    wanted = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in allowed)
    raise UsageError(f"{origin.of(name)}: {name} must be {wanted}, not {value!r}")
