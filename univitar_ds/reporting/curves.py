"""Draws curves of one or several runs over the samples that they have seen, as SVG for the page and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from univitar_ds.extras import extra
from univitar_ds.reporting.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b82c4", "#d9772b", "#2f9e6b", "#b05ec2", "#c2554d", "#8a8f3a", "#4aa3a8", "#8b7355")
"""Colours of curves, each with a contrast of at least 3 to white and to the page's dark background."""
MOST_POINTS = 500
"""Maximum number of points of a curve. With more lines, each point is the mean of neighbouring lines."""
ALL_POINTS, LEAST_POINTS = 80_000, 40
"""Maximum number of points of all curves, about 15 bytes each on the page, and the least of a curve."""
STYLES = ("-", "--", ":", "-.")
_INK, _GRID = "#010203", "#040506"
"""Placeholders for the colours of texts and lines, which become `currentColor`: light or dark as on the page."""
_LABEL_STAGES, _LABELS = 6, 16
"""Maximum numbers of stages that are marked, and of curves in the legend."""
_LABEL_LETTERS = 36
"""Maximum length of a label."""
_LARGEST = 1e30
"""Larger absolute values are left out, since axes and their ticks would overflow."""
_WIDE, _HIGH = 6.4, 3.0
"""Size of a drawing in inches."""

Points = tuple[list[float], list[float]]
"""x and y of a curve: samples seen, and values."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """What a drawing shows. `names`: regular expression of the names of metrics; `unit`: label of the y axis; `least`:
    number of metrics that one of the runs must have, else the panel is not drawn."""

    key: str
    title: str
    names: str
    unit: str = ""
    logarithmic: bool = False
    least: int = 1


PANELS = (
    Panel("loss", "Loss", "loss"),
    Panel("loss-parts", "Parts of the loss", r"loss_(?!(.*_)?(image|video)$).+|teacher_agreement", least=2),
    Panel("loss-modality", "Loss of images and videos", "loss_(image|video)"),
    Panel("classes", "Evaluation during training: classification, top-1", r"eval/(?!.*(R@\d|top-5)).+"),
    Panel("retrieval", "Evaluation during training: retrieval, R@1", r"eval/.*R@1(_.*)?"),
    Panel("gradient", "Norm of the gradient and of its parts", r"grad_norm(_.+)?", logarithmic=True),
    Panel("rate", "Learning rate", "lr"),
    Panel("logits", "Scale and bias of the logits", r"logit_(scale|bias)"),
    Panel("tokens", "Tokens per sample", "tokens_per_sample", "tokens"),
    Panel("sizes", "Size of items: square root of the area", "side_px_(image|video)", "px"),
    Panel("fill", "Fill of packs, and samples that were downscaled", r"(fill|downscaled)_pct", "%"),
    Panel("balance", "Balance: FLOPs of the busiest rank above the mean", "flop_imbalance_pct", "%"),
    Panel("speed", "Samples per second", "samples_per_s"),
    Panel("use", "Model FLOPs utilization (MFU), and time spent waiting for data", r"(mfu|data_wait)_pct", "%"),
    Panel("memory", "Memory of a rank", "memory_gb", "GB"),
    Panel("bad", "Samples that were left out", r"(bad|ignored|filtered)_.+", "samples"),
)


@dataclass(frozen=True)
class Drawing:
    """The drawing of a panel. `svg`: an element for the page; `png`: content of a file."""

    key: str
    title: str
    svg: str
    png: bytes


def drawings(runs: Sequence[RunRecord]) -> list[Drawing]:
    """Draws each panel for which a run has enough metrics. With several runs each run has a colour, with one run each
    metric.

    Raises: InstallationError without matplotlib.
    """
    whole = [{panel.key: _curves(run, panel) for panel in PANELS} for run in runs]
    count = sum(len(found) for of_run in whole for found in of_run.values())
    most = max(min(MOST_POINTS, ALL_POINTS // max(count, 1)), LEAST_POINTS)
    curves = [
        {key: {name: _averaged(points, most) for name, points in found.items()} for key, found in of_run.items()}
        for of_run in whole
    ]
    return [
        _drawn(panel, runs, [of_run[panel.key] for of_run in curves])
        for panel in PANELS
        if any(len(of_run[panel.key]) >= panel.least for of_run in curves)
    ]


def _curves(run: RunRecord, panel: Panel) -> dict[str, list[tuple[float, float]]]:
    """Returns all points of the curves of a panel by metric, without metrics that are always 0."""
    lines = [_with_derived(line) for line in run.lines]
    names = sorted({name for line in lines for name in line if re.fullmatch(panel.names, name)})
    found = {}
    for name in names:
        points = [(line["samples_seen"], line[name]) for line in lines if _finite(line, name)]
        if points and any(value for _, value in points):
            found[name] = points
    return found


def _averaged(points: Sequence[tuple[float, float]], most: int) -> Points:
    """Returns at most `most` points of a curve: the means of groups of neighbouring points of equal size."""
    size = -(-len(points) // most)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [sum(x for x, _ in one) / len(one) for one in groups], [sum(y for _, y in one) / len(one) for one in groups]


def _with_derived(line: Line) -> Line:
    """Returns a line of metrics with `tokens_per_sample` in addition, if it can be computed."""
    if _finite(line, "tokens_per_s") and _finite(line, "samples_per_s") and line["samples_per_s"] > 0:
        return {**line, "tokens_per_sample": line["tokens_per_s"] / line["samples_per_s"]}
    return line


def _finite(line: Line, name: str) -> bool:
    """Whether a line has finite numbers `samples_seen` and `name`."""
    values = line.get("samples_seen"), line.get(name)
    return all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) <= _LARGEST for one in values)


def _drawn(panel: Panel, runs: Sequence[RunRecord], curves: Sequence[dict[str, Points]]) -> Drawing:
    with extra("train"):
        from matplotlib import rc_context, style

    settings = {
        "svg.fonttype": "none", "svg.hashsalt": panel.key, "font.family": "sans-serif", "font.size": 10,
        "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _GRID, "xtick.color": _INK, "ytick.color": _INK,
        "grid.color": _GRID, "axes.titlesize": 11, "legend.frameon": False, "text.parse_math": False,
    }  # fmt: skip
    with style.context("default"), rc_context(settings):
        figure = _figure(panel, runs, curves)
        text, image = io.StringIO(), io.BytesIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(image, format="png", facecolor="white", dpi=120, metadata={"Software": SOFTWARE})
    return Drawing(panel.key, panel.title, _element(text.getvalue(), panel, runs), image.getvalue())


SOFTWARE = "univitar-ds report"
"""Value of the field Software of a PNG, by which `report` recognizes its own files."""


def _figure(panel: Panel, runs: Sequence[RunRecord], curves: Sequence[dict[str, Points]]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter

    figure = Figure(figsize=(_WIDE, _HIGH), layout="constrained")
    axes = figure.add_subplot()
    names = sorted({name for of_run in curves for name in of_run})
    several = len(runs) > 1
    for index, of_run in enumerate(curves):
        for name, (x, y) in of_run.items():
            number = names.index(name)
            colour = COLOURS[(index if several else number) % len(COLOURS)]
            dashes = STYLES[(number if several else number // len(COLOURS)) % len(STYLES)]
            label = _label(runs[index].name if several else "", name if len(names) > 1 or not several else "")
            marker = "o" if len(x) == 1 else ""
            axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.6, marker=marker, label=label)
    labelled = len(axes.lines) > 1
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("samples seen")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if not several:
        _mark_stages(axes, runs[0])
    if labelled:
        _name_curves(axes, sum(map(len, curves)))
    return figure


def _name_curves(axes: Axes, count: int) -> None:
    """Draws a legend of the first `_LABELS` of `count` curves. A longer one would leave no space for the axes."""
    title = f"and {count - _LABELS} more" if count > _LABELS else None
    axes.legend(
        axes.lines[: min(count, _LABELS)], [line.get_label() for line in axes.lines[: min(count, _LABELS)]],
        loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, handlelength=1.6, title=title,
    )  # fmt: skip


def _label(run: str, name: str) -> str:
    name = name.removeprefix("eval/")
    return _drawable(f"{run}: {name}" if run and name else run or name)


def _drawable(text: str) -> str:
    """Returns the first _LABEL_LETTERS characters of a text, with control characters replaced: a font cannot draw them,
    and SVG must not contain them."""
    shown = text if len(text) <= _LABEL_LETTERS else f"{text[: _LABEL_LETTERS - 1]}…"
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in shown)


def _mark_stages(axes: Axes, run: RunRecord) -> None:
    """Draws a line with a name where each of the first `_LABEL_STAGES` stages begins, and a mark for each rollback and
    skipped update."""
    for stage, begin in _stages(run)[:_LABEL_STAGES]:
        axes.axvline(begin, color=_GRID, linewidth=0.8, alpha=0.5, linestyle=":")
        axes.annotate(
            _drawable(stage), (begin, 1.0), xycoords=("data", "axes fraction"), xytext=(2, 2),
            textcoords="offset points", fontsize=8, annotation_clip=False,
        )  # fmt: skip
    marked = list(_troubles(run))
    if marked:
        heights = [0.02] * len(marked)
        axes.plot(marked, heights, "v", color=COLOURS[4], markersize=5, transform=axes.get_xaxis_transform())


def _stages(run: RunRecord) -> list[tuple[str, float]]:
    """Returns (name, samples seen at its first line) of each stage in the metrics of a run."""
    found: list[tuple[str, float]] = []
    for line in run.lines:
        stage = line.get("stage")
        if isinstance(stage, str) and _finite(line, "samples_seen") and (not found or found[-1][0] != stage):
            found.append((stage, line["samples_seen"]))
    return found


def _troubles(run: RunRecord) -> Iterator[float]:
    """Yields the number of samples seen at the line after each rollback and skipped update."""

    def seen(step: int) -> float | None:
        later = (line["samples_seen"] for line in run.lines if line["step"] >= step and _finite(line, "samples_seen"))
        return next(later, None)

    for event in run.events:
        if event.get("event") in ("rollback", "skipped") and (place := seen(event["step"])) is not None:
            yield place


def _element(text: str, panel: Panel, runs: Sequence[RunRecord]) -> str:
    """Returns the <svg> element of an SVG document for the page: with the page's colours and width, a label for screen
    readers, and names that are unique on the page."""
    start = text.index("<svg")
    body = text[start:].replace(_INK, "currentColor").replace(_GRID, "currentColor")
    named = f"{panel.title}: {', '.join(run.name for run in runs)}"
    quoted = re.sub(r'[<>&"]', "", named)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{panel.key}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{panel.key}-", body)  # names must be unique on the page
    return body.replace("<svg", f'<svg role="img" aria-label="{quoted}"', 1)
