"""Runs a task: opens the model and the data, measures, and returns results in the form of `evaluation.json`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from univitar_ds import startup
from univitar_ds.atomic_write import replace_bytes
from univitar_ds.config.data import SourceConfig
from univitar_ds.data.storage.address import real_place
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import ConfigError, DataError
from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.measure import left_out
from univitar_ds.evaluation.retrieval import retrieval
from univitar_ds.evaluation.scores import Figure
from univitar_ds.evaluation.zero_shot import Texts, zero_shot
from univitar_ds.geometry import MODALITIES, Modality
from univitar_ds.inference.embed_files import ModelOptions
from univitar_ds.inference.workers import AnySetup, device_of
from univitar_ds.owned import check_result
from univitar_ds.tasks.cached.averaged import ItemViews, mean_of
from univitar_ds.tasks.cached.feature_cache import Request, Vectors, features
from univitar_ds.tasks.cached.token_cache import MOST_GB, Tokens, tokens
from univitar_ds.tasks.curve import drawing, is_drawing
from univitar_ds.tasks.dense.probe import DenseOptions, dense
from univitar_ds.tasks.items import Items, read_items
from univitar_ds.tasks.knn import NEIGHBOURS, knn
from univitar_ds.tasks.labelled import Labelled, common_classes, labelled, labelled_features
from univitar_ds.tasks.linear import linear
from univitar_ds.tasks.models import OpenedModel, open_model
from univitar_ds.tasks.peers import OpenedPeer
from univitar_ds.tasks.probes.attentive import Split, Workspace, attentive
from univitar_ds.tasks.probes.sgd import linear_sgd
from univitar_ds.tasks.probes.sweep import ProbeOptions
from univitar_ds.tasks.sources import DataOptions, class_list, features_cache, probe_sources, test_source, tokens_cache
from univitar_ds.tasks.templates import IMAGENET, read_templates
from univitar_ds.tasks.tokens import COUNTS, Point, Sweep, SweptSplit

FORMAT = 1
VIDEO_TEMPLATES = ("a video of a {}.",)
AnyModel = OpenedModel | OpenedPeer
_Measured = tuple[list[Figure], list[str]]
_Needs = Literal["label", "caption"]


@dataclass(frozen=True)
class TaskOptions:
    """Options of all tasks.

    `templates`: see `templates.read_templates`, None for the defaults; `neighbours`: of kNN; `progress`: whether to
    show progress bars on stderr; `solver`: of the linear probe, lbfgs or sgd; `epochs`: of probes that are trained by
    gradient descent, None for the default; `max_tokens`: maximum of an item in the attentive probe, None for the
    model's; `max_gb`: maximum size of the stored tokens of a split, in GB, in the attentive and the dense probe;
    `dense`: label maps and windows of the dense probe. Of the sweep over tokens: `counts`: numbers of tokens;
    `by`: zero-shot or knn, None: zero-shot if the model has a text tower; `png`: file for the plot, None for no plot.
    `views`: parts and crops of an item in zero-shot and retrieval.
    """

    templates: str | None = None
    neighbours: Sequence[int] = NEIGHBOURS
    progress: bool = True
    solver: str = "lbfgs"
    epochs: int | None = None
    max_tokens: int | None = None
    max_gb: float = MOST_GB
    dense: DenseOptions | None = None
    counts: Sequence[int] = COUNTS
    by: str | None = None
    png: Path | None = None
    views: ItemViews = field(default_factory=ItemViews)

    def probe(self) -> ProbeOptions:
        """Returns the options of a probe on tokens."""
        return ProbeOptions(self.epochs, self.max_gb, self.progress)


def run_task(
    task: str, model: str, data: DataOptions, options: TaskOptions, how: ModelOptions | None = None
) -> dict[str, Any]:
    """Measures a model on a data set. Args: task: a key of `_TASKS`.

    Returns: format, task, model, data, figures (`Figure.to_dict`), notes, seconds.
    Raises: CheckpointError, ConfigError, DataError or StorageError, also if nothing could be measured.
    """
    start = time.monotonic()
    if options.png is not None:
        check_result(options.png, is_drawing)
    if task == "linear" and options.solver != "sgd" and options.epochs is not None:
        raise ConfigError(f"--epochs {options.epochs} is for --solver sgd: L-BFGS has no epochs; leave it out")
    startup.phase("opening the model")
    opened = open_model(model, how or ModelOptions())
    startup.phase("reading the data")
    data = replace(data, storage=StorageSettings.of(opened.setup(texts=False).reading.data))
    figures, notes = _TASKS[task](opened, data, options)
    if not figures:
        raise DataError(f"{task} has measured nothing: {' '.join(notes) or 'the data has no image and no video'}")
    return {
        "format": FORMAT,
        "task": task,
        "model": model,
        "data": data.data,
        "figures": [figure.to_dict() for figure in figures],
        "notes": notes,
        "seconds": round(time.monotonic() - start, 1),
    }


def _zero_shot(opened: AnyModel, data: DataOptions, options: TaskOptions) -> _Measured:
    templates = _templates(options)
    names = class_list(data)

    def measured(found: Embeddings, texts: Texts) -> _Measured:
        used = templates[found.modality]
        figures, notes = zero_shot(found, used, texts, names)
        return figures, [*notes, *([_templates_note(opened, found.modality, used, options)] if figures else [])]

    return _with_texts(opened, data, options, "label", measured)


def _templates_note(opened: AnyModel, modality: Modality, used: Sequence[str], options: TaskOptions) -> str:
    """Returns a sentence about the templates of a modality. Args: used: these templates."""
    if len(used) == 1:
        text = repr(used[0])
    else:
        origin = "CLIP's, for ImageNet" if options.templates in (None, IMAGENET) else f"of {options.templates}"
        text = f"{len(used)} templates ({origin})"
    note = f"Zero-shot of {modality}s: each class name in {text}"
    if options.templates is not None:
        return f"{note}."
    if opened.recipe is not None and getattr(opened.recipe.evaluation, key := f"{modality}_templates") != used:
        note += f"; the run's own evaluation has others (evaluation.{key})"
    return f"{note}; --templates FILE takes others."


def _templates(options: TaskOptions) -> dict[Modality, list[str]]:
    """Returns the templates of each modality: the given ones, or the defaults."""
    if options.templates is not None:
        return dict.fromkeys(MODALITIES, read_templates(options.templates))
    return {"image": read_templates(IMAGENET), "video": list(VIDEO_TEMPLATES)}


def _retrieval(opened: AnyModel, data: DataOptions, options: TaskOptions) -> _Measured:
    def measured(found: Embeddings, texts: Texts) -> _Measured:
        ranked = retrieval(found, texts)
        if ranked:
            return ranked, []
        lacking = "all captions are the same" if found.captioned else "no item has a caption"
        return [], [f"Retrieval of {found.modality}s: {lacking}."]

    return _with_texts(opened, data, options, "caption", measured)


def _with_texts(
    opened: AnyModel,
    data: DataOptions,
    options: TaskOptions,
    needs: _Needs,
    measured: Callable[[Embeddings, Texts], _Measured],
) -> _Measured:
    """Measures each modality of the data by the embeddings of both towers. Args: needs: see `_listed`; measured:
    measures the embeddings of one modality."""
    opened.check_texts()
    setup, source = opened.setup(texts=True), test_source(data)
    (both,) = _listed(setup, [source], needs)
    figures: list[Figure] = []
    notes: list[str] = []
    whole: list[Vectors] = []  # features of both modalities, if there is only one view
    for items in both:
        if not items.samples and not items.bad:
            continue
        views = options.views.of(setup, items.modality)
        if views == [setup]:
            whole = whole or _features_of(opened, setup, [source], data, options)
            found = whole[0]
        else:
            found = mean_of([one for view in views for one in _features_of(opened, view, [source], data, options)])
        embedded = items.embeddings(found, opened.texts)
        if len(embedded):
            more, said = measured(embedded, opened.texts)
            figures += more
            notes += [*said, *options.views.note(items.modality)]
        if embedded.bad:
            notes.append(f"Some {items.modality}s were {left_out(embedded)}.")
    return figures, [*notes, *_video_notes(opened, figures)]


def _probe(task: str, opened: AnyModel, data: DataOptions, options: TaskOptions) -> _Measured:
    """Measures each modality that has labels in both splits by features of the encoder. Args: task: knn or linear."""
    figures: list[Figure] = []
    setup, sources = opened.setup(texts=False), probe_sources(data)
    listed = _listed(setup, sources, "label")
    measurable, notes = _measurable(*listed)
    setup = _of_measurable(setup, measurable, listed)
    found = _features_of(opened, setup, sources if measurable else [], data, options)
    for number in measurable:
        modality = MODALITIES[number]
        train, test = (labelled_features(items[number], one) for items, one in zip(listed, found, strict=True))
        try:
            both = labelled(train, test, modality)
        except DataError as error:  # of the items that could be read; the other modality may be measured
            notes.append(f"{error}.")
            continue
        if both.unknown:
            notes.append(f"{both.unknown} {modality}s have a label that the training split lacks, and are left out.")
        notes.append(_about_probe(task, both, modality, sources))
        if task == "knn":
            figures += knn(both, modality, options.neighbours)
        else:
            more, said = _linear(both, modality, options)
            figures += more
            notes += said
    notes += _video_notes(opened, figures)
    return figures, notes or ([] if figures else ["no item has a label."])


def _about_probe(task: str, both: Labelled, modality: Modality, sources: Sequence[SourceConfig]) -> str:
    """Returns a sentence about the items of a probe."""
    counts = [f"{len(classes):,} {modality}s" for classes in (both.train_classes, both.test_classes)]
    learned, scored = (f"{count} of {source.label}" for count, source in zip(counts, sources, strict=True))
    splits = [_split_text(source) for source in sources]
    return (
        f"{task}: {learned}{splits[0]}, are the training items, and {scored}{splits[1]}, are scored, by their pooled "
        f"features; {len(both.classes)} classes."
    )


def _split_text(source: SourceConfig) -> str:
    return f", split {source.split}" if source.split else ""


def _listed(setup: AnySetup, sources: Sequence[SourceConfig], needs: _Needs) -> list[list[Items]]:
    """Returns the items of each source by modality. All sources are read before any feature is computed, so that a
    source without usable items is reported early.

    Args: needs: the field that an item must have to be measured. Raises: DataError if no item of a source has it;
        ConfigError if two sources have a shard in common.
    """
    settings = StorageSettings.of(setup.reading.data)
    listed = [read_items(source, settings) for source in sources]
    for source, both in zip(sources, listed, strict=True):
        if not any(getattr(sample, needs) for items in both for sample in items.samples):
            raise DataError(
                f"no item has a {needs} in {source.path}{_split_text(source)}; name other data or another split"
            )
    paths = [{sample.shard.path for items in both for sample in items.samples} for both in listed]
    of_each = [set(map(real_place, own)) for own in paths]
    if shared := set.intersection(*of_each) if len(of_each) > 1 else set():
        raise ConfigError(
            f"the probe would learn from the items that it is scored on: both are in {min(shared)}, since tars without "
            "a manifest have no splits; name other tars by --train-data"
        )
    return listed


def _measurable(train: Sequence[Items], test: Sequence[Items]) -> tuple[list[int], list[str]]:
    """Returns the indices of the modalities in which the splits share a class, and notes about the other modalities."""
    found: list[int] = []
    notes: list[str] = []
    for number, (learned, scored) in enumerate(zip(train, test, strict=True)):
        modality = learned.modality
        if scored.labels:
            try:
                common_classes(learned.labels, scored.labels, modality)
                found.append(number)
            except DataError as error:  # the other modality may be measured
                notes.append(f"{error}.")
        elif learned.labels:
            notes.append(f"No {modality} of the test split has a label, so that {modality}s are not measured.")
    return found, notes


def _of_measurable(setup: AnySetup, measurable: Sequence[int], listed: Sequence[Sequence[Items]]) -> AnySetup:
    """Returns the setup, which reads only the measurable modality if it is the only one and the other has items."""
    if len(measurable) != 1 or not any(both[1 - measurable[0]].samples for both in listed):
        return setup
    return replace(setup, reading=replace(setup.reading, only=MODALITIES[measurable[0]]))


def _of_several_classes(both: Sequence[Items], names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Returns the indices of the modalities with two classes or more, which zero-shot needs, and notes about those with
    one. Args: names: classes that need not occur."""
    found = [number for number, items in enumerate(both) if items.labels and len({*items.labels, *names}) > 1]
    notes = [
        f"Zero-shot of {items.modality}s: only one label, {items.labels[0]!r}; at least two are needed."
        for items in both
        if items.labels and len({*items.labels, *names}) == 1
    ]
    return found, notes


def _features_of(
    opened: AnyModel, setup: AnySetup, sources: Sequence[SourceConfig], data: DataOptions, options: TaskOptions
) -> list[Vectors]:
    cache = features_cache(data)
    return [features(opened, setup, source, cache, progress=options.progress) for source in sources]


def _video_notes(opened: AnyModel, figures: Sequence[Figure]) -> list[str]:
    shown = opened.video_note is not None and any(figure.modality == "video" for figure in figures)
    return [opened.video_note] if shown else []


def _linear(data: Labelled, modality: str, options: TaskOptions) -> _Measured:
    if options.solver == "sgd":
        return linear_sgd(data, modality, device=device_of(0), epochs=options.epochs, progress=options.progress)
    return linear(data, modality, progress=options.progress)


def _attentive(opened: AnyModel, data: DataOptions, options: TaskOptions) -> _Measured:
    figures: list[Figure] = []
    sources, progress = probe_sources(data), options.progress
    workspace = Workspace(device_of(0), opened.token_budget)
    listed = _listed(opened.setup(texts=False), sources, "label")
    measurable, notes = _measurable(*listed)
    setups = {number: opened.token_setup(MODALITIES[number], options.max_tokens) for number in measurable}
    for number, setup in setups.items():
        modality = MODALITIES[number]
        wanted = [Request.of(opened, setup, source, progress=progress) for source in sources]
        with tokens(wanted, tokens_cache(data), options.max_gb) as found:
            splits = [_split(items[number], one) for items, one in zip(listed, found, strict=True)]
            try:
                more, said = attentive(*splits, modality, workspace, epochs=options.epochs, progress=progress)
            except DataError as error:  # of the items that could be read; the other modality may be measured
                more, said = [], [f"{error}."]
        figures += more
        notes += said
    return figures, notes or ([] if figures else ["no item has a label."])


def _split(items: Items, found: Tokens) -> Split:
    """Returns the items that have a label and tokens."""
    samples, rows, _ = items.with_rows(found.keys, found.left_out)
    kept = [(row, sample.label) for row, sample in zip(rows, samples, strict=True) if sample.label is not None]
    return Split(found, [row for row, _ in kept], [label for _, label in kept])


def _dense(opened: AnyModel, data: DataOptions, options: TaskOptions) -> _Measured:
    return dense(opened, data, options.dense or DenseOptions(), options.probe())


def _tokens(opened: AnyModel, data: DataOptions, options: TaskOptions) -> _Measured:
    templates = _templates(options)
    if (options.by or ("zero-shot" if opened.has_texts else "knn")) == "knn":
        sources, names = list(probe_sources(data)), ()
    else:
        opened.check_texts()
        sources = [test_source(data)]
        names = class_list(data)
    listed = _listed(opened.setup(texts=False), sources, "label")
    measurable, notes = _of_several_classes(*listed, names) if len(sources) == 1 else _measurable(*listed)
    points: list[Point] = []
    for number in measurable:
        modality = MODALITIES[number]
        splits = [SweptSplit(source, items[number]) for source, items in zip(sources, listed, strict=True)]
        train = splits[0] if len(splits) > 1 else None
        sweep = Sweep(opened, splits[-1], train, templates[modality], features_cache(data), options.progress, names)
        more, said = sweep.points(options.counts)
        points += more
        notes += [
            *said,
            *([_templates_note(opened, modality, templates[modality], options)] if more and train is None else []),
        ]
    if points and options.png is not None:
        replace_bytes(options.png, drawing(points))
        notes.append(f"The curves are drawn in {options.png}.")
    return [point.figure for point in points], notes or ["no item has a label."]


_TASKS: dict[str, Callable[[Any, DataOptions, TaskOptions], _Measured]] = {
    "zero-shot": _zero_shot,
    "retrieval": _retrieval,
    "knn": partial(_probe, "knn"),
    "linear": partial(_probe, "linear"),
    "attentive": _attentive,
    "dense": _dense,
    "tokens": _tokens,
}
