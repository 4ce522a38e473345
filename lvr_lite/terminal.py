"""What a command says while it works: lines, progress bars, and the silence of libraries. May
import: rich.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")


def say(line: str) -> None:
    """One line on standard error; of the processes that train together, the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def stderr() -> Console:
    """A console on standard error."""
    from rich.console import Console

    return Console(stderr=True)


def bar(items: Iterable[Item], title: str, total: int | None = None) -> Iterable[Item]:
    """`items`, with a progress bar on the terminal while they are taken."""
    from rich.progress import track

    console = stderr()
    hidden = not console.is_terminal
    return track(items, title, total=total, console=console, transient=True, disable=hidden)


@contextmanager
def progress(title: str) -> Iterator[Callable[..., None]]:
    """A progress bar on the terminal. Its value is a function that moves it:

    total: how many there are to do.
    completed: how many of them are done.
    advance: how many more are done.
    """
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=stderr(), transient=True) as shown:
        task = shown.add_task(title, total=None)
        yield partial(shown.update, task)


def quiet_libraries() -> None:
    """Turn down transformers and bitsandbytes, whose bars and notices would drown what this program
    says.
    """
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Both warnings are of transformers' and bitsandbytes' own making, and nothing that a user could
    # mend.
    warnings.filterwarnings(
        "ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning
    )
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU.*")
