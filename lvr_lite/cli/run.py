"""`lvr-lite run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvr_lite.cli.options import JsonOut, MaxPixels, ModelFolder, Provider, Threads, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from lvr_lite.commands.model import Answer, AskOptions, Model
    from lvr_lite.generate.records import Look


def run(
    model: ModelFolder,
    words: Annotated[
        list[str], typer.Argument(metavar="IMAGE... QUESTION", help="Pictures, then the question.")
    ],
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=0, help="Latent steps K; the model's own by default, 0 for none."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Text tokens at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the smallest set of tokens of this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    look: Annotated[
        list[str] | None,
        typer.Option(
            metavar="auto|always|never|PNG",
            help="Whether the answer looks: as the model chooses, always before the first word, or "
            "never. Or a picture to write: which visual tokens each latent step is nearest to, as "
            "heat maps. Repeat it for both.",
        ),
    ] = None,
    max_pixels: MaxPixels = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another question about the same pictures, which are not read again."),
    ] = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    json_: JsonOut = None,
) -> None:
    """Answer a question about one or more pictures.

    Example: lvr-lite run bundle picture.png "what colour is the star"
    """
    from lvr_lite.commands.model import AskOptions, open_model
    from lvr_lite.model.images import open_for_model
    from lvr_lite.system import peak_rss_mb
    from lvr_lite.terminal import say

    *images, question = words
    questions = [question, *(also or [])]
    _check_questions(questions, images)
    pictures = [open_for_model(Path(image)) for image in images]
    when, drawing = _looks(look or [])
    options = AskOptions(
        max_tokens=max_tokens,
        steps=steps,
        look=when,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    opened = open_model(model, threads=threads, provider=provider, max_pixels=max_pixels)
    if drawing is not None:
        from lvr_lite.views.look import refuse

        refuse(drawing, images, opened.runtime.latent, 0 if when == "never" else steps)
    answers = [_print(opened, pictures, asked, options, stream) for asked in questions]
    first, *rest = answers
    data = {"schema": "lvr-lite/run", "version": 1} | first.to_json()
    data["peak_rss_mb"] = peak_rss_mb()
    if rest:
        data["also"] = [answer.to_json() for answer in rest]
    write_json(json_, data)
    if drawing is not None:
        from lvr_lite.views.look import write_look

        write_look(drawing, opened.look(first))
        say(f"{drawing}: the nearest visual tokens of {first.latent_steps} latent steps")


def _looks(values: list[str]) -> tuple[Look, Path | None]:
    """Whether to look, and the picture to write, of all that `--look` was given. Raises UsageError
    where one of them is given twice.
    """
    from lvr_lite.errors import UsageError
    from lvr_lite.generate.records import LOOKS

    named = [look for look in LOOKS for value in values if value == look]
    pictures = [value for value in values if value not in LOOKS]
    # A word alone is a misspelt one of these.
    if unknown := next((value for value in pictures if value.isidentifier()), None):
        known = ", ".join(LOOKS)
        raise UsageError(f"--look {unknown}: neither {known} nor a picture's path, as look.png")
    if len(named) > 1 or len(pictures) > 1:
        raise UsageError(
            f"--look {' and '.join(values)}: give one of {', '.join(LOOKS)}, one picture's path, "
            "or one of each"
        )
    return (named or ["auto"])[0], Path(pictures[0]) if pictures else None


def _check_questions(questions: list[str], images: list[str]) -> None:
    from lvr_lite.errors import UsageError

    if not all(question.strip() for question in questions):
        raise UsageError("the question is empty; write it after the pictures, in quotes")
    place = "" if images else ", after the pictures"
    for question in questions:
        if _names_picture(question):
            raise UsageError(
                f"{question} is a picture and stands where the question belongs{place}, in quotes"
            )


def _names_picture(question: str) -> bool:
    """Whether a question is a file, or the path of a picture that is not there."""
    from lvr_lite.model.images import SUFFIXES

    try:
        return Path(question).is_file() or (
            len(question.split()) == 1 and question.lower().endswith(SUFFIXES)
        )
    except OSError:
        # A question may be longer than any name of a file.
        return False


def _print(
    model: Model, pictures: list[Image], question: str, options: AskOptions, stream: bool
) -> Answer:
    """Ask one question, and print the answer at once or piece by piece."""
    from lvr_lite.terminal import say

    for event in model.stream(pictures, question, options):
        if stream:
            print(event.text, end="", flush=True)
    assert event.answer is not None
    print("" if stream else event.answer.text)
    if event.answer.reason == "length":
        say(f"cut at {options.max_tokens} tokens; raise it with --max-tokens")
    return event.answer
