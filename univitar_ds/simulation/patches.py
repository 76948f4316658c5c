"""What torch and DeepSpeed need to run on a simulated GPU, each with its reason."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from univitar_ds.simulation.gpu import SimulatedGPU

FIRST_ADDRESS = 1 << 52
"""As in `cuda_driver.c`."""
_data = Tensor.data
_tolist = Tensor.tolist


def patch_torch(gpu: SimulatedGPU) -> None:
    """Makes the parts of torch that do not go through its dispatcher work on tensors of the simulated GPU."""

    def set_data(self: FakeTensor, value: Tensor) -> None:
        _data.__set__(self, value)
        self.fake_device = value.device  # the device is an attribute that the assignment does not change

    FakeTensor.data = property(_data.__get__, set_data)

    def tolist(self: Tensor) -> Any:  # reads the memory directly
        return _tolist(self.cpu() if isinstance(self, FakeTensor) else self)

    Tensor.tolist = FakeTensor.tolist = tolist
    # Triton specializes kernels by the alignment of addresses, and torch aligns allocations to 512 bytes. The stub of
    # the driver recognizes addresses of the device by their size.
    FakeTensor.data_ptr = lambda self: (
        FIRST_ADDRESS + 512 * self.untyped_storage()._cdata % FIRST_ADDRESS + self.storage_offset() * self.itemsize
        if self.device.type == "cuda"
        else 16
    )

    def apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        # As torch does for real tensors. For tensors without data it would swap them, which hooks do not allow.
        for child in self.children() if recurse else ():
            child._apply(function)
        for parameter in self._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    parameter.data = function(parameter)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = function(buffer)
        return self

    nn.Module._apply = apply

    for owner, name in (
        (torch.cuda, "synchronize"),
        (torch.cuda.Stream, "synchronize"),
        (torch.cuda.Event, "synchronize"),
    ):
        setattr(owner, name, lambda *_, name=f"{owner.__name__}.{name}": gpu.waits(name))


def without_data(model: nn.Module, gpu: SimulatedGPU) -> None:
    """Replaces a model's parameters and buffers on the host by tensors without data, in place.

    torch and DeepSpeed assign tensors of the device to a parameter's `data`, which must be of the same class.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, FakeTensor):
            tensor.constant = None  # torch keeps a value on the host there, and with it the device
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                with gpu.fake:
                    fake = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype)
                fake._is_param = True  # the mark of an nn.Parameter of another class; Parameter(fake) cannot be swapped
                fake.requires_grad_(parameter.requires_grad)
                torch.utils.swap_tensors(parameter, fake)


def patch_deepspeed() -> None:
    """Disables the parts of DeepSpeed that need other ranks. Must be called after DeepSpeed is imported."""
    from deepspeed.runtime.zero import (
        partition_parameters,
        partitioned_param_coordinator,
        stage3,
        utils,
    )

    for module in (utils, partition_parameters, partitioned_param_coordinator, stage3):
        # They compare values of this rank with those of ranks that do not answer.
        for name in ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"):
            if hasattr(module, name):
                setattr(module, name, lambda *_: None)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiles an operation for CPU ranks


@contextmanager
def world(size: int) -> Iterator[None]:
    """Makes this process rank 0 of a fake process group of `size` ranks, in which every collective succeeds."""
    import torch.testing._internal.distributed.fake_pg  # registers the back end  # noqa: F401

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        if "deepspeed" in sys.modules:
            sys.modules["deepspeed.comm.comm"].cdb = None  # its references to the group that was destroyed
            groups = sys.modules["deepspeed.utils.groups"]
            for name in vars(groups):
                if name.endswith("_GROUP"):
                    setattr(groups, name, None)


@contextmanager
def launches_counted(gpu: SimulatedGPU) -> Iterator[None]:
    """Counts the launches of Triton's kernels, by Triton and by cached launchers, and checks their tensors.

    Both use Triton's own launcher.
    """
    from triton.runtime.jit import JITFunction

    from univitar_ds.kernels.gpu import Prepared

    run, run_kept = JITFunction.run, Prepared._run

    def check(kernel: Any, arguments: Iterable[Any]) -> None:
        # A kernel reads contiguous rows, and ignores strides unless it gets the stride of the rows as an argument.
        values = list(arguments)
        strides = {value for value in values if isinstance(value, int)}
        for tensor in (value for value in values if isinstance(value, Tensor)):
            within = [math.prod(tensor.shape[axis + 1 :]) for axis in range(1, tensor.ndim)]
            rows_apart = tensor.ndim > 1 and list(tensor.stride()[1:]) == within and tensor.stride(0) in strides
            if not tensor.is_contiguous() and not rows_apart:
                raise RuntimeError(f"{kernel.__name__} gets a tensor {list(tensor.shape)} of strides {tensor.stride()}")

    def count(kernel: Any) -> None:
        gpu.record.launches[f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"] += 1

    def counted(kernel: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        check(kernel, (*arguments, *options.values()))
        if not warmup:
            count(kernel)
        return run(kernel, *arguments, warmup=warmup, **options)

    def counted_kept(prepared: Any, launcher: Any, device: int, grid: Any, tensors: Any, numbers: Any) -> None:
        check(prepared.kernel, (*tensors, *numbers))
        count(prepared.kernel)
        run_kept(prepared, launcher, device, grid, tensors, numbers)

    with mock.patch.object(JITFunction, "run", counted), mock.patch.object(Prepared, "_run", counted_kept):
        yield
