"""What all experiments share: options, `lvr-lite` commands in processes of their own, JSON, tables
and pages.

An experiment is a function whose parameters are its options:

    def main(out: Out, seeds: Seeds = "0,1,2") -> None: ...

    if __name__ == "__main__":
        launch(main, __doc__)

May import: typer, lvr_lite.bench.machine and what stands below it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lvr_lite.bench import machine
from lvr_lite.errors import LvrError
from lvr_lite.files import write_atomically
from lvr_lite.system import usable_cores

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "methods"
# Pages, their figures and their JSON.
RESULTS = ROOT / "docs" / "results"
CORES = usable_cores()
JsonObject = dict[str, object]

Out = Annotated[Path, typer.Option(help="Folder for everything that is made.")]
Jobs = Annotated[int, typer.Option(help="Processes at a time, each on one thread.")]
Seeds = Annotated[str, typer.Option(help="With commas between.")]
Rounds = Annotated[int, typer.Option(help="Each measures everything once, in another order.")]
Threads = Annotated[int | None, typer.Option(help="Threads of a runtime.")]
Names = Annotated[str | None, typer.Option(help="Names with | between.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="As of `finetune`.")]
Page = Annotated[
    Path | None,
    typer.Option(help="Markdown page whose table of the same mark is replaced, or added."),
]


def launch(main: Callable[..., None], doc: str | None) -> None:
    """Make a command of `main` and run it. doc: the module's docstring, shown by --help."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    # "\b" keeps the lines of a paragraph: the example commands stay as they are.
    paragraphs = (doc or "").split("\n\n")
    text = "\n\n".join(f"\b\n{paragraph}" for paragraph in paragraphs)
    app.command(help=text)(main)
    try:
        app()
    except LvrError as error:
        raise SystemExit(str(error)) from error


# ----------------------------------------------------------------------------------------------
# commands


def command(*arguments: object) -> list[str]:
    """The command line of `lvr-lite` with these arguments."""
    return [sys.executable, "-m", "lvr_lite", *map(str, arguments)]


def overrides(*settings: str) -> list[str]:
    """Settings ("train.steps=60") as the arguments of `--set`."""
    arguments = []
    for setting in settings:
        arguments += ["--set", setting]
    return arguments


def run(*arguments: object, log: Path, threads: int | None = None) -> str:
    """Run `lvr-lite` as a user would and return what it printed, which also goes to the end of
    `log`. Raises SystemExit where the command fails.

    threads: of OpenMP, all by default.
    """
    words = " ".join(map(str, arguments))
    line = f"lvr-lite {words}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {line}\n")
        file.flush()
        begin = file.tell()
        done = subprocess.run(
            command(*arguments),
            stdout=file,
            stderr=file,
            env=environment,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{line} ended with {done.returncode}; see {log}")
    printed = log.read_bytes()[begin:]
    return printed.decode(errors="replace")


def is_whole(path: Path) -> bool:
    """An earlier run has finished this file."""
    if not path.is_file():
        return False
    return path.stat().st_size > 0


def once(result: Path, *arguments: object, log: Path, threads: int | None = None) -> None:
    """`run`, unless an earlier run has finished `result`, the file that the command writes last.

    Raises SystemExit where that was another command, kept in the folder `commands` beside `log`:
    its result would be told as this one's.
    """
    kept = log.parent / "commands" / "-".join(result.parts[-2:])
    command = " ".join(map(str, arguments))
    if not is_whole(result):
        write_atomically(kept, command)
        run(*arguments, log=log, threads=threads)
    elif not kept.is_file() or kept.read_text(encoding="utf-8") != command:
        raise SystemExit(f"{result}: another command made it; remove it, or choose another --out")


def in_parallel(jobs: int, work: Callable[..., None], cases: Iterable[Sequence[object]]) -> None:
    """`work(*case)` for each case, so many at a time. Raises what the first failing one raises."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda case: work(*case), cases))


# ----------------------------------------------------------------------------------------------
# JSON


def to_json(measured: Any) -> JsonObject:
    """A dataclass as JSON, without what was not measured (None)."""
    fields = asdict(measured)
    return {name: value for name, value in fields.items() if value is not None}


def write_json(path: Path, value: object) -> None:
    """value: may hold dataclasses."""
    text = json.dumps(value, indent=1, default=to_json)
    write_atomically(path, text)


def write_results(path: Path, measured: Mapping[str, object], threads: int | None = None) -> None:
    """What was measured, with the card of the machine. threads: that the runtimes used."""
    card = machine.card(threads)
    write_json(path, {"machine": card, **measured})


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------
# tables and pages


def row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    texts = map(str, cells)
    return f"| {' | '.join(texts)} |"


def header(titles: Sequence[str]) -> str:
    rule = ["---"] * len(titles)
    return f"{row(titles)}\n{row(rule)}"


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header(titles)]
    lines += map(row, rows)
    return "\n".join(lines)


def publish(text: str, page: Path | None, mark: str) -> None:
    """Put a text on the page between its marks, in place of what an earlier run put there; at the
    end of a page without these.

    Raises SystemExit where a page has the first mark and not the second.
    """
    if page is None:
        return
    begin = f"<!-- {mark} -->\n"
    end = f"<!-- end of {mark} -->"
    old = ""
    if page.is_file():
        old = page.read_text(encoding="utf-8")
    if begin not in old:
        old = f"{old.rstrip()}\n\n{begin}{end}\n"
    before, _, rest = old.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page}: {begin.strip()} has no {end} after it")
    new = f"{text.strip()}\n"
    write_atomically(page, f"{before}{begin}{new}{end}{after}")
