"""Copies of pixels to a GPU, on fakes that record the order of CUDA calls."""

import gc
import logging
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from univitar_ds.data.decoding.shared_slots import SharedSlots
from univitar_ds.training.step.upload import CudaPageLock, Upload

CPU = torch.device("cpu")


class Cuda:
    """Streams and events that record what is asked for in `log`; an event happens when `done` is set."""

    def __init__(self):
        cuda = self
        self.log, self.events, self.running = [], [], "compute"

        class Stream:
            def __init__(self, device, name="copies"):
                self.name = name

            def wait_event(self, event):
                cuda.log.append(("waits", self.name, event.number))

        class Event:
            def __init__(self):
                self.number, self.done = len(cuda.events), False
                cuda.events.append(self)

            def record(self, stream):
                cuda.log.append(("event", stream.name, self.number))

            def query(self):
                return self.done

        self.Stream, self.Event = Stream, Event

    def current_stream(self, device):
        return self.Stream(device, self.running)

    @contextmanager
    def stream(self, stream):
        before, self.running = self.running, stream.name
        yield
        self.running = before


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    to = torch.Tensor.to

    def copied(tensor, *arguments, **options):
        assert options["non_blocking"]
        cuda.log.append(("copy", cuda.running))
        return to(tensor, *arguments, **options).clone()

    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: cuda.log.append(("kept", stream.name)))
    return cuda


def test_a_copy_has_its_own_stream_and_its_slot_is_kept_until_the_event_is_complete(cuda):
    upload, slots, freed = Upload(CPU, cuda), SharedSlots.create(2, 64), []
    for slot in range(2):
        room = slots.view(slot)
        room[:] = slot
        weakref.finalize(room, freed.append, slot)
        copy = upload(torch.from_numpy(room[:10]))
        assert copy.tolist() == [slot] * 10
    assert cuda.log == [
        ("copy", "copies"), ("event", "copies", 0), ("waits", "compute", 0), ("kept", "compute"),
        ("copy", "copies"), ("event", "copies", 1), ("waits", "compute", 1), ("kept", "compute"),
    ]  # fmt: skip
    del room
    gc.collect()
    upload.release()
    assert freed == [], "a slot was freed before its copy was done"
    cuda.events[0].done = True
    upload.release()
    assert freed == [0]
    cuda.events[1].done = True
    upload.release()
    assert freed == [0, 1]


class Runtime:
    def __init__(self, error=0):
        self.error, self.calls = error, []

    def cudaHostRegister(self, address, size, flags):
        self.calls.append(("register", address, size, flags))
        return self.error

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))
        return 0


def test_the_slots_are_registered_from_the_first_to_the_last_byte_and_unregistered_once():
    runtime, slots = Runtime(), SharedSlots.create(3, 100)
    slots.lock(CudaPageLock(runtime))
    (_, address, size, flags), *_ = runtime.calls
    assert (address, size, flags) == (slots.view(0).ctypes.data, 300, 0)
    assert np.all(slots.view(2) == 0)
    slots.close()
    slots.close()
    assert runtime.calls[1:] == [("unregister", address)]


def test_memory_that_cannot_be_registered_is_used_unregistered(caplog):
    runtime, slots = Runtime(error=2), SharedSlots.create(1, 8)
    with caplog.at_level(logging.WARNING):
        slots.lock(CudaPageLock(runtime))
    assert "error 2" in caplog.text
    assert "ulimit -l" in caplog.text
    slots.close()
    assert len(runtime.calls) == 1
