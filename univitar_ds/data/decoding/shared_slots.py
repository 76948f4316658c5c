"""Memory shared by the trainer and its decoding processes: a fixed number of slots for the pixels of packs.

The memory is an anonymous file. It has no name that could be left behind, it is gone with the last process that
holds it however that process ends, and its size is not bounded by what is mounted on /dev/shm.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Self

import numpy as np

_COUNTER = np.dtype(np.int64)


class SharedSlots:
    """`slots` pieces of `slot_bytes` bytes each, and a counter for each.

    Who may write to which slot is the pipeline's business.
    """

    def __init__(self, descriptor: int, slots: int, slot_bytes: int) -> None:
        """Map an existing file; the object then owns the descriptor, unless mapping fails."""
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._map: mmap.mmap | None = mmap.mmap(descriptor, _total(slots, slot_bytes))
        self._descriptor: int | None = descriptor

    @classmethod
    def create(cls, slots: int, slot_bytes: int) -> Self:
        """New memory; pages take memory when they are first written."""
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
        """To hand to another process, which maps it with the same sizes."""
        assert self._descriptor is not None, "the memory is closed"
        return self._descriptor

    def view(self, slot: int) -> np.ndarray:
        """(slot_bytes,) uint8 over the slot itself, not a copy."""
        assert self._map is not None, "the memory is closed"
        assert 0 <= slot < self.slots, slot
        return np.frombuffer(self._map, np.uint8, self.slot_bytes, _start(self.slots) + slot * self.slot_bytes)

    @property
    def done(self) -> np.ndarray:
        """(slots,) int64 over the counters themselves: items of the slot that are done, never falling."""
        assert self._map is not None, "the memory is closed"
        return np.frombuffer(self._map, _COUNTER, self.slots)

    def close(self) -> None:
        """Give the memory back once the last view is gone. Safe to call again."""
        self._map = None
        descriptor, self._descriptor = self._descriptor, None  # taken first: its number may soon be another file's
        if descriptor is not None:
            os.close(descriptor)


def _start(slots: int) -> int:
    """The byte where the first slot begins, behind the counters."""
    return -(-slots * _COUNTER.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE


def _total(slots: int, slot_bytes: int) -> int:
    return _start(slots) + slots * slot_bytes


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("univitar-slots", os.MFD_CLOEXEC)
    descriptor, path = tempfile.mkstemp(prefix="univitar-slots-")
    os.unlink(path)
    return descriptor
