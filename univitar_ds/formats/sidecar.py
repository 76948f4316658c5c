"""`univitar.json`: the configuration of a model, for formats whose own files do not hold it.

{"format": 1, "encoder": {fields of the release's config.json}, "joint": {fields of JointConfig} or null}
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.encoder import EncoderConfig, read_object
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.stored_model import JointConfig, StoredModel

SIDECAR = "univitar.json"
FORMAT = 1
_TYPES: dict[str, type] = {
    "embed_dim": int, "pool_heads": int, "objective": str, "text": dict, "context_length": int, "tokenizer": str,
}  # fmt: skip


def write_sidecar(model: StoredModel, folder: Path) -> None:
    """Writes the model's configuration to `folder`, which must exist. Raises: StorageError."""
    joint = None if model.joint is None else dataclasses.asdict(model.joint)
    content = {"format": FORMAT, "encoder": model.encoder.to_dict(), "joint": joint}
    replace_text(folder / SIDECAR, json.dumps(content, indent=2) + "\n")


def read_sidecar(folder: Path) -> tuple[EncoderConfig, JointConfig | None]:
    """Returns the encoder's configuration, and that of the whole model if the folder does not hold an encoder alone.

    Raises: CheckpointError if the file is missing, damaged or of another format."""
    path = folder / SIDECAR
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {SIDECAR}, which holds the configuration; copy it beside the weights")
    content = read_object(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {content.get('format')!r}, this program reads {FORMAT}; use the version that wrote it"
        )
    if not isinstance(content.get("encoder"), dict):
        raise CheckpointError(f"{path} has no encoder object; write the folder again")
    return EncoderConfig.from_dict(content["encoder"]), _joint(content.get("joint"), path)


def _joint(values: Any, path: Path) -> JointConfig | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} has joint {type(values).__name__}, it must be an object or null")
    for name, kind in _TYPES.items():
        value = values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{path} has joint.{name} {str(value)[:80]!r}, it must be {kind.__name__}")
    for name in ("embed_dim", "pool_heads", "context_length"):
        if values[name] < 1:
            raise CheckpointError(f"{path} has joint.{name} {values[name]}, it must be at least 1")
    if values["objective"] not in ("sigmoid", "softmax"):
        raise CheckpointError(f"{path} has joint.objective {values['objective']!r}, it must be sigmoid or softmax")
    return JointConfig(**{name: values[name] for name in _TYPES})
