"""Evaluates a run on held-out data: writes `evaluation.json` and returns the scores as a table."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from univitar_ds import startup
from univitar_ds.config.data import SourceConfig
from univitar_ds.config.load import load_config
from univitar_ds.config.run_folder import CONFIG, EVALUATION, EXAMPLES
from univitar_ds.data.contents import contents_of
from univitar_ds.data.shards.sources import SourceShard, find_shards
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.data.writing.packed_sources import with_packed_sources
from univitar_ds.errors import ConfigError, DataError
from univitar_ds.evaluation.classification import measure_classes
from univitar_ds.evaluation.configured import figures_of, last_stage, no_class_measured, packs_of
from univitar_ds.evaluation.embed import Embeddings, embed
from univitar_ds.evaluation.measure import nothing_measured
from univitar_ds.evaluation.overrides import is_result, overridden, same_evaluation
from univitar_ds.evaluation.report import render_evaluation
from univitar_ds.evaluation.scores import Figure
from univitar_ds.evaluation.sheets.item_sheet import Kept, draw_sheet, keep_some
from univitar_ds.evaluation.sheets.text_sheet import draw_text_sheet, keep_thumbnails
from univitar_ds.formats.run import Weights, find_checkpoint
from univitar_ds.geometry import MODALITIES, Modality
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.placement import feature_dtype, placed
from univitar_ds.owned import check_result, write_result
from univitar_ds.run_lock import still_ours
from univitar_ds.training.checkpoint.offline import Trained, open_trained
from univitar_ds.training.distributed.process_group import uses_cuda

FORMAT = 1

logger = logging.getLogger(__name__)


def evaluate_run(
    run: str | Path,
    *,
    weights: Weights | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    progress: bool = True,
) -> str:
    """Evaluates the last checkpoint of a run, or the checkpoint at `run`. Returns the table of results.

    Writes `evaluation.json` and sheets of examples into the run's folder, unless `overrides` change the run's
    evaluation or `out` is given. The run's configuration does not change. Runs on the GPU in bfloat16 if training
    would use it, or on the CPU if the GPU has too little memory.

    Args: weights: see `open_trained`; overrides: see `overridden`; out: file for the results instead of
        `evaluation.json`; progress: whether to show a progress bar.
    Raises: CheckpointError, ConfigError or DataError, before anything is written, if the checkpoint, a setting or a
        source is missing or invalid, or nothing could be measured; LockLost if another launch has taken over the run;
        StorageError if a file cannot be written.
    """
    folder, _ = find_checkpoint(Path(run))
    before = load_config(folder / CONFIG)
    config = overridden(folder / CONFIG, before, overrides)
    if out is not None:
        check_result(out, is_result)
    startup.phase("reading the model and the sources")
    trained = replace(open_trained(run, weights), config=with_packed_sources(config, training=False))
    own = out is None and same_evaluation(before, config)
    result, sheets, model = _on_gpu_or_host(trained, progress, with_sheets=own)
    result["sources"] = [{"path": source.path, "split": source.split} for source in config.evaluation.sources]
    table = render_evaluation(result)
    if not own and out is None:
        kept = trained.run / EVALUATION
        return f"{table}\n\nOverrides change this evaluation, so {kept} is not written; --out FILE saves the results."
    if own:
        still_ours(trained.run)
    write_result(out or trained.run / EVALUATION, json.dumps(result, indent=1) + "\n")
    if own:
        _draw(replace(trained, model=model), sheets)
    return table


@dataclass(frozen=True)
class _Sheet:
    """Data of the two sheets of one modality."""

    kept: list[Kept]
    thumbnails: list[bytes]
    embeddings: Embeddings
    data: str
    """Names of the sources."""


def _draw(trained: Trained, sheets: Sequence[_Sheet]) -> None:
    weights = "averaged" if trained.averaged else "trained"
    title = f"Run {trained.run.resolve().name}, checkpoint {trained.checkpoint.name} ({weights} weights)"
    for name in EXAMPLES.values():
        with suppress(OSError):  # those of an earlier evaluation, maybe of other data
            (trained.run / name).unlink(missing_ok=True)
    for sheet in sheets:
        modality = sheet.embeddings.modality
        items, captions = (trained.run / EXAMPLES[modality, of_texts] for of_texts in (False, True))
        queries = [item.row for item in sheet.kept]
        with _warning(items):
            draw_sheet(trained.model, sheet.kept, sheet.embeddings, items, title=title, data=sheet.data)
        with _warning(captions):
            draw_text_sheet(sheet.embeddings, queries, sheet.thumbnails, captions, title=title, data=sheet.data)


@contextmanager
def _warning(path: Path) -> Iterator[None]:
    """Logs an error of the body: the evaluation must not fail because a sheet cannot be drawn."""
    try:
        yield
    except Exception as error:
        logger.warning("%s could not be drawn: %s: %s", path, type(error).__name__, error)


def _on_gpu_or_host(
    trained: Trained, progress: bool, *, with_sheets: bool
) -> tuple[dict[str, Any], list[_Sheet], ContrastiveModel]:
    """Returns the results, the data of sheets, and the model that computed them."""
    if uses_cuda():
        gc.collect()  # after training in this process, reference cycles may hold memory of the GPU
        try:
            return _evaluated_on(torch.device("cuda"), trained, progress, with_sheets)
        except torch.OutOfMemoryError as error:
            logger.warning("the GPU has too little memory; the evaluation runs on the CPU instead: %s", error)
        # Outside of the except clause, because the error's frames hold tensors.
        torch.cuda.empty_cache()
    return *_evaluate(trained, progress, with_sheets), trained.model


def _evaluated_on(
    device: torch.device, trained: Trained, progress: bool, with_sheets: bool
) -> tuple[dict[str, Any], list[_Sheet], ContrastiveModel]:
    model = placed(trained.model, device, feature_dtype(device))
    return *_evaluate(replace(trained, model=model), progress, with_sheets), model


def evaluate(trained: Trained, *, progress: bool = False) -> dict[str, Any]:
    """Computes all scores of the section `evaluation` of the run's configuration, on the model's device.

    Returns: the content of `evaluation.json` without the sources.
    Raises: ConfigError if evaluation.sources is empty; DataError if sources cannot be read or nothing is measured.
    """
    return _evaluate(trained, progress, with_sheets=False)[0]


def _evaluate(trained: Trained, progress: bool, with_sheets: bool) -> tuple[dict[str, Any], list[_Sheet]]:
    """Returns the results, and the data of sheets if they are wanted."""
    config = trained.config.evaluation
    if not config.sources:
        raise ConfigError(
            "evaluation.sources is empty, there is nothing to evaluate on; name a source with its split, such as "
            "univitar-ds eval RUN evaluation.sources.0='{path: data/photos, split: test}'"
        )
    start = time.monotonic()
    shards = find_shards(config.sources, StorageSettings.of(trained.config.data))
    figures: list[Figure] = []
    notes: list[str] = []
    sheets: list[_Sheet] = []
    evaluated: list[Embeddings] = []
    for modality in MODALITIES:
        stage = last_stage(trained.config, modality)
        if stage is None:
            continue
        if trained.classes is not None:
            with closing(packs_of(trained.config, trained.run, stage, modality)) as packs:
                measured, detail = measure_classes(trained.model, trained.classes, packs, modality, progress=progress)
            figures += measured
            notes += detail
            continue
        kept: list[Kept] = []
        thumbnails: list[bytes] = []
        with closing(packs_of(trained.config, trained.run, stage, modality)) as packs:
            read = keep_thumbnails(keep_some(packs, kept), thumbnails) if with_sheets else packs
            embeddings = embed(trained.model, read, modality, progress=progress)
        evaluated.append(embeddings)
        measured, detail = figures_of(trained.config, trained.model, trained.tokenizer, embeddings, shards)
        figures += measured
        notes += detail
        if kept:
            sheets.append(_Sheet(kept, thumbnails, embeddings, _names(config.sources, shards)))
    if not figures and trained.classes is not None:
        raise DataError(no_class_measured(notes))
    if not figures:
        raise DataError(nothing_measured(evaluated, _unmet(shards, evaluated)))
    result = {
        "format": FORMAT,
        "checkpoint": trained.checkpoint.name,
        "weights": "averaged" if trained.averaged else "trained",
        "figures": [figure.to_dict() for figure in figures],
        "notes": notes,
        "seconds": round(time.monotonic() - start, 1),
    }
    return result, sheets


def _names(sources: Sequence[SourceConfig], shards: Sequence[SourceShard]) -> str:
    """Returns the names of the sources. Packed folders, which have a manifest with hashes, and divided sources have
    splits."""
    packed = {shard.source for shard in shards if shard.sha256 or shard.hold_out is not None}
    return ", ".join(
        f"{source.label} (split {source.split})" if source.split and source.label in packed else source.label
        for source in sources
    )


def _unmet(shards: Sequence[SourceShard], evaluated: Sequence[Embeddings]) -> list[tuple[Modality, int]]:
    """Counts the samples of the modalities that are not evaluated, in a bounded scan of the sources."""
    others = [modality for modality in MODALITIES if modality not in {embeddings.modality for embeddings in evaluated}]
    counts = contents_of(shards, MODALITIES).counts if others else {}
    return [(modality, counts[modality]) for modality in others if counts[modality]]
