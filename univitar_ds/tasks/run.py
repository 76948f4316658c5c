"""Runs a task: opens the model and the data, measures, and returns results in the form of `evaluation.json`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from univitar_ds.errors import DataError
from univitar_ds.evaluation.embed import Embeddings, embed, embed_texts
from univitar_ds.evaluation.measure import left_out
from univitar_ds.evaluation.retrieval import retrieval
from univitar_ds.evaluation.scores import Figure
from univitar_ds.evaluation.zero_shot import Texts, zero_shot
from univitar_ds.geometry import Modality
from univitar_ds.inference.embed_files import ModelOptions
from univitar_ds.tasks.knn import NEIGHBOURS, knn
from univitar_ds.tasks.labelled import labelled
from univitar_ds.tasks.linear import linear
from univitar_ds.tasks.reading import DataOptions, OpenedModel, features_of, open_model, probe_sources, test_source
from univitar_ds.tasks.templates import IMAGENET, read_templates

FORMAT = 1
VIDEO_TEMPLATES = ("a video of a {}.",)
MODALITIES: tuple[Modality, ...] = ("image", "video")
_Measured = tuple[list[Figure], list[str]]


@dataclass(frozen=True)
class TaskOptions:
    """`templates`: see `templates.read_templates`, None for the defaults; `neighbours`: of kNN; `progress`: whether to
    show bars on stderr."""

    templates: str | None = None
    neighbours: Sequence[int] = NEIGHBOURS
    progress: bool = True


def run_task(
    task: str, model: str, data: DataOptions, options: TaskOptions, how: ModelOptions | None = None
) -> dict[str, Any]:
    """Measures a model on a data set.

    Returns: format, task, model, data, figures (`Figure.to_dict`), notes, seconds.
    Raises: CheckpointError, ConfigError, DataError or StorageError, also if nothing could be measured.
    """
    start = time.monotonic()
    opened = open_model(model, how or ModelOptions())
    run = {"zero-shot": _zero_shot, "retrieval": _retrieval}.get(task)
    figures, notes = (run or partial(_probe, task))(opened, data, options)
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


def _zero_shot(opened: OpenedModel, data: DataOptions, options: TaskOptions) -> _Measured:
    given = None if options.templates is None else read_templates(options.templates)
    of_images = read_templates(IMAGENET) if given is None else given
    templates = {"image": of_images, "video": list(VIDEO_TEMPLATES) if given is None else given}

    def measured(found: Embeddings, texts: Texts) -> _Measured:
        return zero_shot(found, templates[found.modality], texts)

    return _with_texts(opened, data, options, measured)


def _retrieval(opened: OpenedModel, data: DataOptions, options: TaskOptions) -> _Measured:
    def measured(found: Embeddings, texts: Texts) -> _Measured:
        ranked = retrieval(found, texts)
        if ranked:
            return ranked, []
        lacking = "all captions are the same" if found.captioned else "no item has a caption"
        return [], [f"Retrieval of {found.modality}s: {lacking}."]

    return _with_texts(opened, data, options, measured)


def _with_texts(
    opened: OpenedModel, data: DataOptions, options: TaskOptions, measured: Callable[[Embeddings, Texts], _Measured]
) -> _Measured:
    """Measures each modality that the data has by the embeddings of both towers."""
    model = opened.whole
    source = test_source(data)

    def texts(sentences: Sequence[str]) -> Tensor:
        return embed_texts(model, opened.tokenizer, sentences, opened.model.joint.context_length)

    figures: list[Figure] = []
    notes: list[str] = []
    for modality in MODALITIES:
        packs = opened.packs(source, modality, texts=True)
        found = embed(model, packs, modality, progress=options.progress)
        if len(found):
            more, said = measured(found, texts)
            figures += more
            notes += said
        if found.bad:
            notes.append(f"Some {modality}s were {left_out(found)}.")
    return figures, notes


def _probe(task: str, opened: OpenedModel, data: DataOptions, options: TaskOptions) -> _Measured:
    """Measures each modality that has labels in both splits by features of the encoder."""
    figures: list[Figure] = []
    notes: list[str] = []
    sources = probe_sources(data)
    for modality in MODALITIES:
        train, test = (features_of(opened, source, modality, progress=options.progress) for source in sources)
        if not train.labels and not test.labels:
            continue
        both = labelled(train, test, modality)
        if both.unknown:
            notes.append(f"{both.unknown} {modality}s have a label that the training split lacks, and are left out.")
        if task == "knn":
            figures += knn(both, modality, options.neighbours)
        else:
            more, said = linear(both, modality, progress=options.progress)
            figures += more
            notes += said
    return figures, notes or ([] if figures else ["no item has a label."])
