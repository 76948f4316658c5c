"""Limits of the sections of a run, and how often it is restarted."""

import json

import pytest
import torch

from univitar_ds.config.run_folder import STACKS
from univitar_ds.config.watch import WatchdogConfig
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.watch import flight_recorder, watchdog
from univitar_ds.training.watch.phases import (
    CHECKPOINT,
    EVALUATION,
    FIRST_STEPS,
    MID_EVALUATION,
    SETTLING,
    START,
    STEP,
    StepClock,
)
from univitar_ds.training.watch.watchdog import AGAIN, GIVEN_UP, MAX_FACTOR_S, STALLED, STALLS, limit_s

CFG = WatchdogConfig()
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("section", "limit"),
    [
        (START, CFG.first_step_s),
        (FIRST_STEPS, CFG.first_step_s),
        (CHECKPOINT, CFG.checkpoint_s),
        (EVALUATION, CFG.evaluation_s),
        (MID_EVALUATION, CFG.evaluation_s),
    ],
)
def test_a_section_that_is_no_step_has_a_limit_of_its_own(section, limit):
    assert limit_s(CFG, section, [1.0] * SETTLING) == limit


def test_the_limit_of_a_step_is_a_multiple_of_the_median():
    assert limit_s(CFG, STEP, [50.0, 51.0, 500.0]) == 510.0
    assert limit_s(CFG, STEP, [0.1] * 9) == CFG.min_s
    assert limit_s(CFG, STEP, [100.0] * 9) == MAX_FACTOR_S  # before a collective fails by itself
    assert limit_s(CFG, STEP, [400.0] * 9) == 1200.0
    assert limit_s(WatchdogConfig(min_s=2000), STEP, [1.0] * 9) == 2000.0
    assert limit_s(CFG, STEP, [1.0] * (SETTLING - 1)) == CFG.first_step_s


class Ended(BaseException):
    """In place of the end of the process."""


def stalled(run, monkeypatch, section=STEP, cfg=CFG) -> int:
    """The exit code of a run of one rank that hangs."""

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(watchdog.Watchdog, "_watch", lambda self: None)
    clock = StepClock()
    with pytest.raises(Ended) as end:
        watchdog.Watchdog(cfg, run, ALONE, clock)._end(section, 7.0, over=True)
    return end.value.args[0]


def test_a_run_that_hangs_again_and_again_without_a_checkpoint_is_given_up(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    cfg = WatchdogConfig(max_stalls=2)
    assert [stalled(tmp_path, monkeypatch, cfg=cfg) for _ in range(2)] == [STALLED, STALLED]
    assert (tmp_path / STACKS / AGAIN).read_text() == "12.2\n"
    assert f"exit code {STALLED}" in capfd.readouterr().err
    assert stalled(tmp_path, monkeypatch, cfg=cfg) == GIVEN_UP
    assert "has hung 3 times since its last checkpoint (watchdog.max_stalls is 2)" in capfd.readouterr().err
    assert len((tmp_path / STACKS / STALLS).read_text().splitlines()) == 3
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000004\n")
    assert stalled(tmp_path, monkeypatch, cfg=cfg) == STALLED


def test_an_evaluation_that_hangs_is_not_started_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert stalled(tmp_path, monkeypatch, section=EVALUATION) == GIVEN_UP
    assert not (tmp_path / STACKS / AGAIN).exists()
    assert f"univitar-ds eval {tmp_path}" in capfd.readouterr().err
    assert "in stalled" in (tmp_path / STACKS / "rank00000.txt").read_text()


def test_a_run_whose_evaluation_hangs_during_training_continues_from_its_checkpoint(tmp_path, monkeypatch, capfd):
    assert stalled(tmp_path, monkeypatch, section=MID_EVALUATION) == STALLED
    assert "the evaluation during training has taken more than" in capfd.readouterr().err


def test_a_run_that_does_not_hang_leaves_nothing_in_its_folder(tmp_path):
    with watchdog.watched(CFG, tmp_path, ALONE, StepClock()):
        assert (tmp_path / STACKS).is_dir()
    assert list(tmp_path.iterdir()) == []
    with watchdog.watched(WatchdogConfig(enabled=False), tmp_path, ALONE, StepClock()):
        assert list(tmp_path.iterdir()) == []


def test_the_recorder_writes_into_the_run_unless_the_environment_names_another_place(tmp_path):
    environment = {"TORCH_FR_BUFFER_SIZE": "7"}
    flight_recorder.record_collectives(tmp_path, environment)
    assert environment == {
        "TORCH_FR_BUFFER_SIZE": "7",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/stacks/nccl-rank",
    }


def test_the_first_collective_that_is_not_done_is_pending():
    done = {"record_id": 0, "retired": True, "state": "scheduled", "profiling_name": "nccl:all_gather"}
    done |= {"collective_seq_id": 1, "process_group": ["0", "default_pg"]}
    late = done | {"record_id": 2, "collective_seq_id": 3, "retired": False}
    first = done | {"record_id": 1, "collective_seq_id": 2, "retired": False, "profiling_name": "nccl:all_reduce"}
    assert flight_recorder.pending({"entries": [late, done, first]}) == "nccl:all_reduce 2 of default_pg"
    assert flight_recorder.pending({"entries": [done, first | {"state": "completed"}]}) == ""
    assert flight_recorder.pending({}) == ""


def test_the_recorder_of_this_torch_can_be_read(tmp_path):
    path = tmp_path / "collectives.json"
    flight_recorder.write_collectives(path)
    assert json.loads(path.read_text())["version"]
