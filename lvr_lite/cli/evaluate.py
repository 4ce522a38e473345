"""`lvr-lite eval` and `probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvr_lite.cli.options import (
    Batch,
    Html,
    JsonOut,
    LookWhen,
    MaxPixels,
    ModelFolder,
    Threads,
    look_when,
    numbers,
    write_json,
)


def eval_(
    model: ModelFolder,
    suite: Annotated[
        str,
        typer.Option(
            help="scenes, skills (what the embedded model could do before), mmvp, vstar, blink, "
            "hrbench, or a file of samples."
        ),
    ] = "scenes",
    path: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="The folder of a benchmark's files, as they are published."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare with this model, or with a file of --json, on the same questions; "
            "repeatable."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions at most; 300 of the scenes or skills by default.")
    ] = None,
    skills: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Skills asked beside the scenes; 150, or --limit if fewer, by default; 0 for "
            "none.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=999_999, help="Of the held-out scenes.")] = 0,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Latent steps K, several with commas: 0,4,8; the model's own by default."
        ),
    ] = None,
    look: LookWhen = "auto",
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="direct|plain",
            help="How a benchmark asks: with the sentence \"answer with the option's letter "
            'directly", the default, or without it.',
        ),
    ] = None,
    max_pixels: MaxPixels = None,
    against_max_pixels: Annotated[
        int | None,
        typer.Option(
            "--against-max-pixels",
            metavar="N",
            help="The same for the models in --against; by default the smallest of all models' "
            "own, so that all see pictures of one size.",
        ),
    ] = None,
    batch: Batch = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Text tokens at most; by default 16, 64 for skills and benchmarks, 256 for "
            "--prompt plain, and of a file room for its longest answer.",
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Add every answer to this file (JSONL), and go on from those that are in it.",
        ),
    ] = None,
    threads: Threads = None,
    json_: JsonOut = None,
) -> None:
    """Score a model on held-out questions, with n and a 95 % interval, and beside others on the
    same ones.

    --steps and --answers are for MODEL alone; a model in --against takes its own latent steps, and
    --look where it has some.

    Example: lvr-lite eval bundle --limit 300 --against tiny

    Example: lvr-lite eval bundle --suite mmvp --path MMVP --steps 0,4,8 --answers mmvp.jsonl
    """
    from lvr_lite.commands.evaluate import EvalOptions, evaluate
    from lvr_lite.eval.comparing import reference_hint
    from lvr_lite.eval.report import show
    from lvr_lite.terminal import say

    options = EvalOptions(
        suite=suite,
        limit=limit,
        seed=seed,
        steps=() if steps is None else numbers("--steps", steps),
        batch=batch,
        look=look_when(look),
        max_pixels=max_pixels,
        against_max_pixels=against_max_pixels,
        prompt=prompt,
        max_tokens=max_tokens,
        skills=skills,
        path=path,
        journal=answers,
    )
    report = evaluate(model, options, against or (), threads).to_json()
    show(report)
    if "skills" in report and not against and (hint := reference_hint(model)):
        say(hint)
    write_json(json_, report)


def probe(
    model: ModelFolder,
    data: Annotated[
        str, typer.Option(help="scenes (held-out ones), or a file of samples.")
    ] = "scenes",
    limit: Annotated[int, typer.Option(help="Questions at most.")] = 300,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=999_999, help="Of the scenes, noise, orders, donors and intervals."
        ),
    ] = 0,
    only: Annotated[
        str | None,
        typer.Option(help="Some interventions alone, such as noise,donor_same_question."),
    ] = None,
    look: LookWhen = "auto",
    max_pixels: MaxPixels = None,
    batch: Batch = 16,
    html: Html = None,
    threads: Threads = None,
    json_: JsonOut = None,
) -> None:
    """Say whether the latents carry the answer: replace them by others and see what becomes of it.

    Example: lvr-lite probe bundle --limit 300 --html probe.html
    """
    from lvr_lite.commands import evaluate
    from lvr_lite.eval.report import show_probe, write_probe_page
    from lvr_lite.terminal import say

    options = evaluate.ProbeOptions(data, limit, seed, only, batch, look_when(look), max_pixels)
    result = evaluate.probe(model, options, threads)
    report = result.to_json()
    show_probe(report)
    if changed := result.changed_by_sham:
        say(
            f"warning: the sham changed {changed} answers, so differences of that size mean nothing"
        )
    if html is not None:
        write_probe_page(report, html)
    write_json(json_, report)
