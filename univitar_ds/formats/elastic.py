"""Reads elastic checkpoints, which `training.checkpoint.sharded` writes and describes, without an engine."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from univitar_ds.errors import CheckpointError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.weight_files import reading
from univitar_ds.regular_files import read_utf8

MASTER = "fp32"
EMA = "ema"
FROZEN = "frozen"
FORMAT = 3
PER_RANK = 2
"""The format with an index per rank, which earlier versions wrote."""
STATE = "state.json"
BUFFERS = "buffers.safetensors"
INDEX = "index.json"
_MAPPED = 128 * 2**20
"""Bytes that are read from mapped files before they are closed, since what was read from a mapping counts as memory.
To open them for each tensor would take longer than to read it: a header has all names of a rank."""


class ElasticReader:
    """Reads the shards of a checkpoint that any number of ranks has written, without verifying them.

    A file of tensors is opened when it is first needed: on the same number of ranks, each rank opens one file.
    """

    def __init__(self, folder: Path, open_files: ExitStack) -> None:
        self.folder = folder
        """Args: open_files: closes the files that this reader opens."""
        self._open_files = open_files
        self.content = read_json(folder / STATE)
        if self.content.get("format") not in (FORMAT, PER_RANK):
            raise CheckpointError(
                f"{folder} has format {self.content.get('format')}, this program reads {PER_RANK} and {FORMAT}; "
                "use the version that wrote it"
            )
        self.cursors: dict[int, dict[str, Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, dict[str, str]] = {}
        self._parts: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        """(start, length, rank that wrote it) of each part, by parameter."""
        self._files: dict[int, Any] = {}
        self._mapped = 0
        with checkpoint_dir.understanding(folder):
            if self.content["format"] == PER_RANK:
                self._read_indices()
            else:
                self._read_index()

    def _read_index(self) -> None:
        index = read_json(self.folder / INDEX)
        self.cursors = {int(lane): cursor for lane, cursor in index["cursors"].items()}
        for name, entry in index["pieces"].items():
            self.shapes[name] = tuple(entry["shape"])
            if entry["parts"]:
                self.kinds[name] = entry["kinds"]
                self._parts[name] = [(int(start), int(length), int(rank)) for rank, start, length in entry["parts"]]

    def _read_indices(self) -> None:
        folder = self.folder
        for rank in range(self.content["world_size"]):
            index = read_json(folder / f"rank{rank:05d}.json")
            self.cursors.update({int(lane): cursor for lane, cursor in index["cursors"].items()})
            for name, entry in index["pieces"].items():
                self.shapes[name] = tuple(entry["shape"])
                if entry["length"]:
                    self.kinds[name] = entry["kinds"]
                    self._parts[name].append((entry["start"], entry["length"], rank))

    def fill(self, name: str, kind: str, start: int, target: Tensor) -> None:
        """Copies elements start, start + 1, ... of a flattened parameter to the 1-D `target`.

        Raises: CheckpointError if elements are missing."""
        stop, filled = start + target.numel(), 0
        for begin, length, rank in sorted(self._parts[name]):
            low, high = max(begin, start + filled), min(begin + length, stop)
            if low < high and low == start + filled:
                source = self._tensors(rank).get_slice(f"{name}/{kind}")[low - begin : high - begin]
                target[low - start : high - start].copy_(source)
                filled = high - start
                self._mapped += source.nbytes
        if filled < target.numel():
            raise CheckpointError(
                f"{self.folder} has {kind} of {name} up to element {start + filled} only, {stop} are needed; "
                f"{checkpoint_dir.remedy(self.folder)}"
            )

    def _tensors(self, rank: int) -> Any:
        if rank not in self._files:
            path = self.folder / f"rank{rank:05d}.safetensors"
            with reading(path):
                self._files[rank] = self._open_files.enter_context(safe_open(path, "pt"))
        return self._files[rank]

    def trim(self) -> None:
        """Closes the files of tensors if much of them was read, so that their pages do not count as memory of this
        process any more."""
        if self._mapped > _MAPPED:
            self._open_files.close()
            self._files.clear()
            self._mapped = 0

    def buffers(self) -> dict[str, Tensor]:
        """Returns all buffers by name. Raises: CheckpointError if the file is damaged."""
        with reading(self.folder / BUFFERS):
            return load_file(self.folder / BUFFERS)

    def weights_kind(self, name: str, *, averaged: bool) -> str:
        """Returns the kind that has the weights of a parameter; the average if `averaged` and the run keeps one."""
        kinds = self.kinds.get(name, {})
        return FROZEN if FROZEN in kinds else EMA if averaged and EMA in kinds else MASTER

    def read(self, name: str, kind: str) -> Tensor:
        """Returns one parameter in full, float32. Raises: CheckpointError if a part is missing."""
        flat = torch.empty(math.prod(self.shapes[name]), dtype=torch.float32)
        self.fill(name, kind, 0, flat)
        return flat.view(self.shapes[name])


def read_full(folder: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """Returns all parameters and buffers in full, by name, floats as float32. Needs no engine and no other rank.

    Args: averaged: whether to read the average of the weights over updates, if the run keeps one.
    Raises: CheckpointError if a file is damaged.
    """
    checkpoint_dir.verify(folder, checkpoint_dir.read_manifest(folder))
    with ExitStack() as open_files:
        reader = ElasticReader(folder, open_files)
        full = {name: reader.read(name, reader.weights_kind(name, averaged=averaged)) for name in reader.shapes}
        buffers = {name: b.float() if b.is_floating_point() else b for name, b in reader.buffers().items()}
        return full | buffers


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the `state` that was passed to `save_checkpoint`. Raises: CheckpointError if it cannot be read."""
    return read_json(folder / STATE)["run"]


def read_updates(folder: Path) -> int:
    """Returns the number of updates of the optimizer. Raises: CheckpointError if it cannot be read."""
    content = read_json(folder / STATE)
    with checkpoint_dir.understanding(folder):
        return int(content["optimizer"]["updates"])


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of a checkpoint. Raises: CheckpointError if it cannot be read."""
    try:
        content = json.loads(read_utf8(path))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__} instead of an object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {checkpoint_dir.remedy(path.parent)}") from error
