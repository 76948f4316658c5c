"""Master weights and moments on a local disk, as ZeRO-3 keeps them with `offload_optimizer.device: nvme`.

DeepSpeed (0.19) keeps a file for each tensor of a sub-group, and reads the files of one sub-group at a time into memory
for its update. It reads and writes with direct I/O, which the page cache does not see. All other code gets tensors that
are mapped to these files: the kernel reads from the disk what is used, and drops it from memory when memory is needed.
Linux keeps mapped memory and direct I/O consistent on file systems of local disks; `OnDisk.check` compares them.

Gradients stay in host memory. DeepSpeed would write them to the disk too, and read back those of an earlier step for
parameters that a step does not use.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from univitar_ds.config.deepspeed import OFFLOADED_OPTIMIZER
from univitar_ds.config.paths import expand
from univitar_ds.errors import ConfigError, StorageError
from univitar_ds.formats.elastic import MASTER
from univitar_ds.locked_folder import LockedFolder
from univitar_ds.training.engine.lean.gradient_buckets import SHARES

PREFIX = "univitar-ds-nvme-"
"""Beginning of the names of the folders that ranks create."""
_CHECKED = 1024
"""Elements that `OnDisk.check` writes and reads."""


def folder_for(config: Mapping[str, Any]) -> LockedFolder:
    """Creates a folder for this rank's files in `nvme_path` of a DeepSpeed configuration with an optimizer on a disk.

    Raises: ConfigError if the folder `nvme_path` does not exist, cannot be written or has no direct I/O.
    """
    given = config["zero_optimization"][OFFLOADED_OPTIMIZER]["nvme_path"]
    key = f"{OFFLOADED_OPTIMIZER}.nvme_path"
    try:
        parent = Path(expand(given))
    except ConfigError as error:
        raise ConfigError(f"{key} names a folder on a local disk: {error}") from error
    if not parent.is_dir():
        raise ConfigError(f"{key} is {given}, and there is no folder {parent}; make it, on a local disk")
    try:
        folder = LockedFolder(parent, PREFIX)
    except OSError as error:
        raise ConfigError(
            f"{key} is {given}, and {parent} cannot be written ({error.strerror}); name a folder on a local disk"
        ) from error
    try:
        os.close(os.open(folder.path / "direct", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        folder.remove()
        raise ConfigError(
            f"{key} is {given}, whose file system has no direct I/O ({error.strerror}); name a folder on a local disk, "
            "which is not in memory"
        ) from error
    return folder


def with_folder(config: Mapping[str, Any], folder: LockedFolder, kinds: int) -> dict[str, Any]:
    """Returns a DeepSpeed configuration whose optimizer is on the disk in `folder`.

    Args: kinds: tensors of an element: master weight, moments and average. Each needs a buffer in memory.
    """
    zero = config["zero_optimization"]
    optimizer = zero[OFFLOADED_OPTIMIZER]
    buffers = max(kinds, optimizer.get("buffer_count", 0))
    optimizer = {**optimizer, "nvme_path": str(folder.path), "buffer_count": buffers}
    return {**config, "zero_optimization": {**zero, OFFLOADED_OPTIMIZER: optimizer}}


def check_space(folder: LockedFolder, size: float, ranks: int) -> None:
    """Raises: StorageError if the disk has less space than `ranks` ranks of this machine need, `size` bytes each."""
    free = shutil.disk_usage(folder.path).free
    if free < size * ranks:
        raise StorageError(
            f"{folder.path.parent} has {free / 1e9:.1f} GB free, and optimizer states and their copy for a checkpoint "
            f"need {size * ranks / 1e9:.1f} GB for {ranks} ranks of this machine; free some space, or name another "
            f"folder in {OFFLOADED_OPTIMIZER}.nvme_path"
        )


@dataclass
class _Mapped:
    """A file of DeepSpeed's, of which the first values are mapped to memory."""

    memory: mmap.mmap
    tensor: Tensor

    @classmethod
    def of(cls, path: str, length: int) -> _Mapped:
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), length * torch.float32.itemsize)
        return cls(memory, torch.frombuffer(memory, dtype=torch.float32))


@dataclass
class OnDisk:
    """The sub-groups of DeepSpeed's ZeRO-3 optimizer whose master weights and moments are on a disk.

    A sub-group of less than a megabyte stays in memory, as without a disk. `folder`: of this rank; it is removed with
    the files in it.
    """

    optimizer: Any
    folder: LockedFolder
    _mapped: dict[int, dict[str, _Mapped]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._keep_gradients()

    def __contains__(self, group: int) -> bool:
        return bool(self.optimizer._swappable_optimizer_subgroup(group))

    @property
    def groups(self) -> list[int]:
        """Indices of the sub-groups that are on the disk."""
        return [group for group in range(len(self.optimizer.fp32_partitioned_groups_flat)) if group in self]

    @contextmanager
    def in_memory(self, group: int) -> Iterator[None]:
        """Reads a sub-group into DeepSpeed's buffers during the body, and writes it back, with new states too."""
        self.optimizer._optimizer_states_and_gradient_swap_in(group)
        yield
        self.optimizer._optimizer_states_and_gradient_swap_out(group)

    def tensors(self, group: int) -> Mapping[str, Tensor]:
        """Returns master weights and states of a sub-group by name, mapped to the files. They stay valid."""
        if group not in self._mapped:
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
            names = {id(flat): MASTER} | {id(value): key for key, value in self.optimizer.optimizer.state[flat].items()}
            info = self.optimizer.optimizer_swapper.swap_params_info[flat.ds_id]
            self._mapped[group] = {
                names[id(one.compute_tensor)]: _Mapped.of(one.swap_path, info.numel()) for one in info.tensors
            }
        return {name: one.tensor for name, one in self._mapped[group].items()}

    def flush(self) -> None:
        """Writes what was written into `tensors` to the files. Must be called before DeepSpeed's next access."""
        for files in self._mapped.values():
            for one in files.values():
                one.memory.flush()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Returns this rank's flat share of a parameter's gradient."""
        return getattr(self.optimizer, SHARES)[parameter.ds_id]

    def after_update(self, function: Callable[[int], None]) -> None:
        """Calls `function` with the index of every sub-group, on the disk or not, after its update and before its
        states are written."""
        update = self.optimizer._optimizer_step

        def updated(group: int) -> None:
            update(group)
            function(group)

        self.optimizer._optimizer_step = updated

    @torch.no_grad()
    def check(self) -> None:
        """Writes into mapped memory and reads with direct I/O, and the reverse, in the first sub-group on the disk.

        Raises: ConfigError if the values differ, as they may on a network disk.
        """
        for group in self.groups[:1]:
            flat, mapped = self.optimizer.fp32_partitioned_groups_flat[group], self.tensors(group)[MASTER][:_CHECKED]
            before, written = mapped.clone(), torch.arange(float(len(mapped)))
            mapped.copy_(written)
            self.flush()
            with self.in_memory(group):
                equal = torch.equal(flat.data[:_CHECKED], written)
                flat.data[:_CHECKED] = before
            if not (equal and torch.equal(mapped, before)):
                raise ConfigError(
                    f"{self.folder.path.parent} is on a file system whose mapped memory and direct I/O differ; name a "
                    f"folder on a local disk (ext4, xfs, btrfs) in {OFFLOADED_OPTIMIZER}.nvme_path"
                )

    def close(self) -> None:
        """Frees DeepSpeed's buffers and removes the folder. Tensors that were returned must not be used afterwards."""
        self.optimizer.optimizer_swapper = None  # its buffers are page-locked and are freed with it
        self._mapped.clear()
        self.folder.remove()

    def _keep_gradients(self) -> None:
        """Makes the update of a sub-group read its gradient where the backward passes have added it up."""
        optimizer = self.optimizer
        read, copied = optimizer._optimizer_states_and_gradient_swap_in, optimizer._offload_grad_partition_at_boundary
        begin, spans = 0, []
        for numel in optimizer.fp16_partitioned_groups_flat_numel:
            spans.append((begin, numel))
            begin += numel

        def swap_in(group: int, timer_names: Any = None) -> None:
            read(group, timer_names)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            flat.grad = optimizer.grad_partitions_flat_buffer.narrow(0, *spans[group]).to(flat.dtype)

        def at_boundary(parameter: nn.Parameter, gradient: Tensor, *swapped: Any) -> None:
            group, *_ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            if group not in self:
                copied(parameter, gradient, *swapped)
                return
            norm = optimizer._constant_buffered_norm2(gradient)
            optimizer.norm_for_param_grads[optimizer.get_param_id(parameter)] = norm

        optimizer._optimizer_states_and_gradient_swap_in = swap_in
        optimizer._offload_grad_partition_at_boundary = at_boundary
