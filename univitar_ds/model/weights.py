"""Loads stored weights into a model and writes encoders in the release's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from univitar_ds.config.encoder import CONFIG_FILE
from univitar_ds.errors import CheckpointError
from univitar_ds.formats import release
from univitar_ds.formats.stored_model import VISION, StoredModel, TensorInfo, Tensors
from univitar_ds.formats.weight_files import open_weights, some


def load_into(model: nn.Module, folder: str | Path, *, assign: bool = False) -> None:
    """Loads the weights in `folder` into `model`.

    Args: assign: whether to use the stored tensors, in the stored precision, instead of copying their values.
    Raises: CheckpointError that lists missing, unexpected and misshapen keys, without changing `model`; or if the
        weights cannot be read.
    """
    tensors = open_weights(folder)
    complaint = describe_misfit(model.state_dict(), tensors.infos)
    if complaint:
        raise CheckpointError(
            f"the weights in {folder} do not fit the encoder of its {CONFIG_FILE}: {complaint}. "
            f"Use the two files of one model."
        )
    model.load_state_dict(dict(tensors), assign=assign)


def describe_misfit(wanted: Mapping[str, Tensor | TensorInfo], found: Mapping[str, Tensor | TensorInfo]) -> str:
    """Returns the keys of `found` that differ from `wanted`, in words; empty if there are none."""
    misshapen = [
        f"{name} is {_form(found[name])} instead of {_form(tensor)}"
        for name, tensor in wanted.items()
        if name in found
        and (tuple(found[name].shape) != tuple(tensor.shape) or not found[name].dtype.is_floating_point)
    ]
    lists = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "misshapen": misshapen,
    }
    return "; ".join(f"{kind}: {some(names)}" for kind, names in lists.items() if names)


def save_encoder(folder: str | Path, model: nn.Module, *, safe: bool = True) -> None:
    """Writes an encoder (`model.config`, `model.state_dict()`) in the release's layout.

    Args: safe: whether to write `model.safetensors` instead of `pytorch_model.bin`.
    Raises: StorageError if the folder cannot be written.
    """
    tensors = Tensors.of(model.state_dict()).renamed(lambda name: VISION + name)
    release.write(StoredModel(Path(folder), "module", model.config, tensors), Path(folder), safe=safe)


def _form(tensor: Tensor | TensorInfo) -> str:
    kind = "" if tensor.dtype.is_floating_point else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"
