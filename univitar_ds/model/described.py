"""Builds the model of a run from its description alone, to count it: no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from univitar_ds.config.schema import RunConfig
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.classification import ClassificationModel, build_classifier
from univitar_ds.model.contrastive import ContrastiveModel


def build_described(
    config: RunConfig, description: Mapping[str, Any], *, teacher_width: int | None, classes: int | None
) -> ContrastiveModel | ClassificationModel:
    """Builds the model of a run with the shapes of a description, also where `model.text.path` has weights.

    Args: description: `ContrastiveModel.description` of the model; teacher_width: width of the features that the run
        distills, None without a teacher; classes: number of classes, None if the model is not a classifier.
    Raises: ConfigError or CheckpointError as `build_contrastive`.
    """
    text = config.model.text.model_copy(update={"path": None})  # the description has the shape
    model = config.model.model_copy(update={"text": text})
    given = {"seed": config.seed, "teacher_width": teacher_width, "description": description}
    if classes is not None:
        return build_classifier(model, classes=classes, **given)
    return build_contrastive(model, vocab_size=1, eos_id=0, pad_id=0, **given)
