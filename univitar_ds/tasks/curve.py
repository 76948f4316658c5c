"""The plot of `eval tokens`: accuracy against the number of tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from univitar_ds.extras import extra
from univitar_ds.tasks.tokens import NATIVE, SQUARE, Point

SOFTWARE = "univitar-ds eval"
"""The entry Software in the metadata of a PNG, by which `is_drawing` recognises it."""


def drawing(points: Sequence[Point]) -> bytes:
    """Returns a PNG of accuracy, with its intervals, against the mean number of tokens. Each view has a curve.

    Raises: InstallationError without matplotlib.
    """
    with extra("train"):
        from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.4, 4.0), layout="constrained", dpi=120)
    axes = canvas.add_subplot()
    for modality in dict.fromkeys(point.modality for point in points):
        some = [point for point in points if point.modality == modality]
        for view in (NATIVE, SQUARE):
            curve = [point for point in some if point.view == view]
            values = [100 * point.figure.value for point in curve]
            ends = [point.figure.interval or (point.figure.value, point.figure.value) for point in curve]
            below = [value - 100 * low for value, (low, _) in zip(values, ends, strict=True)]
            above = [100 * high - value for value, (_, high) in zip(values, ends, strict=True)]
            axes.errorbar(
                [point.mean for point in curve],
                values,
                [below, above],
                marker="o" if view == NATIVE else "s",
                linestyle="-" if modality == "image" else "--",
                capsize=3,
                label=f"{modality}s, {view}",
            )
        axes.axhline(
            100 * some[0].figure.chance, color="grey", linestyle=":", linewidth=1, label=f"{modality}s, chance"
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens per item (mean)")
    axes.set_ylabel("top-1 accuracy, %")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    image = io.BytesIO()
    canvas.savefig(image, format="png", facecolor="white", metadata={"Software": SOFTWARE})
    return image.getvalue()


def is_drawing(path: Path) -> bool:
    """Whether `eval tokens` wrote this PNG."""
    with path.open("rb") as file:
        return b"tEXtSoftware\0" + SOFTWARE.encode() in file.read(1024)
