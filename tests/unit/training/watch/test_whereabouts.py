"""Which ranks the other ranks wait for, in one sentence."""

import pytest

from univitar_ds.training.watch.phases import CHECKPOINT, DATA, OPTIMIZER, STEP
from univitar_ds.training.watch.whereabouts import SILENT, Whereabouts, described, missing, ranges


def at(rank: int, phase: str = OPTIMIZER, call: str = "", calls: int = 41, **changes) -> Whereabouts:
    given = {"rank": rank, "host": f"node{rank // 8}", "section": STEP, "step": 12, "phase": phase} | changes
    return Whereabouts(**given, call=call, calls=calls)


def waiting(rank: int, **changes) -> Whereabouts:
    return at(rank, call="all_reduce", **changes)


HOSTS = [f"node{rank // 8}" for rank in range(10)]


def test_the_rank_that_is_in_no_call_is_missing():
    found = [at(rank, DATA) if rank == 3 else waiting(rank) for rank in range(10)]
    assert missing(found) == [3]
    assert described(found, HOSTS) == (
        "rank 3 on node0 is in data_wait of step 12; "
        "ranks 0-2, 4-9: each waits in all_reduce, optimizer of step 12, collective 41"
    )


def test_ranks_that_do_not_answer_are_missing_with_their_machines():
    found = [waiting(rank) for rank in range(8)] + [None, None]
    assert missing(found) == [8, 9]
    assert described(found, HOSTS).startswith(f"ranks 8-9 on node1: each {SILENT}; ranks 0-7: each waits in all_reduce")


def test_of_ranks_that_all_wait_the_one_with_fewer_calls_is_behind():
    found = [waiting(0), at(1, call="broadcast", calls=40), waiting(2)]
    assert missing(found) == [1]
    assert "rank 1 on node0 waits in broadcast" in described(found, HOSTS)


def test_a_rank_whose_device_waits_is_not_missing():
    """On a GPU the host is ahead: it waits for a number, and its device for the collective before it."""
    found = [at(0, on_device="nccl:all_reduce 7 of default_pg"), at(1)]
    assert missing(found) == [1]
    assert "with nccl:all_reduce 7 of default_pg not completed" in described(found, HOSTS)


def test_if_all_ranks_wait_in_the_same_call_no_rank_is_named():
    found = [waiting(0, section=CHECKPOINT), waiting(1, section=CHECKPOINT)]
    assert missing(found) == []
    assert described(found, HOSTS) == (
        "ranks 0-1: each waits in all_reduce, the checkpoint, collective 41; "
        "no rank is missing, so a network or a GPU does not answer"
    )


def test_a_rank_that_has_finished_is_not_missing():
    assert missing([at(0, DATA), at(1, ended=True)]) == [0]


@pytest.mark.parametrize(("ranks", "text"), [([4], "4"), ([0, 1, 2, 5], "0-2, 5"), ([0, 2, 3], "0, 2-3")])
def test_ranks_are_written_as_ranges(ranks, text):
    assert ranges(ranks) == text
