"""Reads elastic checkpoints, which `training.checkpoint.sharded` writes and describes, without an engine."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from univitar_ds.errors import CheckpointError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.checkpoint.shared_file import RankTensors, rank_file
from univitar_ds.formats.slices import Slice
from univitar_ds.formats.weight_files import reading
from univitar_ds.regular_files import read_utf8

MASTER = "fp32"
EMA = "ema"
FROZEN = "frozen"
FORMAT = 4
SLICED = 5
"""The format with slices of tensor parallelism, which only checkpoints with slices have."""
PER_RANK, FILE_PER_RANK = 2, 3
"""Formats of earlier versions: with an index per rank, and with one index and a file of tensors per rank."""
STATE = "state.json"
BUFFERS = "buffers.safetensors"
INDEX = "index.json"
Fetch = Callable[[str], Path]
_MAPPED = 128 * 2**20
"""Bytes that are read from mapped files before the files are closed, since pages that were read count as memory.
Files stay open for many tensors: a header has all names of a rank and takes longer to parse than a tensor to read."""


class ElasticReader:
    """Reads the shards of a checkpoint that any number of ranks has written, without verifying them.

    A file of tensors is opened when it is first needed: on the same ranks and nodes, each rank opens one file.
    """

    def __init__(self, folder: Path, open_files: ExitStack, fetch: Fetch | None = None) -> None:
        """Args: open_files: closes the files that this reader opens; fetch: returns the path of a file by its name,
        None: the file is in `folder`."""
        self.folder = folder
        self._open_files = open_files
        self._path_of: Fetch = fetch or folder.joinpath
        self.content = read_json(self._path_of(STATE))
        if self.content.get("format") not in (SLICED, FORMAT, FILE_PER_RANK, PER_RANK):
            raise CheckpointError(
                f"{folder} has format {self.content.get('format')}, this program reads {PER_RANK} to {SLICED}; "
                "use the version that wrote it"
            )
        self.cursors: dict[int, dict[str, Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, dict[str, str]] = {}
        self._parts: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        """(start, length, rank that wrote it) of each part, by parameter; for a parameter with slices, `start` counts
        in the concatenation of the slices."""
        self._sliced: dict[str, tuple[int, int]] = {}
        """(run, count) of the slices of a parameter, see `slices.Slice`."""
        self._shared: dict[int, str] = {}
        """Names of files that several ranks have written, by rank."""
        self._files: dict[str, Any] = {}
        self._opened: dict[int, Any] = {}
        self._mapped = 0
        with checkpoint_dir.understanding(folder):
            if self.content["format"] == PER_RANK:
                self._read_indices()
            else:
                self._read_index()

    def _read_index(self) -> None:
        index = read_json(self._path_of(INDEX))
        self.cursors = {int(lane): cursor for lane, cursor in index["cursors"].items()}
        for file, ranks in index.get("files", {}).items():
            self._shared |= {int(rank): local_name(file) for rank in ranks}
        for name, entry in index["pieces"].items():
            self.shapes[name] = tuple(entry["shape"])
            if entry["parts"]:
                self.kinds[name] = entry["kinds"]
                self._parts[name] = [(int(start), int(length), int(rank)) for rank, start, length in entry["parts"]]
            if "slices" in entry:
                run, count = map(int, entry["slices"])
                if run < 1 or count < 1 or math.prod(self.shapes[name]) % (run * count):
                    raise ValueError(f"{name} of shape {list(self.shapes[name])} has {count} slices with runs of {run}")
                self._sliced[name] = run, count

    def _read_indices(self) -> None:
        for rank in range(self.content["world_size"]):
            index = read_json(self._path_of(f"rank{rank:05d}.json"))
            self.cursors.update({int(lane): cursor for lane, cursor in index["cursors"].items()})
            for name, entry in index["pieces"].items():
                self.shapes[name] = tuple(entry["shape"])
                if entry["length"]:
                    self.kinds[name] = entry["kinds"]
                    self._parts[name].append((entry["start"], entry["length"], rank))

    def fill(self, name: str, kind: str, start: int, target: Tensor, part: Slice | None = None) -> None:
        """Copies elements start, start + 1, ... of a flattened parameter, or of `part` of it, to the 1-D `target`.

        A parameter that the checkpoint has in other slices is read as a whole.
        Raises: CheckpointError if elements are missing."""
        stored = self._sliced.get(name)
        if stored == (None if part is None else (part.run, part.count)):
            shift = 0 if part is None else part.place * (math.prod(self.shapes[name]) // part.count)
            self._fill(name, kind, start + shift, target)
            return
        whole = self.read(name, kind, target.dtype).view(-1)
        target.copy_((whole if part is None else part.of(whole))[start : start + target.numel()])

    def _fill(self, name: str, kind: str, start: int, target: Tensor) -> None:
        """Copies elements as they are stored: slice after slice."""
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
        if rank not in self._opened:
            name = self._shared.get(rank) or rank_file(rank)
            path = self._path_of(name)
            with reading(path):
                if name not in self._files:
                    self._files[name] = self._open_files.enter_context(safe_open(path, "pt"))
                file = self._files[name]
                self._opened[rank] = RankTensors(file, rank) if rank in self._shared else file
        return self._opened[rank]

    def trim(self) -> None:
        """Closes the files of tensors after many bytes were read, so that their pages no longer count as memory of this
        process."""
        if self._mapped > _MAPPED:
            self._opened.clear()
            self._open_files.close()
            self._files.clear()
            self._mapped = 0

    def buffers(self) -> dict[str, Tensor]:
        """Returns all buffers by name. Raises: CheckpointError if the file is damaged."""
        path = self._path_of(BUFFERS)
        with reading(path):
            return load_file(path)

    def weights_kind(self, name: str, *, averaged: bool) -> str:
        """Returns the kind that has the weights of a parameter; the average if `averaged` and the run keeps one."""
        kinds = self.kinds.get(name, {})
        return FROZEN if FROZEN in kinds else EMA if averaged and EMA in kinds else MASTER

    def read(self, name: str, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns one parameter in full, joined from its slices. Raises: CheckpointError if a part is missing."""
        flat = torch.empty(math.prod(self.shapes[name]), dtype=dtype)
        self._fill(name, kind, 0, flat)
        if name in self._sliced:
            run, count = self._sliced[name]
            flat = flat.view(count, -1, run).transpose(0, 1).reshape(-1)
        return flat.view(self.shapes[name])


def local_name(name: str) -> str:
    """Returns the name of a file in a checkpoint's folder. Raises: ValueError if it is elsewhere."""
    if not name or Path(name).name != name:
        raise ValueError(f"{name[:80]!r} is not in the folder of the checkpoint")
    return name


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
