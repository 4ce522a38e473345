"""Options that several commands share, and the border to JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lvr_lite.files import JsonObject

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
ModelFolder = Annotated[str, typer.Argument(help="A bundle or a checkpoint.")]
Batch = Annotated[int, typer.Option(min=1, help="Questions decoded together.")]
Html = Annotated[Path | None, typer.Option(help="Write a page with plots.")]


def write_json(path: Path | None, data: JsonObject) -> None:
    """Write what `--json` asks for, where it was given."""
    if path is not None:
        from lvr_lite.files import write_atomically

        write_atomically(path, json.dumps(data, indent=1))


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
