"""All commands in the order of --help, and what becomes of errors: one line and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

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


def main() -> None:
    """Run the command line. What a user can mend becomes one line and an exit code (1, or 2 for a
    wrong call); --debug shows the traceback.
    """
    from lvr_lite.errors import LvrError

    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="lvr-lite")
    except (LvrError, OSError, ImportError) as error:
        if debug:
            raise
        if isinstance(error, LvrError):
            _fail(str(error), error.exit_code)
        _fail(_unreadable(error) if isinstance(error, OSError) else _missing(error))


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


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
