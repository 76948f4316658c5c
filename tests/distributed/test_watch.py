"""In a run of two ranks, a slow rank is named, and a rank that hangs ends the run."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.support.distributed import run_distributed
from tests.support.paths import ROOT
from tests.support.progress import output_of
from tests.support.runs import metrics, small_config, train_rank
from tests.support.shards import write_demo_shards
from univitar_ds.run import create_run
from univitar_ds.training.distributed.ports import free_ports
from univitar_ds.training.watch import phases, watching
from univitar_ds.training.watch.phases import DATA, PHASES, SETTLING
from univitar_ds.training.watch.watchdog import STALLED

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
DELAY_S = 100.0


class DelayedMarks:
    """A clock that only advances by the delays of the test."""

    now = 0.0

    def mark(self):
        return DelayedMarks.now

    def passed(self, mark):
        return True

    def seconds(self, first, last):
        return last - first

    def reuse(self, mark):
        pass


def train_delayed(run):
    """Trains a rank. On the second rank every pack arrives DELAY_S later, and the first rank waits for it."""
    from univitar_ds.data.loader import PackLoader
    from univitar_ds.training.distributed import process_group

    read, gather = PackLoader.__next__, process_group.gather_numbers

    def slow(self):
        DelayedMarks.now += DELAY_S * (process_group.dist.get_rank() == 1)
        return read(self)

    def waiting(numbers, world):
        with phases.phase(phases.COLLECTIVES, "all_gather"):
            DelayedMarks.now += DELAY_S * (world.rank == 0)
            return gather(numbers, world)

    PackLoader.__next__, process_group.gather_numbers, watching.HostMarks = slow, waiting, DelayedMarks
    return train_rank(run)


def test_a_delayed_rank_is_named_with_its_phase(tmp_path):
    shards = write_demo_shards(tmp_path / "shards")
    stage = small_config(shards, tmp_path).stages[0].model_copy(update={"samples": 120})
    config = small_config(shards, tmp_path, stages=[stage.model_dump()], logging={"every_steps": 2, "peak_tflops": 0.1})
    run = create_run(config, "test", 2)
    assert run_distributed(train_delayed, 2, run) == [True, True]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (found,) = [event for event in events if event["event"] == "slow_rank"]
    assert (found["rank"], found["phase"], found["phase_s"], found["others_s"]) == (1, DATA, DELAY_S, 0.0)
    assert found["host"]
    lines = metrics(run)
    assert found["step"] == 6  # the third window; the first one has one step
    for line in lines if lines[-1]["step"] % 2 == 0 else lines[:-1]:
        assert line["data_wait_max_s"] == DELAY_S
        assert line["data_wait_s"] == DELAY_S / 2
        assert line["collectives_s"] == DELAY_S / 2
        assert sum(line[f"{name}_s"] for name in PHASES) == DELAY_S


HANGS = """
import ctypes, os, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from univitar_ds.config.watch import WatchdogConfig
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.watch import watchdog
from univitar_ds.training.watch.collectives import marked_collectives
from univitar_ds.training.watch.phases import DATA, SETTLING, StepClock, active, phase

watchdog.LOOK_S, watchdog.ANSWER_S, watchdog.HEARD_S = 0.2, 6.0, 1.0
if os.environ["RANK"] == "1":
    watchdog.LOCKED_S = 12.0
kind, cfg, clock = sys.argv[2], WatchdogConfig(min_s=1, factor=2, first_step_s=3000), StepClock()
world = start_world(timedelta(hours=1))

def hang_with_the_lock():
    ctypes.PyDLL(None).sleep(3000)  # C code that keeps Python's lock

def hang_without_the_lock():
    ctypes.CDLL(None).sleep(3000)

with active(clock), marked_collectives(), watchdog.watched(cfg, Path(sys.argv[1]), world, clock):
    for number in range(1, SETTLING + 3):
        clock.begin_step(number)
        with phase(DATA):
            if world.rank == 1 and number == SETTLING + 2:
                hang_with_the_lock() if kind == "lock" else hang_without_the_lock()
        dist.all_reduce(torch.ones(1))
        clock.end_step()
print("not reached")
"""


def hung(run, kind):
    """Exit codes and errors of two ranks, the second of which hangs in a step."""
    port = free_ports()[0]
    arguments = [sys.executable, "-c", HANGS, str(run), kind]
    ranks = []
    for rank in (0, 1):
        group = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in group.items()} | {"SLURM_JOB_ID": "77"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(subprocess.Popen(arguments, env=environment, text=True, cwd=ROOT, **pipes))
    found = [output_of(process, f"rank {rank}") for rank, process in enumerate(ranks)]
    assert [out for out, _ in found] == ["", ""]
    return [process.returncode for process in ranks], found[0][1]


def test_a_rank_that_hangs_in_c_code_is_named_and_ends_the_run_with_all_stacks(tmp_path):
    codes, said = hung(tmp_path, "free")
    assert codes == [STALLED, STALLED]
    assert "error: the step has taken more than 1 s (limit: watchdog in the run file): rank 1 on " in said
    assert f"is in data_wait of step {SETTLING + 2}" in said
    assert f"; rank 0 waits in all_reduce, other of step {SETTLING + 2}, collective {SETTLING + 2}" in said
    assert str(tmp_path / "stacks") in said
    assert "in hang_without_the_lock" in (tmp_path / "stacks" / "rank00001.txt").read_text()
    assert "in all_reduce" in (tmp_path / "stacks" / "rank00000.txt").read_text()
    recorded = json.loads((tmp_path / "stacks" / "collectives-rank00000.json").read_text())
    assert recorded["entries"][-1]["profiling_name"] == "gloo:all_reduce"
    (stall,) = [json.loads(line) for line in (tmp_path / "stacks" / "stalls.jsonl").read_text().splitlines()]
    assert (stall["step"], stall["section"], stall["code"]) == (SETTLING + 2, "step", STALLED)
    assert (tmp_path / "stacks" / "again").read_text() == "77.0\n"


def test_a_rank_whose_code_holds_python_s_lock_is_named_writes_its_stack_and_ends(tmp_path):
    codes, said = hung(tmp_path, "lock")
    assert codes == [STALLED, -signal.SIGALRM]
    assert "rank 1 on " in said
    assert "does not answer" in said
    assert "in hang_with_the_lock" in (tmp_path / "stacks" / "rank00001.txt").read_text()
