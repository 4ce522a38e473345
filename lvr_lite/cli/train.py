"""`lvr-lite finetune` and `grpo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvr_lite.cli.options import JsonOut, write_json

if TYPE_CHECKING:
    from lvr_lite.commands.train import Training
    from lvr_lite.files import JsonObject

Out = Annotated[
    Path | None, typer.Option(help="Folder for the adapter, settings, metrics and checkpoints.")
]
Recipe = Annotated[Path | None, typer.Option(help="YAML recipe; see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: section.key=value.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last whole checkpoint in OUT.")
]
PlanOnly = Annotated[
    bool, typer.Option("--plan", help="Say what memory it will need, what fits, and train nothing.")
]
Vram = Annotated[
    float | None,
    typer.Option(help="With --plan: the card's memory in GiB; 8, 12, 16 and 24 by default."),
]


def finetune(
    model: Annotated[str, typer.Option(help="tiny, a model folder, or a hub id.")],
    data: Annotated[
        str | None, typer.Option(help="scenes, or a file of samples (JSONL, official LVR JSON).")
    ] = None,
    out: Out = None,
    config: Recipe = None,
    set_: Overrides = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            metavar="N",
            help="Shrink pictures to this area in pixels, as --set max_pixels=N; by default the "
            "recipe's, or some 512 visual tokens.",
        ),
    ] = None,
    resume: Resume = False,
    plan: PlanOnly = False,
    vram: Vram = None,
    json_: JsonOut = None,
) -> None:
    """Teach a model, loaded in 4 bits, to reason in visual latents (QLoRA). --data and --out are
    needed but for --plan.

    Example: lvr-lite finetune --model tiny --data scenes --out tuned
    """
    from lvr_lite.commands import train

    _check_plan(plan, vram, resume)
    overrides = tuple(set_ or ())
    if max_pixels is not None:
        overrides += (f"max_pixels={max_pixels}",)
    options = train.TrainOptions(config, overrides, resume)
    if plan:
        _show_plan(train.plan_finetune(model, options, vram), json_)
        return
    data, out = _needed("finetune", data, out)
    _say_done(train.finetune(model, data, out, options), json_)


def grpo(
    checkpoint: Annotated[
        str, typer.Option(help="A checkpoint that was tuned with latents (`lvr-lite finetune`).")
    ],
    data: Annotated[
        str | None, typer.Option(help="scenes, or a file of samples; boxes are not needed.")
    ] = None,
    out: Out = None,
    config: Recipe = None,
    set_: Overrides = None,
    resume: Resume = False,
    plan: PlanOnly = False,
    vram: Vram = None,
    json_: JsonOut = None,
) -> None:
    """Reinforce right answers (GRPO): the model finds its own latents, and is paid for what can be
    checked. --data and --out are needed but for --plan.

    Example: lvr-lite grpo --checkpoint tuned --data scenes --out reinforced
    """
    from lvr_lite.commands import train

    _check_plan(plan, vram, resume)
    options = train.TrainOptions(config, tuple(set_ or ()), resume)
    if plan:
        _show_plan(train.plan_grpo(checkpoint, options, vram), json_)
        return
    data, out = _needed("grpo", data, out)
    _say_done(train.grpo(checkpoint, data, out, options), json_)


def _check_plan(plan: bool, vram: float | None, resume: bool) -> None:
    from lvr_lite.errors import UsageError

    if vram is not None and not plan:
        raise UsageError("--vram is for --plan, which trains nothing; leave it out, or add --plan")
    if plan and resume:
        raise UsageError("--plan trains nothing: leave out --resume")


def _needed(command: str, data: str | None, out: Path | None) -> tuple[str, Path]:
    from lvr_lite.errors import UsageError

    if data is not None and out is not None:
        return data, out
    missing = [flag for flag, value in (("--data", data), ("--out", out)) if value is None]
    raise UsageError(f"{command} needs {' and '.join(missing)}; only --plan goes without")


def _show_plan(report: JsonObject, json_: Path | None) -> None:
    from lvr_lite.train import memory_report

    memory_report.show(report)
    write_json(json_, report)


def _say_done(training: Training, json_: Path | None) -> None:
    from lvr_lite.terminal import say

    say(
        f"{training.out}: {training.steps} steps in {training.minutes:.1f} min, "
        f"peak memory {training.peak_memory_gb:.2f} GiB"
    )
    write_json(json_, training.to_json())
