"""Memory shared by the trainer and its decoding processes: a fixed number of slots for the pixels of packs.

The memory is an anonymous file. It is freed when the last process that maps it ends for any reason, and the size of
/dev/shm does not limit it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Protocol, Self

import numpy as np

_COUNTER = np.dtype(np.int64)


class PageLock(Protocol):
    """Locks memory of this process, so that a device can copy from it while the host continues."""

    def lock(self, address: int, size: int) -> bool:
        """Locks `size` bytes. Returns whether they are locked."""

    def unlock(self, address: int) -> None:
        """Unlocks the memory that was locked at `address`. May wait for copies from it."""


class SharedSlots:
    """Shared memory of `slots` slots of `slot_bytes` bytes, each with a counter. The pipeline assigns the slots."""

    def __init__(self, descriptor: int, slots: int, slot_bytes: int) -> None:
        """Maps an existing file. The object owns the descriptor, unless mapping fails."""
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._map: mmap.mmap | None = mmap.mmap(descriptor, _total(slots, slot_bytes))
        self._descriptor: int | None = descriptor
        self._locked: tuple[PageLock, int] | None = None

    @classmethod
    def create(cls, slots: int, slot_bytes: int) -> Self:
        """Allocates new memory. Pages use physical memory from the first write on."""
        assert min(slots, slot_bytes) > 0, (slots, slot_bytes)
        descriptor = _anonymous_file()
        try:
            os.ftruncate(descriptor, _total(slots, slot_bytes))
            return cls(descriptor, slots, slot_bytes)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def descriptor(self) -> int:
        """The file descriptor for another process, which maps it with the same sizes."""
        assert self._descriptor is not None, "the memory is closed"
        return self._descriptor

    def view(self, slot: int) -> np.ndarray:
        """Returns a (slot_bytes,) uint8 view of the slot."""
        assert self._map is not None, "the memory is closed"
        assert 0 <= slot < self.slots, slot
        return np.frombuffer(self._map, np.uint8, self.slot_bytes, _start(self.slots) + slot * self.slot_bytes)

    @property
    def done(self) -> np.ndarray:
        """A (slots,) int64 view of the counters: the number of finished items in each slot, which never decreases."""
        assert self._map is not None, "the memory is closed"
        return np.frombuffer(self._map, _COUNTER, self.slots)

    def lock(self, page_lock: PageLock) -> None:
        """Locks the slots in memory, if it is possible, until `close`. They then use physical memory from now on."""
        assert self._map is not None, "the memory is closed"
        start = _start(self.slots)
        address = np.frombuffer(self._map, np.uint8).ctypes.data + start
        if page_lock.lock(address, _total(self.slots, self.slot_bytes) - start):
            self._locked = page_lock, address

    def close(self) -> None:
        """Frees the memory once no view of it exists. May be called repeatedly."""
        if self._locked is not None:
            (page_lock, address), self._locked = self._locked, None
            page_lock.unlock(address)
        self._map = None
        descriptor, self._descriptor = self._descriptor, None  # first, because the number is reused after `os.close`
        if descriptor is not None:
            os.close(descriptor)


def _start(slots: int) -> int:
    """Returns the offset of the first slot, after the counters."""
    return -(-slots * _COUNTER.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE


def _total(slots: int, slot_bytes: int) -> int:
    return _start(slots) + slots * slot_bytes


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("univitar-slots", os.MFD_CLOEXEC)
    descriptor, path = tempfile.mkstemp(prefix="univitar-slots-")
    os.unlink(path)
    return descriptor
