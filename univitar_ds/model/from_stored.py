"""Builds modules from stored models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from univitar_ds.config.model import ModelConfig
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.stored_model import HEADS, VISION, StoredModel, TensorInfo
from univitar_ds.model.classification import ClassificationModel
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.towers import text_tower
from univitar_ds.model.weights import describe_misfit


def build_encoder(stored: StoredModel, *, attention: str = "auto", checkpoint_every: int = 0) -> UniViTAR:
    """Builds the encoder with the stored weights, in the stored precision and in evaluation mode.

    Raises: CheckpointError that lists missing, unexpected and misshapen tensors; or if a file is damaged.
    """
    stored = stored.encoder_only()
    with torch.device("meta"):
        encoder = UniViTAR(stored.encoder, attention=attention, checkpoint_every=checkpoint_every)
    tensors = stored.tensors.renamed(lambda name: name.removeprefix(VISION))
    _check(stored.path, encoder, tensors.infos)
    encoder.load_state_dict(dict(tensors), assign=True)
    return encoder.eval()


def build_model(stored: StoredModel, *, attention: str = "auto") -> ContrastiveModel:
    """Builds the whole model with the stored weights, in the stored precision and in evaluation mode.

    Distillation heads are left out. The global random state does not change.
    Raises: CheckpointError if the stored model is an encoder alone, or as `build_encoder`; InstallationError if
        transformers cannot be imported.
    """
    if stored.joint is None:
        raise CheckpointError(f"{stored.path} holds an encoder alone, without pooling, projections and text tower")
    joint = stored.joint
    with torch.random.fork_rng(devices=[]):
        text = text_tower(joint.text)  # not on "meta": transformers has buffers that no checkpoint stores
    config = ModelConfig(embed_dim=joint.embed_dim, pool_heads=joint.pool_heads, attention=attention)
    with torch.device("meta"):
        model = ContrastiveModel(UniViTAR(stored.encoder, attention=attention), text, config)
    tensors = stored.tensors.renamed(lambda name: None if name.startswith(HEADS) else name)
    _check(stored.path, model, tensors.infos)
    model.load_state_dict(dict(tensors), assign=True)
    return model.eval()


def build_classifier_of(stored: StoredModel, config: ModelConfig, classes: int) -> ClassificationModel:
    """Builds the classifier of a run with the stored weights, in the stored precision and in evaluation mode.

    Args: stored: of `formats.run.read_all`; config: of the run; classes: number of classes.
    Raises: CheckpointError as `build_encoder`.
    """
    settings = config.model_copy(update={"attention": "auto"})
    with torch.device("meta"):
        model = ClassificationModel(UniViTAR(stored.encoder), settings, classes)
    tensors = stored.tensors.renamed(lambda name: None if name.startswith(HEADS) else name)
    _check(stored.path, model, tensors.infos)
    model.load_state_dict(dict(tensors), assign=True)
    return model.eval()


def check_complete(stored: StoredModel) -> None:
    """Raises: CheckpointError that lists missing, unexpected and misshapen tensors, before any tensor is read."""
    with torch.device("meta"):
        vision = UniViTAR(stored.encoder)
        if stored.joint is None:
            module: nn.Module = nn.ModuleDict({"vision": vision})
        else:
            config = ModelConfig(embed_dim=stored.joint.embed_dim, pool_heads=stored.joint.pool_heads)
            module = ContrastiveModel(vision, text_tower(stored.joint.text), config)
    infos = {name: info for name, info in stored.tensors.infos.items() if not name.startswith(HEADS)}
    _check(stored.path, module, infos)


def _check(path: Path, module: nn.Module, infos: Mapping[str, TensorInfo]) -> None:
    complaint = describe_misfit(module.state_dict(), infos)
    if complaint:
        raise CheckpointError(
            f"the tensors of {path} do not fit its configuration: {complaint}; use the files of one model"
        )
