"""Everything that is measured on a run's held-out data, kept in `evaluation.json` and told as a table."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from univitar_ds.config.run_folder import EVALUATION, TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.section import Modality
from univitar_ds.config.stage import StageConfig
from univitar_ds.convert.trained import Trained, Weights, open_trained
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.loader import eval_packs
from univitar_ds.data.sources import stage_modalities
from univitar_ds.errors import ConfigError
from univitar_ds.evaluation.embed import Embeddings, embed, embed_texts
from univitar_ds.evaluation.pictures import Kept, draw_sheet, keep_some
from univitar_ds.evaluation.report import render_evaluation
from univitar_ds.evaluation.retrieval import retrieval
from univitar_ds.evaluation.scores import Figure
from univitar_ds.evaluation.zero_shot import zero_shot
from univitar_ds.training.distributed import uses_cuda

FORMAT = 1
MODALITIES: tuple[Modality, ...] = ("image", "video")

logger = logging.getLogger(__name__)


def evaluate_run(run: str | Path, *, weights: Weights | None = None, progress: bool = True) -> str:
    """Evaluates a run's last checkpoint (or the checkpoint `run` is); writes `evaluation.json` and sheets of examples.

    On the GPU where there is one for the run, on the host where that lacks the memory.
    Args: weights: see `open_trained`.
    Returns: the table of results. Raises: CheckpointError, ConfigError or DataError if something is missing.
    """
    trained = open_trained(run, weights)
    result, sheets = _on_gpu_or_host(trained, progress)
    (trained.run / EVALUATION).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for sheet in sheets:
        path = trained.run / f"examples-{sheet.found.modality}.png"
        try:
            draw_sheet(trained.model, sheet.kept, sheet.found, path)
        except Exception as error:  # whatever it is, the figures count
            logger.warning("%s could not be drawn: %s: %s", path, type(error).__name__, error)
    return render_evaluation(result)


@dataclass(frozen=True)
class _Sheet:
    """What a sheet of examples of one modality is drawn from."""

    kept: list[Kept]
    found: Embeddings


def _on_gpu_or_host(trained: Trained, progress: bool) -> tuple[dict[str, Any], list[_Sheet]]:
    if uses_cuda():
        gc.collect()  # after training in this process: what lies in reference cycles holds memory of the GPU
        try:
            trained.model.to("cuda")
            return _evaluate(trained, progress)
        except torch.OutOfMemoryError as error:
            logger.warning("the GPU has no room for the evaluation, it runs on the host: %s", error)
        # Only here, where the error's frames and their tensors are gone.
        trained.model.to("cpu")
        torch.cuda.empty_cache()
    return _evaluate(trained, progress)


def evaluate(trained: Trained, *, progress: bool = False) -> dict[str, Any]:
    """All figures of `config.evaluation`, as JSON. Runs where the model lies.

    Raises: ConfigError if the configuration names no data to evaluate on.
    """
    return _evaluate(trained, progress)[0]


def _evaluate(trained: Trained, progress: bool) -> tuple[dict[str, Any], list[_Sheet]]:
    config = trained.config.evaluation
    if not config.sources:
        raise ConfigError("evaluation.sources is empty, there is nothing to evaluate on; name a source with its split")
    start = time.monotonic()
    figures: list[Figure] = []
    notes: list[str] = []
    sheets: list[_Sheet] = []
    for modality in MODALITIES:
        stage = _last_stage(trained.config, modality)
        if stage is None:
            continue
        kept: list[Kept] = []
        found = embed(trained.model, keep_some(_packs(trained, stage, modality), kept), modality, progress=progress)
        measured, told = _measure(trained, found)
        figures += measured
        notes += told
        if kept:
            sheets.append(_Sheet(kept, found))
    result = {
        "format": FORMAT,
        "checkpoint": trained.checkpoint.name,
        "weights": "averaged" if trained.averaged else "trained",
        "figures": [figure.to_dict() for figure in figures],
        "notes": notes,
        "seconds": round(time.monotonic() - start, 1),
    }
    return result, sheets


def _last_stage(config: RunConfig, modality: Modality) -> StageConfig | None:
    """The stage whose size rule the model knows best for this modality; None if it never met it."""
    return next((stage for stage in reversed(config.stages) if modality in stage_modalities(stage)), None)


def _packs(trained: Trained, stage: StageConfig, modality: Modality) -> Iterator[PackedBatch]:
    config = trained.config
    return eval_packs(
        config.evaluation.sources,
        modality=modality,
        resolution=stage.resolution(modality),
        clip_frames=stage.clip_frames,
        token_budget=config.evaluation.token_budget,
        tokenizer=trained.run / TOKENIZER,
        context_length=config.model.text.context_length,
        data=config.data,
    )


def _measure(trained: Trained, found: Embeddings) -> tuple[list[Figure], list[str]]:
    """Figures of one modality, and a sentence for each thing that could not be measured."""
    kind = found.modality
    if not len(found):
        return [], [f"No {kind} that can be read in the evaluation data (univitar-ds data verify SOURCE)."]
    config = trained.config
    templates = config.evaluation.image_templates if kind == "image" else config.evaluation.video_templates
    texts = partial(_embed_texts, trained)
    figures, notes = zero_shot(found, templates, texts)
    return [*figures, *retrieval(found, texts)], notes


def _embed_texts(trained: Trained, texts: Sequence[str]) -> Tensor:
    return embed_texts(trained.model, trained.tokenizer, texts, trained.config.model.text.context_length)
