"""Memory shared with decoding processes: what one side writes the other sees, and nothing is left behind."""

import os
import sys

import numpy as np
import pytest

from tests.support.paths import ROOT
from tests.support.progress import run_watched
from univitar_ds.data.decoding.shared_slots import SharedSlots


def test_slots_are_separate_pieces_of_the_same_memory():
    ring = SharedSlots.create(3, 5000)
    for slot in range(3):
        ring.view(slot)[:] = slot + 1
    assert [set(ring.view(slot)) for slot in range(3)] == [{1}, {2}, {3}]
    assert ring.view(1).shape == (5000,)
    ring.close()


def test_a_second_process_writes_into_the_same_memory():
    ring = SharedSlots.create(2, 100)
    write = f"SharedSlots({ring.descriptor}, 2, 100).view(1)[:3] = (7, 8, 9)"
    code = f"from univitar_ds.data.decoding.shared_slots import SharedSlots; {write}"
    root = str(ROOT)
    run_watched(
        [sys.executable, "-c", code], pass_fds=(ring.descriptor,), check=True, env={"PYTHONPATH": root}, text=False
    )
    assert ring.view(1)[:4].tolist() == [7, 8, 9, 0]
    assert not ring.view(0).any()
    ring.close()


def test_counters_are_beside_the_slots_and_shared_like_them():
    ring = SharedSlots.create(3, 100)
    ring.done[2] += 1
    count = f"SharedSlots({ring.descriptor}, 3, 100).done[2] += 1"
    code = f"from univitar_ds.data.decoding.shared_slots import SharedSlots; {count}"
    root = str(ROOT)
    run_watched(
        [sys.executable, "-c", code], pass_fds=(ring.descriptor,), check=True, env={"PYTHONPATH": root}, text=False
    )
    assert ring.done.tolist() == [0, 0, 2]
    for slot in range(3):
        assert not ring.view(slot).any()
        ring.view(slot)[:] = 255
    assert ring.done.tolist() == [0, 0, 2]
    ring.close()


def test_the_memory_has_no_name_that_could_be_left_behind():
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    ring = SharedSlots.create(1, 1 << 20)
    ring.view(0)[:] = 1
    target = os.readlink(f"/proc/self/fd/{ring.descriptor}")
    assert "deleted" in target
    assert (set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()) == before
    ring.close()


@pytest.mark.skipif(not __debug__, reason="python -O leaves asserts out")
def test_closing_twice_is_fine_and_a_view_outlives_it():
    ring = SharedSlots.create(1, 10)
    view = ring.view(0)
    view[:] = 3
    ring.close()
    ring.close()
    assert np.array_equal(view, np.full(10, 3))
    with pytest.raises(AssertionError, match="closed"):
        ring.view(0)


@pytest.mark.skipif(not __debug__, reason="python -O leaves asserts out")
def test_a_slot_beyond_the_ring_is_a_fault_of_the_program():
    ring = SharedSlots.create(2, 10)
    for slot in (-1, 2):
        with pytest.raises(AssertionError):
            ring.view(slot)
    ring.close()
