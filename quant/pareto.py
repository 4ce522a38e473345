"""The figure of a search for mixed precision: size against loss.

May import: matplotlib and `reports`.
"""

from __future__ import annotations

from pathlib import Path

from lvr_lite.quant.reports import SearchReport


def draw(search: SearchReport, path: Path) -> None:
    """A figure (PNG) of size against loss: each candidate that was measured, and the best ones of
    every size.
    """
    from matplotlib.figure import Figure

    points = sorted((candidate.bits, candidate.loss.total) for candidate in search.measured)
    front: list[tuple[float, float]] = []
    for size, loss in points:
        if not front or loss < front[-1][1]:
            front.append((size, loss))
    chosen = search.chosen
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o", ms=4, color="0.6", label="measured")
    axes.plot(*zip(*front, strict=True), marker="o", label="best of its size")
    axes.plot(chosen.bits, chosen.loss.total, "o", ms=10, mfc="none", mec="red", label="written")
    axes.axvline(search.budget, linestyle=":", color="0.5")
    axes.set(
        xlabel="bits a weight (decoder, embedding, head; scales included)",
        ylabel="KL of answers + drift of latents",
        yscale="log",
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
