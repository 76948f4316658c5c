"""Builds modules from stored models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from univitar_ds.config.model import ModelConfig
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.stored_model import HEADS, VISION, JointConfig, StoredModel, TensorInfo, Tensors
from univitar_ds.model.classification import ClassificationModel
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.towers import text_shapes, text_tower
from univitar_ds.model.weights import describe_misfit

Module = TypeVar("Module", bound=nn.Module)


def build_encoder(stored: StoredModel, *, attention: str = "auto", checkpoint_every: int = 0) -> UniViTAR:
    """Builds the encoder with the stored weights, in the stored precision and in evaluation mode.

    Raises: CheckpointError that lists missing, unexpected and misshapen tensors; or if a file is damaged.
    """
    with torch.device("meta"):
        encoder = UniViTAR(stored.encoder, attention=attention, checkpoint_every=checkpoint_every)
    tensors = stored.encoder_only().tensors.renamed(lambda name: name.removeprefix(VISION))
    return _filled(encoder, stored.path, tensors)


def build_model(stored: StoredModel, *, attention: str = "auto") -> ContrastiveModel:
    """Builds the whole model with the stored weights, in the stored precision and in evaluation mode.

    Distillation heads are left out. The global random state does not change.
    Raises: CheckpointError if the stored model is an encoder alone, or as `build_encoder`; InstallationError if
        transformers cannot be imported.
    """
    if stored.joint is None:
        raise CheckpointError(f"{stored.path} holds an encoder alone, without pooling, projections and text tower")
    with torch.random.fork_rng(devices=[]):
        text = text_tower(stored.joint.text)  # not on "meta": transformers has buffers that no checkpoint stores
    return _filled(_joined(stored, stored.joint, text, attention), stored.path, _without_heads(stored.tensors))


def build_classifier_of(
    stored: StoredModel, config: ModelConfig, classes: int, *, attention: str = "auto"
) -> ClassificationModel:
    """Builds the classifier of a run with the stored weights, in the stored precision and in evaluation mode.

    Args: stored: the result of `formats.run.read_all`; config: the run's settings; classes: number of classes.
    Raises: CheckpointError as `build_encoder`.
    """
    settings = config.model_copy(update={"attention": attention})
    with torch.device("meta"):
        model = ClassificationModel(UniViTAR(stored.encoder, attention=attention), settings, classes)
    return _filled(model, stored.path, _without_heads(stored.tensors))


def check_complete(stored: StoredModel) -> None:
    """Checks that a stored model has the tensors of its configuration, without reading a tensor.

    Raises: CheckpointError that lists missing, unexpected and misshapen tensors.
    """
    complaint = describe_misfit(_wanted(stored), _without_heads(stored.tensors).infos)
    if complaint:
        raise _misfit(stored.path, complaint)


def _wanted(stored: StoredModel) -> Mapping[str, Tensor | TensorInfo]:
    """Returns the tensors of a model with the stored configuration, without values."""
    with torch.device("meta"):
        if stored.joint is None:
            return nn.ModuleDict({"vision": UniViTAR(stored.encoder)}).state_dict()
        shapes = text_shapes(stored.joint.text)
        if shapes is None:
            return _joined(stored, stored.joint, text_tower(stored.joint.text), "auto").state_dict()
        text = nn.Module()
        text.width = stored.joint.text.get("projection_size") or stored.joint.text["hidden_size"]
        rest = _joined(stored, stored.joint, text, "auto").state_dict()
        return rest | {f"text.{name}": info for name, info in shapes.items()}


def _joined(stored: StoredModel, joint: JointConfig, text: nn.Module, attention: str) -> ContrastiveModel:
    """Returns the whole model around a text tower, without values."""
    config = ModelConfig(embed_dim=joint.embed_dim, pool_heads=joint.pool_heads, attention=attention)
    with torch.device("meta"):
        return ContrastiveModel(UniViTAR(stored.encoder, attention=attention), text, config)


def _without_heads(tensors: Tensors) -> Tensors:
    return tensors.renamed(lambda name: None if name.startswith(HEADS) else name)


def _filled(module: Module, path: Path, tensors: Tensors) -> Module:
    _check(path, module, tensors)
    module.load_state_dict(dict(tensors), assign=True)
    return module.eval()


def _check(path: Path, module: nn.Module, tensors: Tensors) -> None:
    complaint = describe_misfit(module.state_dict(), tensors.infos)
    if complaint:
        raise _misfit(path, complaint)


def _misfit(path: Path, complaint: str) -> CheckpointError:
    return CheckpointError(
        f"the tensors of {path} do not fit its configuration: {complaint}; use the files of one model"
    )
