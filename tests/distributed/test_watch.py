"""A rank that is slow is named by a run of two ranks, and one that hangs ends it."""

import json

import pytest

from tests.support.distributed import run_distributed
from tests.support.runs import metrics, small_config, train_rank
from tests.support.shards import write_demo_shards
from univitar_ds.run import create_run
from univitar_ds.training.watch import phases, watching
from univitar_ds.training.watch.phases import DATA, PHASES

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
DELAY_S = 100.0


class DelayedMarks:
    """A clock in which nothing takes time but the delays that the test adds."""

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
    """On the second rank every pack takes DELAY_S longer to arrive, and the first rank waits for it."""
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
