"""`lvr-lite finetune` and `grpo`, and what memory they will need. May import: the standard library
and all that stands above `commands`; what needs torch inside functions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from lvr_lite.config import Settings, load_settings
from lvr_lite.errors import UsageError
from lvr_lite.files import JsonObject
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint, resolve
from lvr_lite.terminal import quiet_libraries, say


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    config: a YAML recipe; None takes the one that comes with the package.
    overrides: settings over the recipe's, such as "train.steps=100".
    resume: go on from the last whole checkpoint in `out`.
    """

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    resume: bool = False


@dataclass(frozen=True)
class Training:
    """A training that came to its end.

    command: "finetune" or "grpo".
    out: the tuned checkpoint.
    processes: that trained together.
    peak_memory_gb: of the card, or of this process without one, in GiB.
    skipped: {"step", "samples"} of each step that was left out because its loss or gradient was not
        finite, with the ids of its samples.
    history: what was logged, a dict a logged step.
    """

    command: str
    out: Path
    steps: int
    processes: int
    minutes: float
    peak_memory_gb: float
    trainable_parameters: int
    skipped: list[JsonObject]
    history: list[JsonObject]

    def to_json(self) -> JsonObject:
        own = asdict(self)
        del own["command"]
        return {"schema": f"lvr-lite/{self.command}", "version": 1} | own | {"out": str(self.out)}


def finetune(
    model: str | Path, data: str | Path, out: str | Path, options: TrainOptions | None = None
) -> Training:
    """Teach a model, loaded in 4 bits, to reason in visual latents (QLoRA).

    model: `tiny`, a model's folder, or a hub id.
    data: "scenes", or a file of samples.
    out: folder for the adapter, settings, metrics and checkpoints.

    Ctrl-C and SIGTERM save a whole checkpoint-N after the step that is under way.

    Raises UsageError for settings that do not fit and where `out` holds another run, DataError for
    wrong samples, OutputError where `out` cannot be written or another run writes into it,
    BundleError for a checkpoint-N that is damaged, NotFiniteError where too many losses are not
    finite, StoppedError after a signal, LvrError where memory is used up.
    """
    options = options or TrainOptions()
    recipe, settings, checkpoint = _begin_finetune(model, options)
    quiet_libraries()
    from lvr_lite.train.finetune import finetune as train

    _say_recipe(recipe, options)
    metrics = train(checkpoint, str(data), Path(out), settings, options.resume, say)
    return Training("finetune", Path(out), **metrics)


def grpo(
    checkpoint: str | Path, data: str | Path, out: str | Path, options: TrainOptions | None = None
) -> Training:
    """Reinforce right answers (GRPO) of a checkpoint that was tuned with latents.

    data, out, errors: as `finetune`; the samples need no boxes.
    """
    options = options or TrainOptions()
    recipe, settings, tuned = _begin_grpo(checkpoint, options)
    quiet_libraries()
    from lvr_lite.train.grpo import grpo as train

    _say_recipe(recipe, options)
    metrics = train(tuned, str(data), Path(out), settings, options.resume, say)
    return Training("grpo", Path(out), **metrics)


def plan_finetune(
    model: str | Path, options: TrainOptions | None = None, vram: float | None = None
) -> JsonObject:
    """What memory `finetune` will need and what fits on which card; trains nothing.

    vram: a card's memory in GiB; 8, 12, 16 and 24 by default.
    """
    _, settings, checkpoint = _begin_finetune(model, options or TrainOptions(), weights=False)
    return _plan(model, checkpoint, settings, 1, vram)


def plan_grpo(
    checkpoint: str | Path, options: TrainOptions | None = None, vram: float | None = None
) -> JsonObject:
    """As `plan_finetune`, of `grpo`."""
    _, settings, tuned = _begin_grpo(checkpoint, options or TrainOptions(), weights=False)
    return _plan(checkpoint, tuned, settings, 2, vram)


def _begin_finetune(
    model: str | Path, options: TrainOptions, weights: bool = True
) -> tuple[Path, Settings, Checkpoint]:
    """weights: whether they are needed, and fetched where they are on the hub."""
    recipe = options.config or _recipe_of(resolve(str(model), weights=False), "recipe.yaml")
    settings = load_settings(recipe, list(options.overrides))
    checkpoint = read_checkpoint(model, weights)
    if checkpoint.adapter:
        raise UsageError(
            f"--model {model}: is a tuned checkpoint; give its base ({checkpoint.base}), "
            "or go on with --resume"
        )
    return recipe, settings, checkpoint


def _begin_grpo(
    checkpoint: str | Path, options: TrainOptions, weights: bool = True
) -> tuple[Path, Settings, Checkpoint]:
    tuned = read_checkpoint(checkpoint, weights)
    recipe = options.config or _recipe_of(tuned.base, "grpo.yaml")
    return recipe, load_settings(recipe, list(options.overrides)), tuned


def _recipe_of(base: Path, name: str) -> Path:
    """The recipe that comes with the package: of the embedded model, or of any other."""
    embedded = base.resolve() == resolve("tiny").resolve()
    return Path(str(resources.files("lvr_lite"))) / ("toy" if embedded else "train") / name


def _say_recipe(recipe: Path, options: TrainOptions) -> None:
    overrides = f" with {', '.join(options.overrides)}" if options.overrides else ""
    say(f"recipe: {recipe}{overrides}")


def _plan(
    model: str | Path, checkpoint: Checkpoint, settings: Settings, stage: int, vram: float | None
) -> JsonObject:
    if vram is not None and not 0 < vram < 1e4:
        raise UsageError(f"--vram {vram:g}: must be the memory of a card in GiB, such as 12")
    quiet_libraries()
    from lvr_lite.train import memory_plan
    from lvr_lite.train.memory import with_adapter_of, with_pictures

    say(with_pictures(checkpoint, settings).processor.size_in_words + " (--max-pixels)")
    if stage == 2:
        settings = with_adapter_of(checkpoint, settings)
    return memory_plan.plan(str(model), checkpoint, settings, stage, vram)
