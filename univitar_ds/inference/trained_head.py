"""The trained head of a classification run, with the names of its classes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from univitar_ds.classes import ClassList
from univitar_ds.config.run_folder import CLASSES
from univitar_ds.config.schema import RunConfig
from univitar_ds.formats import run as run_format
from univitar_ds.formats.run import Weights
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.model.classification import ClassificationModel
from univitar_ds.model.from_stored import build_classifier_of


class TrainedHead(NamedTuple):
    """The model of a classification run with its head, in evaluation mode, and its classes."""

    module: ClassificationModel
    classes: ClassList


def classifies(stored: StoredModel) -> bool:
    """Returns whether a stored model is from a run of `objective.kind: classification`."""
    return stored.format == "run" and stored.origin["recipe"].objective.classifies


def trained_head(
    stored: StoredModel, weights: Weights | None = None, dtype: torch.dtype | None = None, attention: str = "auto"
) -> TrainedHead:
    """Returns the classifier of a stored model for which `classifies` is true.

    Does not verify the checksums of its files again, since opening the stored model has verified them.
    Args: weights, dtype, attention: as `UniViTARModel.from_pretrained`.
    Raises: CheckpointError if the run lacks its classes, or as `build_classifier_of`.
    """
    recipe: RunConfig = stored.origin["recipe"]
    run, checkpoint = run_format.find_checkpoint(Path(stored.path))
    classes = ClassList.read(run / CLASSES)
    whole = run_format.read_all(checkpoint, weights, verify=False)
    whole = whole if dtype is None else whole.converted(dtype)
    return TrainedHead(build_classifier_of(whole, recipe.model, len(classes), attention=attention), classes)
