"""Runs of this trainer: the model in an elastic checkpoint of any number of ranks and any ZeRO stage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from univitar_ds.config.encoder import EncoderConfig, read_encoder_config, read_object
from univitar_ds.config.load import config_fingerprint, load_config
from univitar_ds.config.run_folder import CHECKPOINTS, CONFIG, DESCRIPTION, SUMMARY, TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.errors import CheckpointError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.checkpoint.store import store_of
from univitar_ds.formats.elastic import FROZEN, ElasticReader
from univitar_ds.formats.stored_model import MOMENTS, JointConfig, OptimizerState, StoredModel, TensorInfo, Tensors
from univitar_ds.geometry import PATCH, Modality
from univitar_ds.model.config import encoder_config
from univitar_ds.model.towers import text_model_config
from univitar_ds.regular_files import is_regular, read_utf8
from univitar_ds.tokenization import load_tokenizer, special_ids

Weights = Literal["trained", "averaged"]


def recognises(folder: Path) -> bool:
    """Returns whether the folder is that of a run, or a checkpoint in one, or `checkpoints/best` in one."""
    if _is_best(folder):
        return True
    own = (folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir()
    return own or ((folder / checkpoint_dir.MANIFEST).is_file() and (_run_of(folder) / CONFIG).is_file())


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """Returns the folders of the run and of the checkpoint.

    Args: path: folder of a run or of a checkpoint, or the file `checkpoints/best` of a run.
    Raises: CheckpointError if `path` is none of them, or the run has no complete checkpoint."""
    if _is_best(path):
        return _run_of(path), _best_checkpoint(path)
    if (path / CONFIG).is_file():
        checkpoint = last_checkpoint(path)
        if checkpoint is None:
            raise CheckpointError(f"{path} has no complete checkpoint; train it first, or name another run")
        return path, checkpoint
    run = _run_of(path)
    if (path / checkpoint_dir.MANIFEST).is_file() and (run / CONFIG).is_file():
        return run, path
    raise CheckpointError(
        f"{path} is neither a run's folder (with {CONFIG}) nor a checkpoint in one ({CHECKPOINTS}/step-*); name one"
    )


def _is_best(path: Path) -> bool:
    own = path.name == checkpoint_dir.BEST and path.absolute().parent.name == CHECKPOINTS
    return own and is_regular(path) and (_run_of(path) / CONFIG).is_file()


def _best_checkpoint(pointer: Path) -> Path:
    """Returns the folder of the checkpoint that `checkpoints/best` names, copied from S3 if it is there."""
    name = checkpoint_dir.named_in(pointer)
    store = store_of(load_config(_run_of(pointer) / CONFIG))
    if name is not None and store is not None:
        return store.copied(name)
    if name is None or not (pointer.parent / name / checkpoint_dir.MANIFEST).is_file():
        found = "no checkpoint" if name is None else f"{name}, which is not there"
        raise CheckpointError(f"{pointer} names {found}; name another checkpoint of {pointer.parent}")
    return pointer.parent / name


def last_checkpoint(run: Path) -> Path | None:
    """Returns the folder of a run's last checkpoint, copied from S3 if it is there; None without one."""
    store = store_of(load_config(run / CONFIG))
    if store is None:
        return checkpoint_dir.latest(run / CHECKPOINTS)
    name = store.latest()
    return None if name is None else store.copied(name)


def finished_at(run: Path) -> int | None:
    """Returns the last step of a run whose stages are all done, by its summary; None if it is to be trained further.

    The summary counts if it is of the run's configuration and of its last checkpoint. No checkpoint is read.
    Raises: CheckpointError if the store of checkpoints cannot be read."""
    config = load_config(run / CONFIG)
    try:
        summary = json.loads(read_utf8(run / SUMMARY))
        fingerprint, step = summary["fingerprint"], summary["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if summary.get("completed") is not True or fingerprint != config_fingerprint(config):
        return None
    store = store_of(config)
    last = checkpoint_dir.latest(run / CHECKPOINTS) if store is None else store.latest()
    return step if last is not None and checkpoint_dir.step_of(Path(last).name) == step else None


def read(path: Path, weights: Weights | None = None, *, verify: bool = True) -> StoredModel:
    """Opens the model in the last checkpoint of a run, or in a given one; of a classifier only the encoder.

    Tensors are float32. `origin` has run, checkpoint, averaged, progress, and recipe (the run's configuration).

    Args: path: folder of a run or of a checkpoint. weights: the trained or the averaged weights; None: averaged if the
        run has them. verify: whether to compare the files with their checksums first, which reads them.
    Raises: CheckpointError if the checkpoint or the average is missing, or the checkpoint is damaged.
    """
    stored = read_all(path, weights, verify=verify)
    return stored if stored.joint is not None else stored.encoder_only()


def read_all(path: Path, weights: Weights | None = None, *, verify: bool = True) -> StoredModel:
    """Opens a model as `read`, but with all tensors of a classifier, whose `joint` is None."""
    run, checkpoint = find_checkpoint(path)
    config = load_config(run / CONFIG)
    averaged = _averaged(run, config, weights)
    if verify:
        checkpoint_dir.verify(checkpoint, checkpoint_dir.read_manifest(checkpoint))
    files = ExitStack()
    reader = ElasticReader(checkpoint, files)
    with checkpoint_dir.understanding(checkpoint):
        kinds = {name: reader.weights_kind(name, averaged=averaged) for name in reader.shapes}
        buffers = {name: b.float() if b.is_floating_point() else b for name, b in reader.buffers().items()}
        state = reader.content["run"]
        encoder, joint = _configuration(run, config, run_description(run, config, state.get("model")))
        tensors = _parameters(reader, kinds, buffers)
        adamw = config.optimizer.kind == "adamw"  # formats store the state of AdamW only
        optimizer = _optimizer(reader) if adamw and not averaged else None
    return StoredModel(
        checkpoint,
        "run",
        with_size_rule(encoder, config.stages[-1]),
        tensors,
        joint,
        optimizer,
        {
            "run": run.name,
            "checkpoint": checkpoint.name,
            "averaged": averaged,
            "progress": state.get("progress", {}),
            "recipe": config,
        },
    )


def run_configuration(run: Path) -> tuple[EncoderConfig, JointConfig | None]:
    """Returns the configuration of the model of a run, without a stage's size rule. The second part is None for a
    classifier.

    Raises: ConfigError or CheckpointError if a file is missing or damaged.
    """
    config = load_config(run / CONFIG)
    return _configuration(run, config, run_description(run, config))


def run_description(run: Path, config: RunConfig, saved: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """Returns the `description` of a run's model: the one in a checkpoint, that of the run's folder, or, for runs of
    earlier versions, the one that follows from the configuration.

    Args: config: of the run; saved: the one in a checkpoint, if it has one.
    Raises: ConfigError or CheckpointError if a file is missing or damaged.
    """
    if saved is not None:
        return saved
    if is_regular(run / DESCRIPTION):
        return read_object(run / DESCRIPTION)
    start = config.model.init_from
    encoder = (encoder_config(config.model) if start is None else read_encoder_config(start)).to_dict()
    if config.objective.classifies:
        return {"encoder": encoder}
    special = special_ids(load_tokenizer(_tokenizer(run)))
    return {"encoder": encoder, "text": text_model_config(config.model.text, **special.of_text_model)}


def _configuration(
    run: Path, config: RunConfig, described: Mapping[str, Any]
) -> tuple[EncoderConfig, JointConfig | None]:
    encoder = EncoderConfig.from_dict(described["encoder"])
    if config.objective.classifies:
        return encoder, None
    return encoder, JointConfig(
        config.model.embed_dim,
        config.model.pool_heads,
        "softmax" if config.objective.kind == "softmax" else "sigmoid",  # the losses of plugins are sums over pairs too
        described["text"],
        config.model.text.context_length,
        read_utf8(_tokenizer(run)),
    )


def _tokenizer(run: Path) -> Path:
    if not is_regular(run / TOKENIZER):
        raise CheckpointError(f"{run} has {CONFIG} but no {TOKENIZER}; copy the run's {TOKENIZER} beside it")
    return run / TOKENIZER


def with_size_rule(config: EncoderConfig, stage: StageConfig, modality: Modality | None = None) -> EncoderConfig:
    """Returns `config` with the size rule of a stage for a modality; None: for images, or videos if it has no images.

    The release has one rule for images and videos. Raises: CheckpointError if the release's config.json cannot express
    the stage's rule.
    """
    modality = modality or ("video" if stage.video_ratio == 1 else "image")
    rule = stage.video if modality == "video" else stage.image
    if rule.size_px is not None:
        return dataclasses.replace(config, resolution_mode=str(rule.size_px), relarge_ratio=1.0)
    block = PATCH * config.spatial_merge_size
    if rule.divisor_px % block:
        raise CheckpointError(
            f"stage {stage.name} has divisor_px {rule.divisor_px}, config.json can only hold multiples of {block} px; "
            "end the run with a stage that has one"
        )
    return dataclasses.replace(
        config,
        resolution_mode="native",
        relarge_ratio=1.0,
        resize_factor=rule.divisor_px // block,
        min_tokens=rule.min_tokens,
        max_tokens=rule.max_tokens,
    )


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.resolve().parent.parent


def _averaged(run: Path, config: RunConfig, weights: Weights | None) -> bool:
    has_average = config.optimizer.ema_decay is not None
    if weights == "averaged" and not has_average:
        raise CheckpointError(f"{run} has no averaged weights, optimizer.ema_decay is null; use the trained ones")
    return has_average if weights is None else weights == "averaged"


def _parameters(reader: ElasticReader, kinds: Mapping[str, str], buffers: Mapping[str, Tensor]) -> Tensors:
    """Returns parameters of the given kinds, and buffers. Unmaps files after each read, to limit memory."""

    def read_one(name: str) -> Tensor:
        if name in buffers:
            return buffers[name]
        try:
            with checkpoint_dir.understanding(reader.folder):
                return reader.read(name, kinds[name])
        finally:
            reader.trim()

    infos = {name: TensorInfo(reader.shapes[name], torch.float32) for name in kinds}
    infos |= {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in buffers.items()}
    return Tensors(infos, read_one)


def _optimizer(reader: ElasticReader) -> OptimizerState | None:
    """Returns AdamW's state; None if nothing was trained.

    Each saved group belongs to the trained parameters with its weight decay: matrices, or vectors without decay.
    """
    trained = [name for name, kinds in reader.kinds.items() if FROZEN not in kinds and MOMENTS[0] in kinds]
    saved = reader.content["optimizer"]
    if not trained or not saved["groups"]:
        return None
    groups = []
    for decays, names in (
        (True, [name for name in trained if len(reader.shapes[name]) > 1]),
        (False, [name for name in trained if len(reader.shapes[name]) <= 1]),
    ):
        fitting = [group for group in saved["groups"] if bool(group["weight_decay"]) == decays] or saved["groups"]
        group = max(fitting, key=lambda group: group["lr"])
        settings = {"lr": group["lr"], "betas": list(group["betas"]), "eps": group["eps"]}
        decay = group["weight_decay"] if decays else 0.0
        groups += [settings | {"weight_decay": decay, "params": names}] if names else []
    moments = [_parameters(reader, dict.fromkeys(trained, kind), {}) for kind in MOMENTS]
    return OptimizerState(int(saved["updates"]), *moments, groups)
