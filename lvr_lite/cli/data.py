"""`lvr-lite data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, help="Make, convert, check and look at data.", rich_markup_mode=None
)

ModelName = Annotated[
    str,
    typer.Option(
        help="Whose resizing and visual tokens: tiny, or the folder of a checkpoint or a bundle."
    ),
]


@app.command()
def make(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    count: Annotated[int, typer.Option(min=1, help="Questions.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=999_999, help="Of the scenes.")] = 0,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    as_: Annotated[
        str, typer.Option("--as", help="samples, or coco: a detection set, to try data convert on.")
    ] = "samples",
) -> None:
    """Write drawn scenes with questions and boxes as PNG and JSONL.

    Example: lvr-lite data make --out scenes --count 200 --seed 1 --split test
    """
    from lvr_lite.commands.data import MakeOptions, make_data
    from lvr_lite.terminal import say

    file = make_data(out, MakeOptions(count, seed, split, as_))
    say(f"{file}: {count} {'pictures' if as_ == 'coco' else 'questions'}")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FROM",
            help="COCO, Label Studio, LVR: JSON; Visual-CoT: JSONL; YOLO: folder or data.yaml.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TO", help="JSONL to write; pictures stay where they are.")
    ],
    form: Annotated[str, typer.Option("--from", help="coco, yolo, labelstudio, viscot or lvr.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; that of FROM by default.")
    ] = None,
    boxes_are: Annotated[
        str | None,
        typer.Option(
            help="stored or upright: pixels that boxes are of, where EXIF turns pictures; found "
            "out by their size, else upright."
        ),
    ] = None,
    boxes: Annotated[
        str | None,
        typer.Option(
            help="What boxes are measured in: pixels, fractions of the picture or thousandths (the "
            "scale 0 to 1000); the format's own by default."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="For yolo and viscot: only this one of their own splits.")
    ] = None,
    test_share: Annotated[
        float | None,
        typer.Option(
            help="Hold out this share of the pictures: writes TO-train.jsonl and TO-test.jsonl in "
            "place of TO.jsonl."
        ),
    ] = None,
    per_image: Annotated[
        int, typer.Option(min=1, help="Most questions made of one picture's classes.")
    ] = 6,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the questions and of the held-out share.")
    ] = 0,
    absent: Annotated[
        bool, typer.Option(help="Also ask about classes that are not there; these have no boxes.")
    ] = True,
    skip_broken: Annotated[
        bool,
        typer.Option("--skip-broken", help="Leave broken rows out, instead of writing nothing."),
    ] = False,
) -> None:
    """Turn other data sets into samples; where they have only boxes with classes, questions are
    made of these.

    Example: lvr-lite data convert --from coco annotations/instances_train.json set.jsonl
    --test-share 0.1
    """
    from lvr_lite.commands.data import ConvertOptions, convert_data
    from lvr_lite.terminal import say

    options = ConvertOptions(images, boxes_are, split, test_share, per_image, seed, absent, boxes)
    result = convert_data(
        source=source, target=target, form=form, options=options, skip_broken=skip_broken
    )
    for problem in result.problems:
        print(problem)
    if result.summary is None:
        say(
            f"{source}: {len(result.problems)} broken rows, nothing was written; mend them, or "
            "leave them out with --skip-broken"
        )
        raise typer.Exit(1)
    say(str(result.summary))


@app.command()
def validate(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Files of samples; those given together may share no picture."
        ),
    ],
    against_test: Annotated[
        Path | None, typer.Option(help="A test set none of whose pictures may be in them.")
    ] = None,
    model: ModelName = "tiny",
) -> None:
    """Report every problem of data files with file, line and field; exit code 1 if there is one.
    Notes are no problems.

    Example: lvr-lite data validate train.jsonl --against-test test.jsonl
    """
    from lvr_lite.commands.data import validate_data
    from lvr_lite.terminal import say

    valid = True
    for result in validate_data(files, against_test, model):
        for problem in result.problems:
            print(problem)
        notes = ""
        if result.notes:
            notes = f", {result.notes} notes"
        problems = len(result.problems) - result.notes
        say(f"{result.file}: {result.good} good samples, {problems} problems{notes}")
        valid &= result.valid
    if not valid:
        raise typer.Exit(1)


@app.command()
def preview(
    file: Annotated[Path, typer.Argument(help="A file of samples.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("preview.png"),
    count: Annotated[int, typer.Option(min=1, help="Samples to show.")] = 12,
    model: ModelName = "tiny",
) -> None:
    """Draw samples as the model sees them, with their boxes and the visual tokens that these
    select.

    Example: lvr-lite data preview scenes/test.jsonl --out preview.png
    """
    from lvr_lite.commands.data import preview_data
    from lvr_lite.terminal import say

    drawn, total = preview_data(file, out, count, model)
    say(f"{out}: {drawn} of {total} samples")
