"""Checks the sizes in the files of a peer before a model is built or data is read: a damaged or hostile file could
otherwise demand any amount of memory and time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from univitar_ds.config.encoder import CONFIG_FILE, read_object
from univitar_ds.errors import CheckpointError
from univitar_ds.peers.processing import image_settings

_SIDE = 4096
"""Maximum pixels of a side: our choice. The published models have at most 1,024."""
_MOST = {
    "num_hidden_layers": 1 << 10,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "projection_dim": 1 << 16,
    "max_position_embeddings": 1 << 20,
    "vocab_size": 1 << 24,
    "num_register_tokens": 1 << 12,
    "max_num_patches": 1 << 16,
    **dict.fromkeys(("image_size", "size", "crop_size", "height", "width", "shortest_edge", "longest_edge"), _SIDE),
}
"""Maximum values, by their names in transformers, at any depth of the configuration and the image processor's file."""


def check_files(folder: Path) -> None:
    """Checks config.json and the image processor's file of a folder.

    Raises: CheckpointError if one is missing or cannot be read, or a size in it is above its limit."""
    for path, values in ((folder / CONFIG_FILE, read_object(folder / CONFIG_FILE)), image_settings(folder)):
        for name, value in _numbers(values):
            if name in _MOST and value > _MOST[name]:
                raise CheckpointError(
                    f"{path} has {name} {value:g} (limit {_MOST[name]}), which no published model has; fetch it again"
                )


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the numbers of nested objects with their names; numbers in a list have the name of its key."""
    waiting: list[tuple[str, Any]] = list(values.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, one) for one in value]
        elif isinstance(value, (int, float)):
            yield name, value
