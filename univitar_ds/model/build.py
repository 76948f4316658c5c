"""Builds the model of a run from its settings and, if it has one, from a model to start from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.model import ModelConfig
from univitar_ds.errors import CheckpointError, ConfigError
from univitar_ds.formats.stored_model import HEADS, VISION, JointConfig, StoredModel
from univitar_ds.model.blocks.rank_group import check_sizes
from univitar_ds.model.config import encoder_config
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.towers import build_text_tower, text_model_config, text_tower
from univitar_ds.model.weights import describe_misfit


def build_contrastive(
    config: ModelConfig,
    *,
    vocab_size: int,
    eos_id: int,
    pad_id: int,
    seed: int,
    teacher_width: int | None = None,
    start: StoredModel | None = None,
    description: Mapping[str, Any] | None = None,
) -> ContrastiveModel:
    """Builds the model of a run, on the CPU in float32. Equal arguments give bitwise equal weights.

    The global random state does not change.

    Args:
        vocab_size, eos_id, pad_id: of the tokenizer.
        teacher_width: width of the teacher's features; None: no teacher, so no distillation heads.
        start: the opened model `config.init_from`, whose weights are loaded; None: initial weights.
        description: `ContrastiveModel.description` of the run's model; None: follows from `config` and `start`.
    Raises: ConfigError if the parts do not fit each other; CheckpointError if `start` does not fit, or the folder of
        the text model cannot be used; InstallationError if transformers cannot be imported.
    """
    special = {"vocab_size": vocab_size, "eos_id": eos_id, "pad_id": pad_id}
    described = description or describe(config, start, **special)
    vision = build_vision(config, EncoderConfig.from_dict(described["encoder"]), seed)
    with seeded(seed, "text"):
        if config.text.path is None:
            text = text_tower(described["text"]).requires_grad_(not config.text.frozen)
        else:
            text = build_text_tower(config.text, **special)
    with seeded(seed, "heads"):  # distillation heads come last, so that the other values do not depend on them
        model = ContrastiveModel(vision, text, config, teacher_width)
    if start is not None:
        load_start(model, start, config.init_part)
    return model


def build_vision(config: ModelConfig, shape: EncoderConfig, seed: int) -> UniViTAR:
    """Builds the encoder of a run with initial weights, on the CPU in float32.

    Raises: ConfigError if `pool_heads` does not fit, or the ranks cannot share the encoder."""
    _check_pool_heads(config, shape)
    check_sizes(shape, config.tensor_parallel, config.sequence_parallel)
    with seeded(seed, "vision"):
        every = 0 if config.checkpoint_every == "auto" else config.checkpoint_every  # training sets it in each stage
        return UniViTAR(shape, attention=config.attention, checkpoint_every=every)


def check_model(config: ModelConfig, start: StoredModel | None, part: str, ranks: int | None = None) -> None:
    """Checks that the shapes of a run's model fit each other and `start`, without building the model.

    Args: start: the opened model `config.init_from`; part: what is taken from it, "encoder" or "model"; ranks: number
        of ranks of the run, if known.
    Raises: ConfigError or CheckpointError as `build_contrastive`.
    """
    encoder = described_encoder(config, start)
    _check_pool_heads(config, encoder)
    check_sizes(encoder, config.tensor_parallel, config.sequence_parallel, ranks)
    if start is not None and part == "model":
        _joint_of(config, start)


def _check_pool_heads(config: ModelConfig, shape: EncoderConfig) -> None:
    if shape.hidden_size % config.pool_heads:
        raise ConfigError(
            f"model.pool_heads {config.pool_heads} does not divide the encoder's width {shape.hidden_size}; "
            f"choose a divisor such as {math.gcd(config.pool_heads, shape.hidden_size)}"
        )


def describe(
    config: ModelConfig, start: StoredModel | None, *, vocab_size: int, eos_id: int, pad_id: int
) -> dict[str, Any]:
    """Returns the `ContrastiveModel.description` of a run's model.

    Args: start: the opened model `config.init_from`; the others as in `build_contrastive`.
    Raises: CheckpointError if the encoder of `start` has another shape than `config.encoder`, `start` is an encoder
        alone although the whole model is taken from it, or the folder of the text model cannot be used; ConfigError if
        `embed_dim` or `pool_heads` differs between `config` and `start`; InstallationError as `build_contrastive`.
    """
    special = {"vocab_size": vocab_size, "eos_id": eos_id, "pad_id": pad_id}
    encoder = described_encoder(config, start)
    if start is not None and config.init_part == "model":
        return {"encoder": encoder.to_dict(), "text": _joint_of(config, start).text}
    return {"encoder": encoder.to_dict(), "text": text_model_config(config.text, **special)}


def load_start(model: nn.Module, start: StoredModel, part: str) -> None:
    """Copies the weights of `start` to the encoder of `model`, or to all of `model` if `part` is "model".

    Distillation heads keep their values, and `model` its dtype.
    Raises: CheckpointError that lists missing, unexpected and misshapen tensors.
    """
    stored = start.tensors if part == "model" else start.encoder_only().tensors
    wanted = (
        model.state_dict() if part == "model" else {f"{VISION}{k}": v for k, v in model.vision.state_dict().items()}
    )
    found = {name: info for name, info in stored.infos.items() if not name.startswith(HEADS)}
    complaint = describe_misfit({name: value for name, value in wanted.items() if not name.startswith(HEADS)}, found)
    if complaint:
        raise CheckpointError(f"model.init_from {start.path} does not fit the run's model: {complaint}")
    with torch.no_grad():
        for name in found:
            wanted[name].copy_(stored[name])


def described_encoder(config: ModelConfig, start: StoredModel | None) -> EncoderConfig:
    """Returns the configuration of a run's encoder.

    Raises: CheckpointError if the encoder of `start` has another shape than `config.encoder`."""
    if start is None:
        return encoder_config(config)
    if config.encoder is None:
        return start.encoder
    stored = start.encoder.architecture()
    differences = [
        f"{name} is {stored[name]} instead of {value}"
        for name, value in encoder_config(config).architecture().items()
        if stored[name] != value
    ]
    if differences:
        raise CheckpointError(
            f"model.init_from {start.path} holds another encoder than model.encoder: {'; '.join(differences)}. Set "
            "model.encoder=null to take the shape of init_from."
        )
    return start.encoder


def _joint_of(config: ModelConfig, start: StoredModel) -> JointConfig:
    if start.joint is None:
        raise CheckpointError(
            f"model.init_from {start.path} holds an encoder alone, but model.init_part is model; set "
            "model.init_part to encoder"
        )
    for name in ("embed_dim", "pool_heads"):
        if getattr(config, name) != getattr(start.joint, name):
            raise ConfigError(
                f"model.{name} is {getattr(config, name)}, that of model.init_from {start.path} is "
                f"{getattr(start.joint, name)}; leave model.{name} out, or set model.init_part to encoder"
            )
    return start.joint


@contextmanager
def seeded(seed: int, part: str) -> Iterator[None]:
    """Sets the random state of the CPU for the initial values of one part of a model, and restores it afterwards."""
    # Each part has its own seed: a change in one tower does not change the initial values of the others.
    own = int.from_bytes(hashlib.blake2b(f"{seed}/{part}".encode(), digest_size=7).digest())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(own)
        yield
