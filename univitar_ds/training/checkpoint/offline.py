"""Reads the whole model of a checkpoint in one process, for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from univitar_ds.classes import ClassList
from univitar_ds.config.load import load_config
from univitar_ds.config.run_folder import CLASSES, CONFIG, TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.formats import run as run_format
from univitar_ds.formats.run import Weights
from univitar_ds.model.classification import ClassificationModel
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.from_stored import build_classifier_of, build_model
from univitar_ds.tokenization import load_tokenizer


@dataclass(frozen=True)
class Trained:
    """A run's model in evaluation mode (float32, on the host), with the files and settings that it was read from."""

    run: Path
    checkpoint: Path
    config: RunConfig
    tokenizer: Tokenizer | None
    """None for a classifier."""
    model: ContrastiveModel | ClassificationModel
    averaged: bool
    """Whether the model has the averaged weights (`optimizer.ema_decay`)."""
    classes: ClassList | None = None
    """Only for a classifier."""


def open_trained(path: str | Path, weights: Weights | None = None) -> Trained:
    """Reads the model in the last checkpoint of a run's folder, or in one checkpoint.

    Args: path, weights: see `formats.run.read`.
    Raises: CheckpointError if the checkpoint or the average is missing, or the checkpoint is damaged or does not fit
        the run's configuration.
    """
    run, _ = run_format.find_checkpoint(Path(path))
    config = load_config(run / CONFIG)
    if config.objective.classifies:
        classes = ClassList.read(run / CLASSES)
        stored = run_format.read_all(Path(path), weights)
        model = build_classifier_of(stored, config.model, len(classes))
        return Trained(run, stored.path, config, None, model, stored.origin["averaged"], classes)
    tokenizer = load_tokenizer(run / TOKENIZER)
    stored = run_format.read(Path(path), weights)
    # `build_model` selects an attention back end for float32: the run's own may support half precision only.
    return Trained(run, stored.path, config, tokenizer, build_model(stored), stored.origin["averaged"])
