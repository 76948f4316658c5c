"""Work of rank 0 for whose end the other ranks wait."""

import os
import time
from datetime import timedelta

import pytest
from torch.distributed import distributed_c10d

from tests.support.distributed import run_distributed
from univitar_ds.errors import DataError, UserError
from univitar_ds.training.distributed import process_group
from univitar_ds.training.distributed.ports import free_ports
from univitar_ds.training.distributed.process_group import (
    PEER_TIMEOUT,
    PeerFailure,
    all_ranks_or_none,
    rank_zero_first,
    start_world,
)

pytestmark = pytest.mark.distributed


def start_with_store_at_rank_0(port: int):
    """As under `srun` and DeepSpeed's launcher: the store ends with rank 0."""
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    os.environ["MASTER_PORT"] = str(port)
    return start_world()


def slow_work() -> list[str]:
    world = start_world()
    with all_ranks_or_none(world):  # all ranks have started, however busy the machine is
        pass
    distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    done: list[str] = []

    def work() -> None:
        time.sleep(4)
        done.append("work")

    rank_zero_first(world, work)
    rank_zero_first(world, lambda: done.append("more"))
    distributed_c10d._set_pg_timeout(PEER_TIMEOUT)
    with all_ranks_or_none(world):  # the process group still works
        pass
    return done


def test_other_ranks_wait_for_longer_than_the_timeout_of_a_collective():
    assert run_distributed(slow_work, 3) == [["work", "more"], [], []]


def failing_work(port: int) -> tuple[str, str]:
    world = start_with_store_at_rank_0(port)
    process_group.HEARD_TIMEOUT = PEER_TIMEOUT  # on a busy machine a rank may be late to read the result

    def work() -> None:
        raise DataError("shard-7.tar is cut at byte 512")

    try:
        rank_zero_first(world, work)
    except (DataError, PeerFailure) as error:
        return type(error).__name__, str(error)
    return "", ""


def test_an_error_of_rank_0_reaches_all_ranks_before_its_store_ends():
    own, *others = run_distributed(failing_work, 3, free_ports()[0])
    assert own == ("DataError", "shard-7.tar is cut at byte 512")
    assert others == [("PeerFailure", "rank 0 ended the run: shard-7.tar is cut at byte 512")] * 2


def rank_0_goes(port: int) -> str:
    world = start_with_store_at_rank_0(port)
    store = distributed_c10d._get_default_store()
    if world.is_main:
        store.wait(["joined"], PEER_TIMEOUT)  # ranks join one after the other, and need the store until then
        return ""  # the process ends
    store.set("joined", "")
    try:
        rank_zero_first(world, lambda: None)
    except UserError as error:
        return str(error)
    return "no error"


def test_other_ranks_do_not_wait_for_a_rank_0_that_has_ended():
    assert "rank 0 ended without a message" in run_distributed(rank_0_goes, 2, free_ports()[0])[1]


def endless_work() -> str:
    world = start_world()
    process_group.SLICE = timedelta(seconds=0.2)
    store = distributed_c10d._get_default_store()
    try:  # rank 0 works until the other rank has given up, and then ends without an error
        rank_zero_first(world, lambda: store.wait(["gave up"], PEER_TIMEOUT), timeout=timedelta(seconds=1))
    except UserError as error:
        store.set("gave up", "")
        return str(error)
    return ""


def test_other_ranks_give_up_when_rank_0_exceeds_the_limit():
    first, other = run_distributed(endless_work, 2)
    assert first == ""
    assert other.startswith("rank 0 has been preparing the run for longer than 0:00:01 (limit)")
