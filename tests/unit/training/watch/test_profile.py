"""Traces of steps."""

import gzip
import json

import pytest
import torch

from univitar_ds.config.run_folder import PROFILE
from univitar_ds.config.watch import ProfileConfig
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.watch.phases import BACKWARD, FORWARD, StepClock, active, phase
from univitar_ds.training.watch.profile import StepProfiler


def world(rank: int) -> World:
    return World(rank, 2, rank, torch.device("cpu"))


def traced(cfg: ProfileConfig | None, run, steps: range, rank: int = 0) -> dict[str, list[str]]:
    """Names of events in the traces that a run of these steps writes."""
    profiler = StepProfiler(cfg, run, world(rank))
    clock = StepClock(observer=profiler)
    with active(clock):
        for number in steps:
            clock.begin_step(number)
            with phase(FORWARD), torch.profiler.record_function(f"number {number}"):
                torch.ones(4, 4) @ torch.ones(4, 4)
            clock.end_step()
        with phase(BACKWARD):
            pass
    profiler.close()
    found = {}
    for path in sorted(run.glob(f"{PROFILE}/*")):
        with gzip.open(path) as file:
            found[path.name] = [event["name"] for event in json.load(file)["traceEvents"]]
    return found


def test_the_steps_of_a_trace_are_those_that_were_asked_for(tmp_path):
    (trace,) = traced(ProfileConfig(from_step=3, steps=2), tmp_path, range(1, 8)).items()
    name, events = trace
    assert name == "step00000003-rank00000.json.gz"
    assert [event for event in events if event.startswith("number")] == ["number 3", "number 4"]
    assert events.count(FORWARD) == 2
    assert "aten::matmul" in events
    assert BACKWARD not in events


def test_the_profiler_prints_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    assert traced(ProfileConfig(from_step=1, steps=1), tmp_path, range(1, 3))
    assert capfd.readouterr().err == ""


def test_a_run_that_is_resumed_or_ends_within_the_steps_traces_the_rest(tmp_path):
    (trace,) = traced(ProfileConfig(from_step=3, steps=9), tmp_path, range(5, 7)).items()
    assert trace[0] == "step00000005-rank00000.json.gz"
    assert [event for event in trace[1] if event.startswith("number")] == ["number 5", "number 6"]


@pytest.mark.parametrize(("cfg", "rank"), [(None, 0), (ProfileConfig(from_step=2), 1)])
def test_other_ranks_and_runs_trace_nothing(tmp_path, cfg, rank):
    assert traced(cfg, tmp_path, range(1, 6), rank) == {}


def test_all_ranks_trace_if_they_are_asked(tmp_path):
    assert list(traced(ProfileConfig(from_step=2, ranks="all"), tmp_path, range(1, 6), 1)) == [
        "step00000002-rank00001.json.gz"
    ]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / PROFILE).write_text("a file")
    assert traced(ProfileConfig(from_step=1, steps=1), tmp_path, range(1, 3)) == {}
    assert "the trace that begins at step 1 cannot be written" in caplog.text
