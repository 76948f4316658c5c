"""Memory shared with decoding processes: both sides see writes, and it is freed completely."""

import os
import sys

import numpy as np
import pytest

from tests.support.paths import ROOT
from tests.support.progress import run_watched
from univitar_ds.data.decoding.shared_slots import SharedSlots


def test_slots_do_not_overlap():
    slots = SharedSlots.create(3, 5000)
    for slot in range(3):
        slots.view(slot)[:] = slot + 1
    assert [set(slots.view(slot)) for slot in range(3)] == [{1}, {2}, {3}]
    assert slots.view(1).shape == (5000,)
    slots.close()


def test_a_second_process_writes_into_the_same_memory():
    slots = SharedSlots.create(2, 100)
    write = f"SharedSlots({slots.descriptor}, 2, 100).view(1)[:3] = (7, 8, 9)"
    code = f"from univitar_ds.data.decoding.shared_slots import SharedSlots; {write}"
    root = str(ROOT)
    run_watched(
        [sys.executable, "-c", code], pass_fds=(slots.descriptor,), check=True, env={"PYTHONPATH": root}, text=False
    )
    assert slots.view(1)[:4].tolist() == [7, 8, 9, 0]
    assert not slots.view(0).any()
    slots.close()


def test_counters_are_shared_and_do_not_overlap_the_slots():
    slots = SharedSlots.create(3, 100)
    slots.done[2] += 1
    count = f"SharedSlots({slots.descriptor}, 3, 100).done[2] += 1"
    code = f"from univitar_ds.data.decoding.shared_slots import SharedSlots; {count}"
    root = str(ROOT)
    run_watched(
        [sys.executable, "-c", code], pass_fds=(slots.descriptor,), check=True, env={"PYTHONPATH": root}, text=False
    )
    assert slots.done.tolist() == [0, 0, 2]
    for slot in range(3):
        assert not slots.view(slot).any()
        slots.view(slot)[:] = 255
    assert slots.done.tolist() == [0, 0, 2]
    slots.close()


def test_the_memory_has_no_name_in_the_file_system():
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    slots = SharedSlots.create(1, 1 << 20)
    slots.view(0)[:] = 1
    target = os.readlink(f"/proc/self/fd/{slots.descriptor}")
    assert "deleted" in target
    assert (set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()) == before
    slots.close()


@pytest.mark.skipif(not __debug__, reason="python -O leaves asserts out")
def test_close_may_be_repeated_and_views_stay_valid():
    slots = SharedSlots.create(1, 10)
    view = slots.view(0)
    view[:] = 3
    slots.close()
    slots.close()
    assert np.array_equal(view, np.full(10, 3))
    with pytest.raises(AssertionError, match="closed"):
        slots.view(0)


@pytest.mark.skipif(not __debug__, reason="python -O leaves asserts out")
def test_a_slot_out_of_range_is_an_assertion_error():
    slots = SharedSlots.create(2, 10)
    for slot in (-1, 2):
        with pytest.raises(AssertionError):
            slots.view(slot)
    slots.close()
