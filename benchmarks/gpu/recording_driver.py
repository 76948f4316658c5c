"""A driver for Triton that launches nothing: it compiles kernels for a Hopper GPU and records their launches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

_devices = itertools.count(99)
"""Numbers of GPUs. Triton caches compiled kernels by GPU, so every driver has a number of its own."""
STREAM = 7


class _Utils:
    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[int, str, int, int, int]:
        return 1, name, 64, 0, 1024

    @staticmethod
    def unload_module(*_: Any) -> None:
        pass


class RecordingDriver:
    """A Hopper GPU. `launches` has the arguments of every launch, from the grid to the kernel's own, if `records`."""

    utils = _Utils

    def __init__(self, *, records: bool = True) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self._device = next(_devices)

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.signature = dict(source.signature)

            def __call__(launcher, *arguments: Any) -> None:
                if records:
                    self.launches.append((id(launcher), *arguments))

        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int | None = None) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def recorded(*, records: bool = True) -> Iterator[RecordingDriver]:
    """Makes Triton use a `RecordingDriver` in the body."""
    from univitar_ds.kernels import gpu

    active = RecordingDriver(records=records)
    gpu.forget()
    before = driver._active  # may be unset: `reset_active` would then look for a real driver
    driver.set_active(active)
    try:
        yield active
    finally:
        driver._active = before
        gpu.forget()
