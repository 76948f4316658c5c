"""Renders the page of runs: one HTML file with embedded drawings and images, for screens of any width and for print."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from univitar_ds import startup
from univitar_ds.atomic_write import replace_bytes
from univitar_ds.config.load import dumped
from univitar_ds.errors import UserError, shortened
from univitar_ds.evaluation.report import interval_text, name_of, percent, render_results
from univitar_ds.extras import extra
from univitar_ds.owned import check_result, drawn_by, write_result
from univitar_ds.reporting.curves import PANELS, SOFTWARE, Drawing, drawings
from univitar_ds.reporting.differences import differences
from univitar_ds.reporting.page_file import GENERATOR, is_page
from univitar_ds.reporting.record import RunRecord, read_run
from univitar_ds.training.logging.trackers import without_credentials
from univitar_ds.training.logging.writers import event_text

if TYPE_CHECKING:
    from univitar_ds.reporting.map_items import MapItem
    from univitar_ds.reporting.maps import Map

TEMPLATE = "page.html.jinja"
MOST_RUNS = 8
MOST_BYTES = 5_000_000
"""Maximum size of a page. Example images and maps get what texts and curves leave."""
_MAP_BYTES = 30_000
"""Maximum bytes of a map, before base64, which adds a third."""
_MAPS_SHARE = 1 / 3
"""Maximum share of the page that maps take."""
MOST_EVENTS = 200
"""Maximum number of events of a run on the page."""
_EVENT_LETTERS = 300
"""Maximum length of the text of an event."""
_CONFIG_LETTERS = 60_000
"""Maximum length of the text of a run file."""
_IMAGE_PX = 1400
"""Maximum width of an image on the page. Wider images are reduced."""
_IMAGES_BYTES = 3_000_000
"""Maximum bytes of all example images of a page together, before base64. Maps are not included."""
_EXAMPLE_TEXT = 1000
"""Bytes of the texts around an example image."""
_OF_ITEMS = (
    "{}s and the texts that the model finds for them",
    "Held-out {}s, each with its true caption, its patch features as colours, and the texts that the model ranks "
    "highest, with the correct ones marked",
)
_OF_TEXTS = (
    "captions and the {}s that the model finds for them",
    "Captions of held-out {0}s, each with the {0}s that the model ranks highest, with the correct ones marked",
)
"""Title and alternative text of an example image."""
_WEBP_PX = 16_383
"""Maximum side of a WebP image, a limit of the format."""
_UNPRINTED = dict.fromkeys(
    {*range(32), 127, *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - set(map(ord, "\t\n\r")),
    "\N{REPLACEMENT CHARACTER}",
)
"""Control characters that HTML must not contain, and those that change the direction of the text after them. Captions
and names in a damaged log may have them."""


class Cell(NamedTuple):
    """A result of one run: value and 95 % interval in percent as text, and whether it is the best in its row."""

    value: str
    interval: str = ""
    best: bool = False


class Row(NamedTuple):
    """A measure of the evaluation, with a cell for each run. `chance` (in percent) and `n` (number of queries) are
    texts: one value, or if the runs differ, the value of each run that has the measure, in their order."""

    task: str
    measure: str
    chance: str
    n: str
    cells: list[Cell]


@dataclass(frozen=True)
class PageImage:
    """An image on the page: title, alternative text, content as a data URL, and the width at which it is shown, in CSS
    pixels (None: that of the page), also if its content is reduced."""

    title: str
    alt: str
    url: str
    width: int | None = None


class MapFigure(NamedTuple):
    """Images that are shown one below the other, and the text below them."""

    images: list[PageImage]
    text: str


@dataclass(frozen=True)
class PageOptions:
    """What is drawn in addition to the content of the runs' folders.

    `images`: images and videos for maps of the features, empty for held-out items of the first run, None for no maps;
    `caption`: text whose similarity is drawn in these maps; `drawings`: existing folder in which the curves are also
    written as PNG files.
    """

    images: Sequence[Path] | None = None
    caption: str | None = None
    drawings: Path | None = None


DEFAULTS = PageOptions()


def check_page(out: Path, options: PageOptions) -> None:
    """Checks that `write_page` may write its files. Args: as `write_page`.

    Raises: ConfigError if a file exists that `report` did not write, or a file cannot be written.
    """
    check_result(out, is_page)
    if options.drawings is not None:
        for panel in PANELS:
            check_result(options.drawings / f"{panel.key}.png", drawn_by(SOFTWARE))


def write_page(folders: Sequence[Path], out: Path, options: PageOptions = DEFAULTS) -> Iterator[str]:
    """Writes the page of runs to the file `out`, and the curves as PNG files if `options.drawings` is set.

    Yields: texts to print: the results of each run, and what was written.
    Raises: as `read_runs`, `map_items.read_items` and `render_page`; StorageError if a file cannot be written.
    """
    startup.phase("reading the runs")
    runs = read_runs(folders)
    items = _items(runs, options)
    for run in runs:
        title = [str(run.folder), ""] if len(runs) > 1 else []
        results = render_results(run.evaluation, run.summary)
        yield "\n".join([*title, results or f"{run.folder} has no results yet"])
    startup.phase("drawing the page")
    page, drawn = render_page(runs, items)
    write_result(out, page)
    yield f"page in {out} ({len(page.encode()) / 1e6:.1f} MB)"
    if options.drawings is not None:
        for drawing in drawn:
            replace_bytes(options.drawings / f"{drawing.key}.png", drawing.png)
        yield f"{len(drawn)} drawings in {options.drawings}"


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Reads runs. If runs have the same name, the folder is added to it.

    Raises: UserError for more than `MOST_RUNS`, or as `record.read_run`.
    """
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs are too many for one page (limit {MOST_RUNS}); give fewer")
    runs = [read_run(folder) for folder in folders]
    names, folders = [run.name for run in runs], [run.folder.resolve().name for run in runs]
    return [
        replace(run, name=f"{run.name} ({folder if folders.count(folder) == 1 else run.folder})")
        if names.count(run.name) > 1
        else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def _items(runs: Sequence[RunRecord], options: PageOptions) -> list[MapItem]:
    if options.images is None:
        return []
    from univitar_ds.reporting.map_items import read_items  # imports torch, which is slow

    return read_items(runs, options.images, options.caption)


def render_page(runs: Sequence[RunRecord], items: Sequence[MapItem] = ()) -> tuple[str, list[Drawing]]:
    """Returns the page as HTML, and its drawings. Args: items: for maps of the features.

    Raises: as `maps.maps_of`; UserError if an example image cannot be read; InstallationError without Jinja2 or
        matplotlib.
    """
    with extra("train"):
        from jinja2 import Environment, PackageLoader, StrictUndefined

    drawn = drawings(runs)
    environment = Environment(
        loader=PackageLoader("univitar_ds.reporting", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    content = {
        "generator": GENERATOR,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": runs,
        "facts": _facts(runs),
        "drawings": drawn,
        "strides": [(run.name, run.stride) for run in runs if run.stride > 1],
        "events": [(run.name, shown, hidden) for run in runs for shown, hidden in [_events(run)] if shown],
        "results": _results(runs),
        "checkpoints": [(run.name, _weights(run)) for run in runs if run.evaluation],
        "notes": _notes(runs),
        "maps": _maps(runs, items),
        "examples": [],
        "differences": differences(runs) if len(runs) > 1 else [],
        "configs": [(run.name, _run_file(run)) for run in runs],
    }
    template = environment.get_template(TEMPLATE)
    left = (MOST_BYTES - len(template.render(content).encode("utf-8", "replace"))) * 3 // 4  # base64 adds a third
    each = min(left, _IMAGES_BYTES) // max(1, sum(len(run.examples) for run in runs)) - _EXAMPLE_TEXT
    content["examples"] = [image for run in runs for image in _examples(run, each)]
    page = template.render(content)
    return page.translate(_UNPRINTED).encode("utf-8", "replace").decode(), drawn


def _facts(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Returns the rows of the table of runs as (name, text of each run), without rows that no run has a value for."""
    rows = [
        ("folder", [str(run.folder) for run in runs]),
        ("state", [_state(run) for run in runs]),
        ("steps", [_last(run, "step", "{:,.0f}") for run in runs]),
        ("samples seen", [_last(run, "samples_seen", "{:,.0f}") for run in runs]),
        ("tokens seen", [_last(run, "tokens_seen", "{:,.0f}") for run in runs]),
        ("parameters", [_of_summary(run, "parameters", "{:,.0f}") for run in runs]),
        ("ranks", [_of_summary(run, "ranks", "{}") for run in runs]),
        ("last loss", [_last(run, "loss", "{:.4f}") for run in runs]),
        ("samples per second, median", [_median(run, "samples_per_s", "{:,.1f}") for run in runs]),
        ("MFU, median", [_median(run, "mfu_pct", "{:.1f} %") for run in runs]),
        ("machine", [_of_summary(run, "machine", "{}") for run in runs]),
        ("versions", [_versions(run) for run in runs]),
    ]
    return [(name, values) for name, values in rows if any(values)]


def _state(run: RunRecord) -> str:
    if not run.summary:
        return "in training, or ended without a summary"
    return "finished" if run.summary.get("completed") else "stopped before its end"


def _last(run: RunRecord, name: str, form: str) -> str:
    values = _values(run, name)
    return form.format(values[-1]) if values else ""


def _median(run: RunRecord, name: str, form: str) -> str:
    """Returns the median over the lines of metrics, since some cover few steps."""
    values = _values(run, name)
    return form.format(statistics.median(values)) if values else ""


def _values(run: RunRecord, name: str) -> list[float]:
    return [line[name] for line in run.lines if isinstance(line.get(name), int | float)]


def _of_summary(run: RunRecord, name: str, form: str) -> str:
    value = run.summary.get(name)
    if not isinstance(value, int | float | str) or (isinstance(value, str) and form != "{}"):
        return ""
    return form.format(value)


def _versions(run: RunRecord) -> str:
    versions = run.summary.get("versions")
    return ", ".join(f"{name} {one}" for name, one in versions.items()) if isinstance(versions, Mapping) else ""


def _events(run: RunRecord) -> tuple[list[tuple[str, str]], int]:
    """Returns (kind, text) of the first MOST_EVENTS events of a run, and the number of further events."""
    shown = []
    for event in run.events[:MOST_EVENTS]:
        try:
            kind, text = str(event["event"]), event_text(event)
        except (KeyError, TypeError, ValueError):  # written by another version, or damaged
            kind, text = str(event.get("event", "?")), ", ".join(f"{name} {one}" for name, one in event.items())
        shown.append((shortened(kind), shortened(text, _EVENT_LETTERS)))
    return shown, max(0, len(run.events) - MOST_EVENTS)


def _results(runs: Sequence[RunRecord]) -> list[Row]:
    """Returns a row for each measure that any run has, in the order in which they first occur."""
    named: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
    for index, run in enumerate(runs):
        for figure in run.evaluation.get("figures", []):
            named.setdefault((*(figure.get(name) for name in ("task", "set", "modality", "measure")),), {})[index] = (
                figure
            )
    return [_row(found, len(runs)) for found in named.values()]


def _row(found: Mapping[int, Mapping[str, Any]], count: int) -> Row:
    """Returns the row of a measure. Args: found: its figure by index of the run; count: number of runs.

    The best value is marked if several runs have the measure, with equal numbers of items and candidates.
    """
    first = next(iter(found.values()))
    alike = len({(figure["n"], figure["candidates"], figure["chance"]) for figure in found.values()}) == 1
    best = max(figure["value"] for figure in found.values()) if len(found) > 1 and alike else None
    cells = [
        _cell(found[index], found[index]["value"] == best) if index in found else Cell("") for index in range(count)
    ]
    figures = [found[index] for index in sorted(found)]
    chance = _of_runs([percent(figure["chance"]) for figure in figures])
    return Row(name_of(first), first["measure"], chance, _of_runs([str(figure["n"]) for figure in figures]), cells)


def _of_runs(texts: Sequence[str]) -> str:
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _cell(figure: Mapping[str, Any], best: bool) -> Cell:
    return Cell(percent(figure["value"]), interval_text(figure.get("interval")), best)


def _weights(run: RunRecord) -> str:
    """Returns checkpoint, weights and data of an evaluation."""
    text = f"{run.evaluation.get('checkpoint', '?')}, {run.evaluation.get('weights', 'trained')} weights"
    sources = [
        f"{source['path']} (split {source['split']})" if source.get("split") else str(source["path"])
        for source in run.evaluation.get("sources", [])
    ]
    return without_credentials(f"{text}, on {', '.join(sources)}") if sources else text


def _notes(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the notes of the evaluations; of several runs, with their names."""
    notes = [(run.name, note) for run in runs for note in run.evaluation.get("notes", [])]
    return [f"{name}: {note}" if len(runs) > 1 else note for name, note in dict.fromkeys(notes)]


def _examples(run: RunRecord, most: int) -> Iterator[PageImage]:
    for (modality, of_texts), path in run.examples.items():
        title, alternative = (text.format(modality) for text in (_OF_TEXTS if of_texts else _OF_ITEMS))
        yield PageImage(f"{run.name}: {title}", alternative, file_url(path, most))


def _run_file(run: RunRecord) -> str:
    text = without_credentials(dumped(run.config.model_dump(mode="json")))
    return text if len(text) <= _CONFIG_LETTERS else f"{text[:_CONFIG_LETTERS]}\n# and more, in {run.folder}"


def _maps(runs: Sequence[RunRecord], items: Sequence[MapItem]) -> list[tuple[str, list[MapFigure]]]:
    """Returns the title and the maps of each item, for each run."""
    if not items:
        return []
    from univitar_ds.reporting.maps import maps_of  # imports torch, which is slow

    drawn = [one for run in runs for one in maps_of(run, items)]
    count = sum(len(figure.images) for one in drawn for figure in one.maps)
    each = min(_MAP_BYTES, int(MOST_BYTES * _MAPS_SHARE * 3 / 4) // max(count, 1))
    return [
        (one.title, [MapFigure(list(_map_images(one.title, figure, each)), figure.text) for figure in one.maps])
        for one in drawn
    ]


def _map_images(title: str, figure: Map, most: int) -> Iterator[PageImage]:
    for what, image in figure.images.items():
        yield PageImage(what, f"{title}, {figure.text}: {what}", data_url(image, most), image.width)


def file_url(path: Path, most: int) -> str:
    """Returns an image file as a data URL, see `data_url`. Raises: UserError if it cannot be read as an image."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); evaluate the run again") from error
    return data_url(image, most)


def data_url(image: Image.Image, most: int = _MAP_BYTES) -> str:
    """Returns an RGB image as a data URL (WebP).

    Size and quality are reduced until it has at most `most` bytes before base64, or a width of at most 64 pixels.
    """
    scale = min(_IMAGE_PX / image.width, _WEBP_PX / image.height)
    if scale < 1:
        width, height = (max(1, int(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    content, quality = io.BytesIO(), 88
    image.save(content, "WEBP", quality=quality)
    while content.tell() > most and image.width > 64:
        quality = max(50, quality - 13)
        image = image.resize((image.width * 4 // 5, max(1, image.height * 4 // 5)), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        image.save(content, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
