"""Which rank is slow, and when it is reported."""

import pytest
import torch

from univitar_ds.training.watch.phases import BACKWARD, COLLECTIVES, DATA, FORWARD, PHASES
from univitar_ds.training.watch.slow_ranks import SPAN_S, WINDOWS, SlowRanks, per_step, slow_rank, times_over_ranks


def table(*ranks: dict[str, float]) -> torch.Tensor:
    """Seconds a step: ranks that all take as long as the slowest, and wait for it in collectives."""
    longest = max(sum(rank.values()) for rank in ranks)
    rows = [[rank.get(name, 0.0) for name in PHASES] for rank in ranks]
    found = torch.tensor(rows, dtype=torch.float64)
    found[:, PHASES.index(COLLECTIVES)] = longest - found.sum(1)
    return found


EVEN = {DATA: 0.01, FORWARD: 1.0, BACKWARD: 2.0}


def test_the_rank_that_others_wait_for_is_found_with_its_phase():
    found = slow_rank(table(EVEN, EVEN, EVEN | {DATA: 1.5}, EVEN))
    assert (found.rank, found.phase, found.phase_s, found.others_s) == (2, DATA, 1.5, 0.01)
    assert slow_rank(table(EVEN | {BACKWARD: 3.5}, EVEN)).phase == BACKWARD


@pytest.mark.parametrize(
    "ranks",
    [
        [EVEN],
        [EVEN, EVEN],
        [EVEN, EVEN | {FORWARD: 1.5}],  # 17 % more: packs that differ
        [EVEN, EVEN, EVEN | {BACKWARD: 2.6}, EVEN | {FORWARD: 1.6}],
    ],
)
def test_ranks_that_differ_little_do_not_stand_out(ranks):
    assert slow_rank(table(*ranks)) is None


def test_a_large_ratio_of_a_small_part_of_the_step_does_not_stand_out():
    """Steps that mostly wait for the network: the wait is the same for all."""
    seconds = table({FORWARD: 0.01}, {FORWARD: 0.02})
    seconds[:, PHASES.index(COLLECTIVES)] += 1.0
    assert slow_rank(seconds) is None


SLOW = table(EVEN, EVEN | {FORWARD: 3.0})
LONG = SPAN_S / WINDOWS  # steps of a window: a step takes more than a second


def test_a_rank_is_reported_once_after_enough_windows_in_a_row_and_again_after_a_pause():
    ranks = SlowRanks()
    found = [ranks.event(step, SLOW, LONG) for step in range(1, WINDOWS + 3)]
    assert [event is not None for event in found] == [False] * (WINDOWS - 1) + [True, False, False]
    assert found[WINDOWS - 1] == {
        "step": WINDOWS, "event": "slow_rank", "rank": 1, "phase": FORWARD, "phase_s": 3.0, "others_s": 1.0,
    }  # fmt: skip
    assert ranks.event(9, table(EVEN, EVEN), LONG) is None
    assert [ranks.event(10 + n, SLOW, LONG) is not None for n in range(WINDOWS)] == [False] * (WINDOWS - 1) + [True]


def test_windows_of_different_ranks_or_phases_do_not_add_up():
    ranks = SlowRanks()
    other = table(EVEN | {BACKWARD: 5.0}, EVEN)
    assert all(ranks.event(step, (SLOW, other)[step % 2], LONG) is None for step in range(4 * WINDOWS))


def test_short_windows_are_not_enough():
    ranks = SlowRanks()
    step_s = float(SLOW.sum(1).mean())
    enough = int(SPAN_S / step_s) + 1
    assert [ranks.event(step, SLOW, 1) is not None for step in range(enough)] == [False] * (enough - 1) + [True]


def test_the_times_of_a_line_are_a_step_s_and_mean_and_maximum_times_over_ranks():
    taken = torch.tensor([[2.0, *range(2, 14, 2)], [4.0, *range(12, 36, 4)]], dtype=torch.float64)
    times = times_over_ranks(per_step(taken))
    assert times["data_wait_s"] == 2.0  # 1 and 3
    assert times["data_wait_max_s"] == 3.0
    assert times["forward_max_s"] == 4.0
    assert list(times) == [f"{name}{kind}_s" for name in PHASES for kind in ("", "_max")]
    assert per_step(torch.zeros(2, 1 + len(PHASES))) is None
