"""Opens a model in any format: the files show the format, and the form of the name shows where the model is."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

from univitar_ds.config.encoder import CONFIG_FILE, read_object
from univitar_ds.config.run_folder import CONFIG
from univitar_ds.data.storage.base import LOCAL, S3, StorageSettings
from univitar_ds.errors import CheckpointError
from univitar_ds.formats import run as run_format
from univitar_ds.formats.fetched import from_hub, from_s3
from univitar_ds.formats.run import Weights
from univitar_ds.formats.stored_model import StoredModel

_MODULES = {
    "run": "univitar_ds.formats.run",
    "hf": "univitar_ds.formats.hf",
    "release": "univitar_ds.formats.release",
    "universal": "univitar_ds.formats.distributed.universal",
    "deepspeed": "univitar_ds.formats.distributed.deepspeed",
    "megatron": "univitar_ds.formats.distributed.megatron",
    "dcp": "univitar_ds.formats.distributed.dcp",
}
"""Modules of the formats that can be read, in the order in which they are tried."""
FORMATS = tuple(_MODULES)
_TENSORS_ALONE = ("universal", "deepspeed", "dcp")
"""Formats that may hold tensors without the configuration of their model."""
PROGRAM_FILES = {"program": "model.pt2", "onnx": "model.onnx"}
"""Files of the formats that can only be written."""
PEERS = ("clip", "siglip", "dinov2", "dinov3")
"""How the `model_type` of models of transformers begins that the commands `eval` measure, for comparison."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""Names of models on the Hugging Face hub: owner/name."""


def open_stored(
    source: str | Path,
    weights: Weights | None = None,
    config_folder: Path | None = None,
    settings: StorageSettings = LOCAL,
    *,
    verify: bool = True,
) -> StoredModel:
    """Opens a model.

    Args: source: a local folder, an s3:// address, or the name of a model on the Hugging Face hub (owner/name);
        weights: trained or averaged, for a run; config_folder: a run, an export or another folder with the model's
        configuration, for a format of tensors alone; settings: of the S3 store; verify: see `formats.run.read`.
    Raises: CheckpointError if the source cannot be found, its format is not recognised, or it is damaged.
    """
    folder = local_folder(source, settings)
    try:
        name = recognised(folder)
    except CheckpointError as error:  # of a copy on this machine, whose name says nothing
        raise CheckpointError(str(error).replace(str(folder), str(source))) from error
    if config_folder is not None and name not in _TENSORS_ALONE:
        raise CheckpointError(f"{source}, in the format {name}, has its own configuration; leave --config-from out")
    if name == "run":
        return run_format.read(folder, weights, verify=verify)
    if weights is not None:
        raise CheckpointError(f"{source} is in the format {name}, which has one kind of weights; leave --weights out")
    if config_folder is None:
        return module_of(name).read(folder)
    return module_of(name).read(folder, config_folder)


def recognised(folder: Path) -> str:
    """Returns the name of the folder's format. Raises: CheckpointError if no format fits."""
    for name in FORMATS:
        if module_of(name).recognises(folder):
            return name
    if (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is the folder of a run that has no checkpoint yet; wait for its first one, or continue it with "
            f"`univitar-ds train --resume {folder}`"
        )
    for kind, name in PROGRAM_FILES.items():
        if (folder / name).is_file():
            raise CheckpointError(
                f"{folder} holds {name}, which --to {kind} has written and nothing here reads; name the model that it "
                "was converted from"
            )
    if (kind := model_type(folder)) is not None:
        known = f"only models of this project are read ({', '.join(FORMATS)})"
        remedy = "name one of them, or the folder of a run"
        if kind.startswith(PEERS):
            remedy = f"to compare this one with them, measure it: univitar-ds eval knn {folder} --data SOURCE"
        raise CheckpointError(
            f"{folder} holds a model of transformers with model_type {kind[:60]!r}; {known}; {remedy}"
        )
    raise CheckpointError(
        f"{folder} holds no model in a known format ({', '.join(FORMATS)}); name a folder with config.json and "
        "weights, or the folder of a run"
    )


def model_type(folder: Path) -> str | None:
    """Returns the `model_type` that transformers writes into a folder's config.json; None without one."""
    try:
        kind = read_object(folder / CONFIG_FILE).get("model_type")
    except CheckpointError:
        return None
    return kind if isinstance(kind, str) else None


def module_of(name: str) -> ModuleType:
    """Returns the module of a format."""
    return importlib.import_module(_MODULES[name])


def local_folder(source: str | Path, settings: StorageSettings = LOCAL) -> Path:
    """Returns the folder of a model. Models on S3 and on the hub are copied to this machine first.

    Copies from S3 are removed when the process ends, those from the hub stay in the hub's cache.
    Raises: CheckpointError if the source cannot be found or copied.
    """
    text = str(source)
    if Path(source).is_dir() or run_format.recognises(Path(source)):
        return Path(source)
    if Path(source).exists():
        raise CheckpointError(f"{source} is a file; name the folder of a model")
    if text.startswith(S3):
        if not text.removeprefix(S3).strip("/"):
            raise CheckpointError(f"{source} names no bucket; write s3://BUCKET/FOLDER")
        return from_s3(text.rstrip("/") + "/", settings)
    if HUB_NAME.fullmatch(text):
        return from_hub(text)
    raise CheckpointError(f"{source} is neither a folder, an s3:// address nor a hub name (owner/name)")
