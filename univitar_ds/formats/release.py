"""The layout of the public release: an encoder in `config.json` and `pytorch_model.bin` or `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.encoder import CONFIG_FILE, read_encoder_config
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.stored_model import VISION, StoredModel
from univitar_ds.formats.weight_files import BIN, SAFE, open_weights, write_weights
from univitar_ds.regular_files import read_bytes

WEIGHT_FILES = (SAFE, BIN, f"{SAFE}.index.json", f"{BIN}.index.json")


def recognises(folder: Path) -> bool:
    """Returns whether the folder has a file with weights and an encoder's `config.json` in the release's layout."""
    try:
        values = json.loads(read_bytes(folder / CONFIG_FILE))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(values, dict) or not any((folder / name).exists() for name in WEIGHT_FILES):
        return False
    kind = str(values.get("model_type", "univitar"))  # other architectures of transformers have another type
    return "num_hidden_layers" in values and "hidden_size" in values and "univitar" in kind.lower()


def read(folder: Path) -> StoredModel:
    """Opens an encoder. Raises: CheckpointError if the folder is incomplete or damaged."""
    tensors = open_weights(folder).renamed(lambda name: VISION + name)
    return StoredModel(folder, "release", read_encoder_config(folder), tensors)


def write(model: StoredModel, folder: Path, *, shard_bytes: int | None = None, safe: bool = True) -> None:
    """Writes an encoder.

    Args: shard_bytes, safe: see `write_weights`.
    Raises: CheckpointError if `model` is more than an encoder; StorageError if the folder cannot be written.
    """
    if model.joint is not None:
        raise CheckpointError("the release's layout holds an encoder alone; use --part encoder, or --to hf")
    tensors = model.tensors.renamed(lambda name: name.removeprefix(VISION))
    write_weights(tensors, folder, shard_bytes=shard_bytes, safe=safe)
    replace_text(folder / CONFIG_FILE, json.dumps(model.encoder.to_dict(), indent=2) + "\n")
