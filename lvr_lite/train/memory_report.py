"""A memory plan as tables. May import: rich and all that stands above `train`, and of it
`memory`.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lvr_lite.files import JsonObject
from lvr_lite.train.memory import GIB, MIB


def show(plan: JsonObject) -> None:
    """Print a plan of `lvr_lite.train.memory_plan.plan`."""
    console = Console()
    console.print(_by_part(plan))
    console.print(_by_picture(plan))
    console.print(_by_card(plan))
    for note in plan["notes"]:
        console.print(f"· {note}", soft_wrap=True, highlight=False)


def _by_part(plan: JsonObject) -> Table:
    visual = plan["tokens"]["visual"]
    batch = plan["settings"]["train"]["batch"]
    title = f"{plan['model']}: {visual} visual tokens a picture, {batch} samples at once"
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("MiB", justify="right")
    for name, size in plan["stays"].items():
        table.add_row(name, _mib(size))
    table.add_section()
    for name, size in plan["peaks"].items():
        most = " (the most)" if name == plan["phase"] else ""
        table.add_row(f"{name}{most}", _mib(size))
    table.add_section()
    table.add_row("live tensors at the most, with cuBLAS's workspace", _mib(plan["tensors"]))
    table.add_row("on the card, with slack and CUDA context", _mib(plan["card"]))
    return table


def _by_picture(plan: JsonObject) -> Table:
    table = Table(title="by picture, with gradient checkpointing on / off", title_justify="left")
    for name in ("visual tokens", "max_pixels", "saved MiB", "card GiB"):
        table.add_column(name, justify="right")
    for row in plan["pictures"]:
        on = row["checkpointing"]
        off = row["plain"]
        visual = row["visual_tokens"]
        yours = " (yours)" if visual == plan["tokens"]["visual"] else ""
        table.add_row(
            f"{visual}{yours}",
            str(row["max_pixels"]),
            f"{_mib(on['saved'])} / {_mib(off['saved'])}",
            f"{_gib(on['card'])} / {_gib(off['card'])}",
        )
    return table


def _by_card(plan: JsonObject) -> Table:
    table = Table(title="by card", title_justify="left")
    for name in ("GiB", "fits", "room, GiB", "largest picture", "lower first"):
        table.add_column(name)
    for card in plan["cards"]:
        lower = " ".join(f"--set {override}" for override in card["lower"]) or "–"
        if not card["lower_fits"]:
            lower = f"not enough, {_gib(card['lower_card'])} GiB at the least: {lower}"
        visual = card["largest_visual_tokens"]
        largest = f"{visual} visual tokens" if visual else "none"
        fits = "yes" if card["fits"] else "no"
        table.add_row(f"{card['gib']:g}", fits, _gib(card["room"]), largest, lower)
    return table


def _mib(size: float) -> str:
    return f"{size / MIB:,.0f}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
