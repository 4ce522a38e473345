"""All commands in the order of --help, and what becomes of errors: one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer

from lvr_lite.cli import bench, data, evaluate, export, other, run, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Latent visual reasoning: fine-tune on one GPU, export to ONNX, run and measure quantized "
    "on a device.",
)
app.command()(train.finetune)
app.command()(train.grpo)
app.command()(export.export)
app.command()(export.quantize)
app.command()(run.run)
app.command("eval")(evaluate.eval_)
app.command()(evaluate.probe)
app.command()(other.inspect)
app.command()(other.doctor)
app.command()(other.demo)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")

EXTRAS = {
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "optimum": "export",
    "matplotlib": "export",
    "pyarrow": "benchmarks",
}


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from lvr_lite import __version__

        print(f"lvr-lite {__version__}")
        raise typer.Exit


class _Signal(BaseException):
    """Ctrl-C or SIGTERM, which nothing but `main` catches: folders that are half written go on the
    way out.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> None:
    """Run the command line. What a user can mend becomes one line and an exit code (1, or 2 for a
    wrong call); --debug shows the traceback. Ctrl-C ends in one line and exit code 130, SIGTERM in
    one line and 143.
    """
    from lvr_lite.errors import LvrError, StoppedError, signal_name

    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    _set_up_allocator()
    try:
        with _signals_as_exceptions():
            app(args=arguments, prog_name="lvr-lite")
    except _Signal as signalled:
        _end(f"stopped by {signal_name(signalled.number)}", 128 + signalled.number)
    except StoppedError as stopped:
        _end(f"stopped at {stopped}; go on with {_resuming(arguments)}", stopped.exit_code)
    except Exception as error:
        message = _message(error)
        if debug or message is None:
            raise
        _fail(message, error.exit_code if isinstance(error, LvrError) else 1)


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into `_Signal`, and puts back what was there. Signals that the
    caller has switched off, as `nohup` does, stay so.
    """
    earlier: dict[signal.Signals, Any] = {}
    # Python sets handlers in its main thread alone.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                earlier[number] = signal.signal(number, _raise_signal)
    try:
        yield
    finally:
        for which, handler in earlier.items():
            signal.signal(which, handler)


def _raise_signal(number: int, frame: object) -> NoReturn:  # noqa: ARG001
    raise _Signal(number)


def _set_up_allocator() -> None:
    """Lets PyTorch's allocator grow its pieces of a card's memory, where the user has not set it
    up: sequences of many lengths fragment it otherwise.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        # Releases before 2.9 read the longer name alone, later ones both.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _resuming(arguments: list[str]) -> str:
    """The command that goes on with a training."""
    if "WORLD_SIZE" in os.environ:
        return "the same command and --resume"
    resume = [] if "--resume" in arguments else ["--resume"]
    return shlex.join(["lvr-lite", *arguments, *resume])


def _message(error: Exception) -> str | None:
    """The line that tells of an error; None where it is a fault of this program."""
    from lvr_lite.errors import LvrError
    from lvr_lite.system import is_out_of_memory

    if isinstance(error, LvrError):
        return str(error)
    if is_out_of_memory(error):
        return _out_of_memory()
    if isinstance(error, OSError):
        return _unreadable(error)
    if isinstance(error, ImportError):
        return _missing(error)
    return None


def _end(line: str, code: int) -> NoReturn:
    """Ends as a signal asked for; of the processes that train together, the first one speaks."""
    from lvr_lite.terminal import say

    say(line)
    sys.exit(code)


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _out_of_memory() -> str:
    from lvr_lite.system import memory_gib, peak_rss_mb

    total, _ = memory_gib()
    peak = peak_rss_mb()
    used = "" if peak is None else f" at {peak / 1024:.1f} GiB"
    machine = "" if total is None else f" of the machine's {total:.1f} GiB"
    return (
        f"out of memory{used}{machine}; close other programs, lower --max-pixels or --batch where "
        "the command has them, or take a smaller or a quantized model"
    )


def _unreadable(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or error
    return f"{place}{reason}; check the path, the permissions and the free space"


def _missing(error: ImportError) -> str:
    extra = EXTRAS.get((error.name or "").split(".")[0], "train")
    return (
        f'this command needs the package {error.name or error}: pip install "lvr-lite[{extra}]" '
        "(`lvr-lite doctor` shows what else)"
    )
