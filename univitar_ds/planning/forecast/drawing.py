"""Draws a plan as a PNG: peak memory of a GPU by part in each stage, and time and MFU by number of GPUs.

The user's matplotlib settings have no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from univitar_ds.atomic_write import replacing
from univitar_ds.planning.forecast.plan import Plan
from univitar_ds.planning.forecast.text import duration, short
from univitar_ds.planning.sizes import amount
from univitar_ds.training.step.recomputation import NAMES

SOFTWARE = "univitar_ds plan"
"""Value of the field Software of a PNG, by which `plan` recognizes its own files."""
_DPI = 110
_COLOURS = colormaps["tab20"]
GB = 1e9


def draw(path: Path, plan: Plan, scales: Sequence[Plan]) -> None:
    """Writes the plot to `path` as PNG. Args: scales: plans of the same run on several numbers of GPUs.

    Raises: StorageError if the file cannot be written.
    """
    with style.context("default"):
        figure = Figure(figsize=(15, 6.4), dpi=_DPI, facecolor="white")
        title = f"{plan.config.name} on {plan.cluster.title}, {plan.zero}: {duration(plan.hours)}"
        figure.suptitle(
            f"{title}, {short(plan.gpu_hours)} GPU hours", fontsize=15, fontweight="bold", x=0.03, ha="left"
        )
        figure.text(0.03, 0.905, "Predicted from shapes and rates; nothing was measured on a GPU.", fontsize=10)
        grid = {"width_ratios": [1.0, 0.52, 1.0, 1.0]}  # the second column is the legend of the first
        left, legend, middle, right = figure.subplots(1, 4, gridspec_kw=grid)
        legend.set_axis_off()
        figure.subplots_adjust(left=0.05, right=0.985, top=0.83, bottom=0.14, wspace=0.16)
        _memory(left, plan)
        _days(middle, plan, scales)
        _mfu(right, plan, scales)
        with replacing(path) as partial:
            figure.savefig(partial, format="png", metadata={"Software": SOFTWARE})


def _memory(axes: Axes, plan: Plan) -> None:
    largest = {}
    for stage in plan.stages:
        for name, size in stage.peak.parts.items():
            largest[name] = max(largest.get(name, 0.0), size)
    names = sorted(largest, key=lambda name: -largest[name])
    below = [0.0] * len(plan.stages)
    places = range(len(plan.stages))
    for index, name in enumerate(names):
        sizes = [stage.peak.parts.get(name, 0.0) / GB for stage in plan.stages]
        label = f"{name}, up to {amount(largest[name])}"
        axes.bar(places, sizes, bottom=below, width=0.6, color=_COLOURS(index % 20), label=label)
        below = [one + size for one, size in zip(below, sizes, strict=True)]
    room, memory = plan.cluster.room / GB, plan.cluster.gpu.memory.value / GB
    axes.axhline(room, color="#b00020", linewidth=1.2)
    axes.text(-0.45, room, f"usable: {room:.0f} GB", color="#b00020", va="bottom", fontsize=9)
    axes.set_ylim(0, 1.08 * max(memory, *below))
    axes.set_xlim(-0.5, len(plan.stages) - 0.5)
    labels = [f"{stage.name}\nrecomputes\n{NAMES.get(stage.kind, stage.kind)}" for stage in plan.stages]
    axes.set_xticks(list(places), labels, fontsize=9)
    axes.set_ylabel("GB per GPU")
    axes.set_title("Peak memory of each stage", loc="left", fontsize=11)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _days(axes: Axes, plan: Plan, scales: Sequence[Plan]) -> None:
    fitting = [one for one in scales if one.misfit() is None]
    _axis_of_gpus(axes, plan)
    axes.set_title("Days of the whole curriculum", loc="left", fontsize=11)
    if not fitting:
        axes.text(0.5, 0.5, "too little GPU memory at every number of GPUs", ha="center", transform=axes.transAxes)
        return
    first = fitting[0]
    ranks = [one.cluster.ranks for one in fitting]
    ideal = [first.hours / 24 * first.cluster.ranks / count for count in ranks]
    label = f"linear scaling from {ranks[0]:,} GPU{'' if ranks[0] == 1 else 's'}"
    axes.plot(ranks, ideal, color="#999999", linestyle=":", label=label)
    axes.plot(ranks, [one.hours / 24 for one in fitting], color="#1f77b4", marker="o", label="predicted")
    axes.set_yscale("log")
    axes.legend(fontsize=9, frameon=False)


def _mfu(axes: Axes, plan: Plan, scales: Sequence[Plan]) -> None:
    _axis_of_gpus(axes, plan)
    for index, stage in enumerate(plan.stages):
        points = [(one.cluster.ranks, 100 * one.stages[index].mfu) for one in scales if one.misfit() is None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=stage.name)
    axes.set_ylim(bottom=0)
    axes.set_title("MFU, %", loc="left", fontsize=11)
    if axes.lines[1:]:
        axes.legend(fontsize=9, frameon=False)


def _axis_of_gpus(axes: Axes, plan: Plan) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("GPUs")
    axes.grid(alpha=0.3)
    axes.axvline(plan.cluster.ranks, color="#cccccc", linewidth=6, zorder=0)
