"""How many packs of a rank run once, from the memory of the first steps of a stage."""

import logging

import pytest
import torch

from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.step import kept_packs
from univitar_ds.training.step.kept_packs import MEASURED_STEPS, KeptPacks

GB = 10**9
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class Device:
    """A device of 80 GB with `states` of a model, whose packs need `activations` until they have run."""

    def __init__(self, states: int, activations: list[int], size: int = 80 * GB) -> None:
        self.states, self.activations, self.size = states, activations, size
        self.highest = 10**12  # of something before

    def usable(self) -> int:
        return self.size

    def used(self) -> int:
        return self.states

    def peak(self) -> int:
        return self.highest

    def forget_peak(self) -> None:
        self.highest = self.states

    def run(self, step: int) -> None:
        self.highest = max(self.highest, self.states + self.activations[step % len(self.activations)])


def chosen(device: Device, packs: int, wanted="auto") -> list[int]:
    """The number of packs for each step of a stage."""
    kept, counts = KeptPacks(wanted, packs, ALONE, device), []
    for step in range(MEASURED_STEPS + 3):
        counts.append(kept.count)
        with kept.measured():
            device.run(step)
    return counts


@pytest.mark.parametrize(
    ("states", "activations", "packs", "count"),
    [
        (12, [20], 8, 3),  # 72 usable, 60 beside the states
        (12, [20], 2, 2),  # there are no more
        (12, [5, 20], 8, 3),  # the largest of the packs counts
        (12, [70], 8, 1),
        (60, [40], 8, 1),  # does not fit at all: a pack that runs twice needs as much
    ],
)
def test_as_many_packs_as_fit_with_the_states_run_once_after_the_measured_steps(states, activations, packs, count):
    device = Device(states * GB, [size * GB for size in activations])
    assert chosen(device, packs) == [1] * MEASURED_STEPS + [count] * 3


def test_all_ranks_keep_as_many_packs_as_fit_on_the_rank_with_the_least_memory(monkeypatch):
    monkeypatch.setattr(kept_packs, "gather_numbers", lambda numbers, _: torch.tensor([numbers, [2.0]]))
    assert chosen(Device(12 * GB, [10 * GB]), 8)[-1] == 2


def test_the_choice_is_logged_with_its_numbers(caplog):
    with caplog.at_level(logging.INFO):
        chosen(Device(12 * GB, [20 * GB]), 8)
    (said,) = caplog.messages
    assert said.startswith("3 of 8 packs of a rank run once in a step")
    assert "one pack needs 20.0 GB, and all else 12.0 of 72.0 GB" in said


@pytest.mark.parametrize(("wanted", "count"), [(0, 0), (1, 1), (3, 3), (9, 8)])
def test_a_number_is_kept_without_measuring(wanted, count):
    kept = KeptPacks(wanted, 8, ALONE, None)
    assert kept.count == count
    assert set(chosen(Device(GB, [GB]), 8, wanted)) == {count}


def test_auto_is_one_on_a_cpu_and_where_there_is_one_pack():
    assert KeptPacks("auto", 8, ALONE).count == 1
    assert set(chosen(Device(GB, [GB]), 1)) == {1}


def test_a_step_that_fails_is_not_measured():
    device = Device(12 * GB, [20 * GB])
    kept = KeptPacks("auto", 8, ALONE, device)
    for _ in range(MEASURED_STEPS):
        with pytest.raises(ValueError, match="the step"), kept.measured():
            raise ValueError("the step")
    assert kept.count == 1
