"""An error on one rank ends all ranks within seconds, although they wait for it in a collective and it hangs itself."""

import os
import subprocess
import sys

import pytest
import torch

from tests.support.distributed import RankFailed, run_distributed
from tests.support.paths import ROOT
from tests.support.progress import output_of
from tests.support.runs import small_config, train_rank
from tests.support.shards import write_demo_shards
from univitar_ds.run import create_run
from univitar_ds.training.distributed.ports import free_ports

pytestmark = pytest.mark.distributed

BODY = """
import sys, threading
import torch, torch.distributed as dist
from univitar_ds.errors import DataError
from univitar_ds.training.distributed.alarm import ending_together
from univitar_ds.training.distributed.process_group import all_ranks_or_none, start_world

world, failing, kind = start_world(), int(sys.argv[1]), sys.argv[2]
try:
    with ending_together(world):
        dist.all_reduce(torch.ones(1))
        with all_ranks_or_none(world):
            if kind == "known" and world.rank == failing:
                raise DataError("shard-7.tar is cut")
        if world.rank == failing:
            raise {"memory": torch.OutOfMemoryError, "data": DataError}[kind]("tried to allocate 7 GiB")
        dist.all_reduce(torch.ones(1))  # waits for the rank that failed
        print("not reached")
except Exception as error:
    print(type(error).__name__, error, flush=True)
    if kind == "known":
        sys.exit(7)
    threading.Event().wait()  # as a rank whose closing hangs: its connections stay open
"""


def start(rank: int, port: int, *arguments: str) -> subprocess.Popen:
    group = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in group.items()} | {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", BODY, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, cwd=ROOT, **pipes)


def ended(failing: int, kind: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of the rank that does not fail and, if it ends, of the failing one."""
    port = free_ports()[0]
    ranks = [start(rank, port, str(failing), kind) for rank in (0, 1)]
    waiting = ranks[1 - failing]
    try:
        out, err = output_of(waiting, f"rank {1 - failing}")
        found = [(waiting.returncode, out, err)]
        if kind == "known":
            found.append((ranks[failing].wait(), *output_of(ranks[failing], f"rank {failing}")))
        return found
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_a_rank_that_is_out_of_memory_ends_the_first_rank_which_names_it():
    ((code, out, err),) = ended(1, "memory")
    assert (code, out) == (1, "")
    assert "error: rank 1 on " in err
    assert "ended the run: OutOfMemoryError: tried to allocate 7 GiB" in err
    assert "Traceback" not in err


def out_of_memory_in_a_step(run):
    """The second rank is out of memory in its first step. The error of the first rank is written to a file."""
    from univitar_ds.training import loop
    from univitar_ds.training.distributed import alarm

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nand more")

    if os.environ["RANK"] == "1":
        loop.train_step = no_memory
    alarm.say = (run / "said.txt").write_text
    train_rank(run)


@pytest.mark.slow
def test_a_step_without_memory_ends_the_run_with_the_rank_the_step_and_a_remedy(tmp_path):
    run = create_run(small_config(write_demo_shards(tmp_path / "shards"), tmp_path), "test", 2)
    with pytest.raises(RankFailed):
        run_distributed(out_of_memory_in_a_step, 2, run)
    said = (run / "said.txt").read_text()
    for part in ("error: rank 1 on ", "step 1, stage images", "lower its token_budget (96)", "Tried to allocate 7 GiB"):
        assert part in said
    assert "and more" not in said


@pytest.mark.slow
def test_an_error_of_the_first_rank_ends_the_others_with_its_exit_code():
    ((code, out, _),) = ended(0, "data")
    assert (code, out) == (2, "")


@pytest.mark.slow
def test_an_error_that_reaches_all_ranks_is_raised_on_all():
    (first, second) = ended(1, "known")
    assert first[:2] == (7, "PeerFailure rank 1 ended the run: shard-7.tar is cut\n")
    assert second[:2] == (7, "DataError shard-7.tar is cut\n")
