"""Copies pixels to the GPU while it computes earlier packs.

The decoding processes write pixels into shared memory. It is registered with the CUDA runtime, so that a copy needs no
intermediate page-locked buffer, for which the host would wait. Copies run on a stream of their own; the computing
stream waits for an event after each copy, and the pixels stay in host memory until the event has completed. Not yet run
on a GPU.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class CudaPageLock:
    """Registers memory with the CUDA runtime, as a `data.decoding.shared_slots.PageLock`.

    Args: runtime: an object with the functions of `torch.cuda.cudart()`; None: the result of that call.
    """

    def __init__(self, runtime: Any = None) -> None:
        self._runtime = runtime

    def lock(self, address: int, size: int) -> bool:
        """Registers `size` bytes. Returns False, with a warning, if the runtime refuses them."""
        error = int(self._cudart().cudaHostRegister(address, size, 0))
        if error:
            logger.warning(
                "the CUDA runtime cannot register %.1f GB of pixels (error %d), and copies of pixels wait for the GPU; "
                "see `ulimit -l`, or lower data.prefetch_packs",
                size / 1e9,
                error,
            )
        return not error

    def unlock(self, address: int) -> None:
        """Unregisters memory that `lock` has registered."""
        self._cudart().cudaHostUnregister(address)

    def _cudart(self) -> Any:
        return torch.cuda.cudart() if self._runtime is None else self._runtime


class Upload:
    """Copies pixels to one GPU. `upload_to` returns the object of a GPU.

    Args: cuda: a module with the streams and events of `torch.cuda`.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self._cuda = device, cuda
        self._stream = cuda.Stream(device)
        self._pending: list[tuple[Any, Tensor]] = []

    def __call__(self, host: Tensor) -> Tensor:
        """Returns a copy of `host` on the GPU, which the current stream may use. Does not wait for the GPU."""
        self.release()
        computing = self._cuda.current_stream(self.device)
        with self._cuda.stream(self._stream):
            copy = host.to(self.device, non_blocking=True)
            copied = self._cuda.Event()
            copied.record(self._stream)
        computing.wait_event(copied)
        copy.record_stream(computing)  # its memory is reused only after the computation
        self._pending.append((copied, host))
        return copy

    def release(self) -> None:
        """Frees the pixels whose copies are done."""
        self._pending = [(copied, host) for copied, host in self._pending if not copied.query()]


@cache
def upload_to(device: torch.device) -> Upload:
    """Returns the only `Upload` of a GPU."""
    return Upload(device)


def pixels_on(device: torch.device, host: Tensor) -> Tensor:
    """Returns pixels on `device`. A copy to a GPU runs while the GPU computes; on a CPU nothing is copied."""
    return upload_to(device)(host) if device.type == "cuda" else host.to(device, non_blocking=True)


def release_pixels(device: torch.device) -> None:
    """Frees the memory of copied pixels at the end of a step, so that the loader can fill it again."""
    if device.type == "cuda":
        upload_to(device).release()
