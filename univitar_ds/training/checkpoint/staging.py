"""Copies tensors to host memory as the bytes of a safetensors file, for a thread that writes them while training
changes the tensors.

`safetensors.torch.save` writes the same bytes, but holds the GIL and copies each tensor once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from univitar_ds.formats.checkpoint.shared_file import DTYPES, header_bytes
from univitar_ds.training.distributed.process_group import World

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


FILE = "checkpoint"
"""File of a copy on a disk."""


class Staging:
    """Host memory for the tensors that this rank saves; on a GPU page-locked, for fast copies.

    The memory is kept for the next copy, since allocating it takes as long as the copy. A training state on a disk is
    copied to a file there, which is mapped to memory, since host memory may not hold it.
    """

    def __init__(self, world: World) -> None:
        self._cuda = world.device.type == "cuda"
        self._memory: Tensor | None = None
        self._folder: Path | None = None

    def copy(self, tensors: Mapping[str, Tensor], folder: Path | None = None) -> memoryview:
        """Returns the content of a safetensors file with these tensors, valid until the next call.

        The tensors may change as soon as it returns.
        Args: folder: of the file to which they are copied; None: to host memory.
        """
        # As safetensors orders them: tensors of larger elements first, so that each one is aligned.
        order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        header, begin = {}, 0
        for name in order:
            tensor, end = tensors[name], begin + tensors[name].nbytes
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            begin = end
        before = header_bytes(header)
        start = len(before)
        memory = self._of(start + begin, folder)
        content = memoryview(memory.numpy())
        content[:start] = before
        for name in order:
            tensor = tensors[name].detach()
            into = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            into.copy_(tensor, non_blocking=self._cuda)
            start += tensor.nbytes
        if self._cuda:
            torch.cuda.current_stream().synchronize()  # the next step changes the tensors
        return content

    def _of(self, size: int, folder: Path | None) -> Tensor:
        if self._memory is None or len(self._memory) < size or folder != self._folder:
            self._memory, self._folder = None, folder  # frees the old memory before the allocation
            if folder is None:
                self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
            else:
                self._memory = torch.from_file(str(folder / FILE), shared=True, size=size, dtype=torch.uint8)
        return self._memory[:size]
