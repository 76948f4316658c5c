"""Finds the configuration of a model whose checkpoint has only tensors, and the canonical names of its tensors.

The configuration comes from the first of these that exists: the folder that the caller names; `univitar.json`, a run's
`config.yaml` with `tokenizer.json`, or an encoder's `config.json` beside the checkpoint; the shapes of the encoder's
tensors. A `config.json` and the shapes describe only the encoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from univitar_ds.config.encoder import CONFIG_FILE, EncoderConfig, read_encoder_config
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.run import run_configuration
from univitar_ds.formats.sidecar import SIDECAR, read_sidecar
from univitar_ds.formats.stored_model import VISION, JointConfig, StoredModel, TensorInfo
from univitar_ds.model.config import PRESETS
from univitar_ds.regular_files import is_regular

Configuration = tuple[EncoderConfig, JointConfig | None]
RUN = "config.yaml"
TOKENIZER = "tokenizer.json"
PATCHES = "embeddings.patch_embedding.weight"
"""Name of a tensor that every encoder has, without the prefix `vision.`."""
_LAYER = re.compile(r"vision\.encoder\.layers\.(\d+)\.")
_SHAPE = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "qkv_bias", "qk_normalization", "patch_embedding_bias",
)  # fmt: skip


def name_prefix(names: Iterable[str], where: object) -> tuple[str, str]:
    """Returns (prefix of the stored names, what replaces it), such as ("module.", "") for a wrapped model.

    What replaces it is "vision." for a checkpoint of an encoder alone.
    Raises: CheckpointError if no name, or more than one, is that of the patch embedding.
    """
    found = [name for name in names if name == PATCHES or name.endswith(f".{PATCHES}")]
    if len(found) != 1:
        raise CheckpointError(
            f"{where} has {len(found)} tensors {PATCHES}, a model of this project has one; name a checkpoint of it"
        )
    prefix = found[0].removesuffix(PATCHES)
    whole = prefix.endswith(VISION)
    return (prefix.removesuffix(VISION), "") if whole else (prefix, VISION)


def canonical_names(names: Iterable[str], where: object) -> Callable[[str], str | None]:
    """Returns a function that gives the canonical name of a stored tensor; None if the tensor is not of the model.

    Raises: CheckpointError as `name_prefix`."""
    prefix, new = name_prefix(names, where)
    return lambda name: new + name.removeprefix(prefix) if name.startswith(prefix) else None


def find_configuration(
    infos: Mapping[str, TensorInfo],
    beside: Collection[Path],
    named: Path | None,
    heads: int | None,
    given: Configuration | None = None,
) -> Configuration:
    """Returns the configuration of the model with tensors `infos`, see the module's docstring.

    Args: infos: by canonical names; beside: folders to look into, the first is the checkpoint; named: the folder that
        the caller names; heads: number of attention heads, for a configuration from shapes; given: the configuration
        itself.
    Raises: CheckpointError if a configuration is damaged, or of an encoder of another shape, or there is none.
    """
    if given is not None:
        return check_shape(given, infos, next(iter(beside)))
    if named is not None:
        found = _read(named)
        if found is None:
            raise CheckpointError(f"{named} has none of {SIDECAR}, {RUN} and {CONFIG_FILE}; name a folder with one")
        return check_shape(found, infos, named)
    for folder in beside:
        if (found := _read(folder)) is not None:
            return check_shape(found, infos, folder)
    return infer_encoder(infos, heads), None


def check_shape(found: Configuration, infos: Mapping[str, TensorInfo], where: object) -> Configuration:
    """Returns `found`. Raises: CheckpointError if its encoder has another shape than the tensors."""
    stored = _shape(infos)
    given = {**found[0].architecture(), "intermediate_size": found[0].inner_width}
    wrong = [f"{name} {given[name]} instead of {stored[name]}" for name in _SHAPE if given[name] != stored[name]]
    if wrong:
        raise CheckpointError(
            f"the configuration in {where} is of another encoder than the tensors: "
            f"{'; '.join(wrong).replace('intermediate_size', 'inner width')}. Name the model's own configuration."
        )
    return found


def whole_or_encoder(model: StoredModel) -> StoredModel:
    """Returns `model`, or its encoder alone if it has other tensors but no configuration for them."""
    alone = all(name.startswith(VISION) for name in model.tensors)
    return model if alone or model.joint is not None else model.encoder_only()


def infer_encoder(infos: Mapping[str, TensorInfo], heads: int | None) -> EncoderConfig:
    """Returns the encoder whose tensors have these shapes; values that shapes do not show are the release's.

    Args: heads: None: those of the preset of this shape, since no tensor shows the number of heads.
    Raises: CheckpointError if `heads` is needed, or a tensor is missing.
    """
    shape = _shape(infos)
    if heads is None:
        known = ("hidden_size", "num_hidden_layers")
        heads = next(
            (
                preset.num_attention_heads
                for preset in PRESETS.values()
                if all(getattr(preset, name) == shape[name] for name in known)
                and preset.inner_width == shape["intermediate_size"]
            ),
            None,
        )
    if heads is None:
        raise CheckpointError(
            f"no tensor shows how many heads this encoder of width {shape['hidden_size']} has; give the number, or "
            f"name a folder with its {CONFIG_FILE}"
        )
    shape["intermediate_size"] = math.ceil(shape["intermediate_size"] * 3 / 2)
    return EncoderConfig(num_attention_heads=heads, **shape)


def _shape(infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Returns the fields of `_SHAPE`; `intermediate_size` is the inner width."""
    first = f"{VISION}encoder.layers.0."
    for name in (f"{VISION}{PATCHES}", f"{first}mlp.fc1.weight"):
        if len(infos[name].shape if name in infos else ()) < 2:
            raise CheckpointError(f"the checkpoint lacks {name}, or it is no matrix; name a checkpoint of an encoder")
    layers = {int(match[1]) for name in infos if (match := _LAYER.match(name))}
    return {
        "hidden_size": infos[f"{VISION}{PATCHES}"].shape[0],
        "num_hidden_layers": 1 + max(layers),
        "intermediate_size": infos[f"{first}mlp.fc1.weight"].shape[0],
        "qkv_bias": f"{first}attn.qkv.bias" in infos,
        "qk_normalization": f"{first}attn.q_norm.weight" in infos,
        "patch_embedding_bias": f"{VISION}embeddings.patch_embedding.bias" in infos,
    }


def _read(folder: Path) -> Configuration | None:
    if is_regular(folder / SIDECAR):
        return read_sidecar(folder)
    if is_regular(folder / RUN):
        return run_configuration(folder)
    if is_regular(folder / CONFIG_FILE):
        return read_encoder_config(folder), None
    return None
