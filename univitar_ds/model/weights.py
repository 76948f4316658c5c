"""Reads and writes encoders in the release's layout: `config.json` and `model.safetensors` or `pytorch_model.bin`.

Only tensors are unpickled. Weights may be split into shards with an `.index.json`.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from univitar_ds.atomic_write import replace_text, replacing
from univitar_ds.config.encoder import CONFIG_FILE, read_object
from univitar_ds.errors import CheckpointError, writing

SAFE = "model.safetensors"
BIN = "pytorch_model.bin"
MAX_NAMED = 8
"""Maximum number of keys listed per kind of error; a wrong model would otherwise fill the screen."""


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Returns all tensors in `folder` by name. Raises: CheckpointError if there are none or a file is damaged."""
    folder = Path(folder)
    for name in (SAFE, BIN):
        if (folder / name).is_file():
            return _read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index)
    raise CheckpointError(f"{folder} holds neither {SAFE} nor {BIN}; name a folder with an encoder's weights")


def load_into(model: nn.Module, folder: str | Path, *, assign: bool = False) -> None:
    """Loads the weights in `folder` into `model`.

    Args: assign: whether to use the stored tensors, in the stored precision, instead of copying their values.
    Raises: CheckpointError that lists missing, unexpected and misshapen keys, without changing `model`; or if the
        weights cannot be read.
    """
    state = read_weights(folder)
    complaint = describe_misfit(model.state_dict(), state)
    if complaint:
        raise CheckpointError(
            f"the weights in {folder} do not fit the encoder of its {CONFIG_FILE}: {complaint}. "
            f"Use the two files of one model."
        )
    model.load_state_dict(state, assign=assign)


def describe_misfit(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """Returns the keys of `found` that differ from `wanted`, in words; empty if there are none."""
    misshapen = [
        f"{name} is {_form(found[name])} instead of {_form(tensor)}"
        for name, tensor in wanted.items()
        if name in found and (found[name].shape != tensor.shape or not found[name].is_floating_point())
    ]
    lists = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "misshapen": misshapen,
    }
    return "; ".join(f"{kind}: {_some(names)}" for kind, names in lists.items() if names)


def save_encoder(folder: str | Path, model: nn.Module, *, safe: bool = True) -> None:
    """Writes an encoder (`model.config`, `model.state_dict()`) in the release's layout.

    Args: safe: whether to write `model.safetensors` instead of `pytorch_model.bin`.
    Raises: StorageError if the folder cannot be written.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if safe:
        with replacing(folder / SAFE) as path:
            save_tensors(state, path, metadata={"format": "pt"})
    else:
        with replacing(folder / BIN) as path:
            torch.save(state, path)
    replace_text(folder / CONFIG_FILE, json.dumps(model.config.to_dict(), indent=2) + "\n")
    # An older file of the other format is removed, so that the loader cannot read it instead.
    (folder / (BIN if safe else SAFE)).unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Writes a safetensors file with the permissions of any new file (the library would set 0600). Returns `path`.

    Raises: OSError with the system's error number.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)
    return path


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is damaged or holds more than tensors ({reason}); fetch it again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must hold tensors by name, got {type(state).__name__}")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path} holds entries that are no tensors: {_some(others)}; save the weights alone")
    return state


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    file_of = read_object(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise CheckpointError(f"{index} has no weight_map from names to files; fetch it again")
    state: dict[str, Tensor] = {}
    for name in sorted(set(file_of.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}; shards must be in its own folder")
        state.update(_read_file(folder / name))
    return state


def _form(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def _some(names: list[str]) -> str:
    hidden = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {hidden} more" if hidden > 0 else "")
