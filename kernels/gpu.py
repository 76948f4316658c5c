"""Properties of the GPU, and the launch of kernels on it.

At every launch Triton inspects every argument in Python, which takes as long as a small kernel runs. Its choice of a
compiled kernel depends only on the types of the arguments, on whether addresses and numbers are multiples of 16, and on
the constants. So compiled kernels are cached by these, and later launches call the launcher of a kernel directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

WIDE_CAPABILITIES = (9, 10)
"""Hopper and data-centre Blackwell: the tensor cores multiply 256 columns at once, and a program may have 227 KB of
shared memory. Workstation Blackwell (12) has neither, and is treated like Ampere."""
SYSTEM_BYTES = 1024
"""Bytes of a multiprocessor's shared memory that are reserved per program."""


class Limits(NamedTuple):
    """Properties of a GPU: the number of multiprocessors, the bytes of shared memory that one program may have, and
    whether the compute capability is one of `WIDE_CAPABILITIES`."""

    processors: int
    shared_bytes: int
    wide: bool


INTERPRETER = Limits(3, 163 * 1024, wide=False)
"""Limits without a GPU: those of an A100, but with so few multiprocessors that backward programs loop over rows."""


@cache
def limits(device: torch.device) -> Limits:
    """Returns the limits of a GPU; `INTERPRETER` for any other device."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_multiprocessor - SYSTEM_BYTES
    return Limits(properties.multi_processor_count, shared, wide=properties.major in WIDE_CAPABILITIES)


_HOOKS = triton.knobs.runtime
"""Has the hooks with which a profiler watches launches. Only Triton's own launch calls them."""


class Launcher(NamedTuple):
    """A compiled kernel on one GPU: its `run`, handle and packed metadata, and a function for the current stream."""

    run: Callable[..., None]
    function: Any
    metadata: Any
    stream_of: Callable[[int], int]


class Prepared:
    """A kernel with the constants of its launches. `prepared` keeps one for each set of constants."""

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options
        self.constants = tuple(options[name] for name in kernel.arg_names if name in options)
        self.launchers: dict[tuple[Any, ...], Launcher] = {}
        """Launchers by everything else on which Triton's choice of a kernel depends; empty in Triton's interpreter."""

    def launch(self, grid: tuple[int, ...], tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
        """Launches the kernel on the GPU of the first tensor; Triton alone would use the current GPU.

        Args: tensors, numbers: the kernel's arguments before its constants; the first tensor is not None.
        """
        key: list[Any] = []
        addresses = 0
        for tensor in tensors:
            if tensor is None:
                key.append(None)
            else:
                key.append(tensor.dtype)
                addresses |= tensor.data_ptr()
        for number in numbers:
            key.append(None if number.__class__ is float else _kind(number))
        if addresses % 16:
            key += [None if tensor is None else tensor.data_ptr() % 16 == 0 for tensor in tensors]
        device = tensors[0].get_device()
        key.append(device)
        launcher = self.launchers.get(tuple(key))
        if launcher is None or _HOOKS.launch_enter_hook.calls or _HOOKS.launch_exit_hook.calls:
            self._launch_by_triton(grid, tensors, numbers, tuple(key))
        elif device < 0 or device == torch.cuda.current_device():
            self._run(launcher, device, grid, tensors, numbers)
        else:
            with torch.cuda.device(device):
                self._run(launcher, device, grid, tensors, numbers)

    def _run(self, launcher: Launcher, device: int, grid: Any, tensors: Any, numbers: Any) -> None:
        run, function, metadata, stream_of = launcher
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, stream_of(device), function, metadata, None, None, None, *tensors, *numbers, *self.constants)

    def _launch_by_triton(self, grid: Any, tensors: Any, numbers: Any, key: tuple[Any, ...]) -> None:
        with torch.cuda.device_of(tensors[0]):
            compiled = self.kernel[grid](*tensors, *numbers, **self.options)
        if isinstance(compiled, CompiledKernel):
            stream_of = driver.active.get_current_stream
            self.launchers[key] = Launcher(compiled.run, compiled.function, compiled.packed_metadata, stream_of)


def _kind(number: int) -> int:
    """Returns a code of what Triton specialises a number on: whether it is 1 or a multiple of 16, and its width."""
    width = 0 if -(1 << 31) <= number < 1 << 31 else 4 if number < 1 << 63 else 8
    return (number == 1) + 2 * (number % 16 == 0) + width


_prepared: dict[tuple[Any, ...], Prepared] = {}


def prepared(kernel: Any, **options: Any) -> Prepared:
    """Returns the kernel with these constants and options of Triton such as `num_warps`; the same object each time."""
    key = kernel, *options.items()
    if key not in _prepared:
        _prepared[key] = Prepared(kernel, options)
    return _prepared[key]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches a kernel whose tensors come before its numbers, see `Prepared.launch`, with `options` of `prepared`."""
    count = next((n for n, value in enumerate(arguments) if isinstance(value, int | float)), len(arguments))
    prepared(kernel, **options).launch(grid, arguments[:count], arguments[count:])


def forget() -> None:
    """Clears all launchers, so that Triton chooses the compiled kernel of the next launch, as in a new process."""
    for kernel in _prepared.values():
        kernel.launchers.clear()
