"""One file with the tensors of all ranks of a node, which they write at the same time.

    node00000.safetensors     "rank00000", "rank00001", ...: uint8, each the content of a safetensors file

Each rank computes its place in the file from the sizes of all ranks. Tensors keep their names. A rank that is alone on
its node writes an ordinary safetensors file, such as `rank00000.safetensors`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Place(NamedTuple):
    """Where the content of a rank begins. The first rank of a file also writes the `header` at its beginning."""

    name: str
    offset: int = 0
    header: bytes = b""


def rank_file(rank: int) -> str:
    """Returns the file name of a rank that is alone on its node."""
    return f"rank{rank:05d}.safetensors"


def places(sizes: Sequence[int], nodes: Sequence[int]) -> dict[int, Place]:
    """Returns the places of the ranks that have tensors. Args: sizes, nodes: bytes and number of the node, by rank."""
    ranks_of: dict[int, list[int]] = defaultdict(list)
    for rank, node in enumerate(nodes):
        if sizes[rank]:
            ranks_of[node].append(rank)
    found = {}
    for number, ranks in enumerate(ranks_of.values()):
        if len(ranks) == 1:
            found[ranks[0]] = Place(rank_file(ranks[0]))
            continue
        header, begin = {}, 0
        for rank in ranks:
            end = begin + sizes[rank]
            header[_key(rank)] = {"dtype": "U8", "shape": [sizes[rank]], "data_offsets": [begin, end]}
            begin = end
        before = header_bytes(header)
        for rank in ranks:
            begin = header[_key(rank)]["data_offsets"][0]
            found[rank] = Place(
                f"node{number:05d}.safetensors", len(before) + begin, before if rank == ranks[0] else b""
            )
    return found


def header_bytes(header: dict[str, Any]) -> bytes:
    """Returns the beginning of a safetensors file, padded so that the tensors are aligned."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class RankTensors:
    """The tensors of one rank in a shared file. Raises: ValueError or KeyError if they are damaged."""

    def __init__(self, file: Any, rank: int) -> None:
        """Args: file: a shared file, opened by safetensors."""
        self._content = file.get_slice(_key(rank))
        length = int.from_bytes(self._read(0, 8).numpy().tobytes(), "little")
        self._start = 8 + length
        self._header = json.loads(self._read(8, self._start).numpy().tobytes())

    def get_slice(self, name: str) -> _Slice:
        entry = self._header[name]
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        return _Slice(self, dtype, self._start + begin, (end - begin) // dtype.itemsize)

    def _read(self, begin: int, end: int) -> Tensor:
        return self._content[begin:end].clone()  # a copy: the bytes in the file may not be aligned for other types


class _Slice:
    """A flat tensor, of which parts are read by `tensor[begin:end]`."""

    def __init__(self, tensors: RankTensors, dtype: torch.dtype, start: int, length: int) -> None:
        self._tensors, self._dtype, self._start, self._length = tensors, dtype, start, length

    def __getitem__(self, part: slice) -> Tensor:
        begin, end, _ = part.indices(self._length)
        size = self._dtype.itemsize
        return self._tensors._read(self._start + begin * size, self._start + end * size).view(self._dtype)


def _key(rank: int) -> str:
    return f"rank{rank:05d}"
