"""Reads the whole model of a checkpoint in one process, for evaluation and export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from univitar_ds.config.load import load_config
from univitar_ds.config.run_folder import CHECKPOINTS, CONFIG, TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import CheckpointError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import read_full
from univitar_ds.model.contrastive import ContrastiveModel, build_contrastive
from univitar_ds.tokenization import load_tokenizer, special_ids

Weights = Literal["trained", "averaged"]


@dataclass(frozen=True)
class Trained:
    """A run's model in evaluation mode (float32, on the host), with the files and settings that it was read from."""

    run: Path
    checkpoint: Path
    config: RunConfig
    tokenizer: Tokenizer
    model: ContrastiveModel
    averaged: bool
    """Whether the model has the averaged weights (`optimizer.ema_decay`)."""


def open_trained(path: str | Path, weights: Weights | None = None) -> Trained:
    """Reads the last checkpoint of a run's folder, or one checkpoint.

    Args: path: folder of a run or of a checkpoint. weights: the trained or the averaged weights; None: the average if
    the run keeps one.
    Raises: CheckpointError if the checkpoint or the average is missing, or the checkpoint is damaged or from another
    model.
    """
    run, checkpoint = find_checkpoint(Path(path))
    config = load_config(run / CONFIG)
    has_average = config.optimizer.ema_decay is not None
    if weights == "averaged" and not has_average:
        raise CheckpointError(f"{run} keeps no averaged weights, optimizer.ema_decay is null; take the trained ones")
    averaged = has_average if weights is None else weights == "averaged"
    tokenizer = load_tokenizer(run / TOKENIZER)
    special = special_ids(tokenizer)
    # The run's attention back end may support half precision only.
    model_config = config.model.model_copy(update={"attention": "auto"})
    model = build_contrastive(
        model_config, vocab_size=special.vocab_size, eos_id=special.eos_id, pad_id=special.pad_id, seed=config.seed
    )
    try:
        model.load_state_dict(read_full(checkpoint, averaged=averaged))
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint} does not fit the model of {run / CONFIG} ({_reason(error)}); restore the run's own "
            "config.yaml"
        ) from error
    return Trained(run, checkpoint, config, tokenizer, model.eval(), averaged)


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """Returns the folders of the run and of the checkpoint. Args: path: folder of a run or of a checkpoint.

    Raises: CheckpointError if `path` is neither, or the run has no complete checkpoint."""
    if (path / CONFIG).is_file():
        checkpoint = checkpoint_dir.latest(path / CHECKPOINTS)
        if checkpoint is None:
            raise CheckpointError(f"{path} has no complete checkpoint; train it first, or name another run")
        return path, checkpoint
    run = path.resolve().parent.parent
    if (path / checkpoint_dir.MANIFEST).is_file() and (run / CONFIG).is_file():
        return run, path
    raise CheckpointError(
        f"{path} is neither a run's folder (with {CONFIG}) nor a checkpoint in one ({CHECKPOINTS}/step-*); name one"
    )


def _reason(error: RuntimeError) -> str:
    """Returns the first lines of torch's message, which lists each key on a separate line."""
    lines = [line.strip() for line in str(error).splitlines()[1:4]]
    return " ".join(lines)[:300]
