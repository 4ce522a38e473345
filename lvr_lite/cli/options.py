"""Options that several commands share, and the border to JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lvr_lite.files import JsonObject
    from lvr_lite.generate.records import Look

JsonOut = Annotated[
    Path | None, typer.Option("--json", help="Write what was printed as JSON to this file.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads of ONNX Runtime; all usable cores by default."),
]
Provider = Annotated[
    str,
    typer.Option(
        help="What runs a bundle's graphs: cpu, or cuda, coreml, qnn, webgpu, xnnpack, openvino, "
        "directml where installed."
    ),
]
LookWhen = Annotated[
    str,
    typer.Option(
        "--look",
        metavar="auto|always|never",
        help="Whether answers look: as the model chooses, always before the first word, or never.",
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        metavar="N",
        help="Shrink pictures to this area in pixels; by default the model's own. A bundle takes "
        "no larger one than its own.",
    ),
]
ModelFolder = Annotated[str, typer.Argument(help="A bundle or a checkpoint.")]
Batch = Annotated[int, typer.Option(min=1, help="Questions decoded together.")]
Html = Annotated[Path | None, typer.Option(help="Write a page with plots.")]


def write_json(path: Path | None, data: JsonObject) -> None:
    """Write what `--json` asks for, where it was given."""
    if path is not None:
        from lvr_lite.files import write_atomically

        write_atomically(path, json.dumps(data, indent=1))


def look_when(text: str) -> Look:
    """What `--look` says. Raises UsageError for anything else."""
    from lvr_lite.errors import UsageError
    from lvr_lite.generate.records import LOOKS

    for look in LOOKS:
        if text == look:
            return look
    raise UsageError(f"--look {text}: must be {', '.join(LOOKS[:-1])} or {LOOKS[-1]}")


def numbers(option: str, text: str) -> tuple[int, ...]:
    """ "0,4,8" -> (0, 4, 8). Raises UsageError for anything else, and for a number that is there
    twice.
    """
    from lvr_lite.errors import UsageError

    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} {text}: give whole numbers with commas between, such as 0,4,8"
        ) from None
    if len(set(values)) < len(values):
        raise UsageError(f"{option} {text}: a number is there twice")
    return values
