"""The arguments and environment of the launcher of local processes."""

import base64
import errno
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import univitar_ds
from tests.support.finished import run_config, write_run
from univitar_ds import launch, screen
from univitar_ds.config.load import config_fingerprint, dump_config
from univitar_ds.convert import export
from univitar_ds.drafting.machine import Machine
from univitar_ds.errors import CheckpointError, ConfigError, DataError
from univitar_ds.evaluation import run as evaluation
from univitar_ds.formats.run import finished_at
from univitar_ds.run_lock import RunLock
from univitar_ds.training.distributed import process_group
from univitar_ds.training.distributed.preemption import Stop
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.watch import flight_recorder

ELSEWHERE = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def test_the_log_of_a_module_that_runs_as_a_program_is_that_of_the_package():
    """There `__name__` is "__main__", whose log has only warnings."""
    programs = [
        path
        for path in Path(univitar_ds.__file__).parent.rglob("*.py")
        if "\nif __name__ ==" in (text := path.read_text(encoding="utf-8")) and "getLogger(__name__)" in text
    ]
    assert programs == []


class Launched(Exception):
    """Instead of processes."""


@pytest.fixture
def started(monkeypatch, tmp_path):
    """How `nproc` processes are started on a machine with so many GPUs: their devices, and DS_ACCELERATOR."""

    def start(gpus: int, nproc: int, **environment: str):
        for name in ELSEWHERE:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(launch, "create_run", lambda *_: (tmp_path / "made").mkdir())

        def popen(command, env, **_):
            raise Launched(command, env)

        monkeypatch.setattr(subprocess, "Popen", popen)
        dump_config(run_config(output=str(tmp_path)), tmp_path / "run.yaml")
        with pytest.raises(Launched) as seen:
            launch.train(str(tmp_path / "run.yaml"), nproc, [])
        command, env = seen.value.args
        (world,) = (word.removeprefix("--world_info=") for word in command if word.startswith("--world_info="))
        return json.loads(base64.urlsafe_b64decode(world))["localhost"], env.get("DS_ACCELERATOR")

    return start


@pytest.mark.parametrize(
    ("shown", "devices"),
    [("2,3", ["2", "3"]), ("5, 1,7", ["5", "1"]), ("GPU-8f2e,GPU-11ab", ["GPU-8f2e", "GPU-11ab"])],
)
def test_processes_get_the_gpus_that_the_user_makes_visible(started, shown, devices):
    assert started(len(shown.split(",")), 2, CUDA_VISIBLE_DEVICES=shown) == (devices, None)


def test_processes_get_the_first_gpus_by_default(started):
    assert started(8, 2) == ([0, 1], None)


@pytest.mark.parametrize(
    ("gpus", "environment"),
    [(0, {"CUDA_VISIBLE_DEVICES": ""}), (1, {"DS_ACCELERATOR": "cpu"}),
     (1, {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "3"})],
    ids=["hidden GPUs", "the CPU is wanted", "the CPU is wanted and a GPU shown"],
)  # fmt: skip
def test_on_the_cpu_there_are_as_many_processes_as_asked_for(started, gpus, environment):
    assert started(gpus, 2, **environment) == ([0, 1], "cpu")


@pytest.mark.parametrize(
    ("machine", "nproc", "most"), [(Machine(2, 64e9), 17, 16), (Machine(64, 4e9), 7, 6), (Machine(1, 0.1e9), 2, 1)]
)
def test_more_processes_than_a_machine_can_hold_are_refused_before_a_folder_is_made(
    started, monkeypatch, tmp_path, machine, nproc, most
):
    monkeypatch.setattr("univitar_ds.drafting.machine.this_machine", lambda: machine)
    with pytest.raises(ConfigError, match=rf"{nproc} processes .*\({machine.cores} cores, .* start at most {most} "):
        started(0, nproc)
    assert not (tmp_path / "made").exists()
    assert len(started(0, most)[0]) == most if most > 1 else True


def test_a_finished_run_builds_no_engine(monkeypatch, tmp_path, caplog):
    run, done = tmp_path / "tried", []
    config = run_config()
    write_run(run, config)
    summary = {"completed": True, "steps": 7, "fingerprint": config_fingerprint(config)}
    (run / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr(process_group, "start_world", lambda: World(0, 1, 0, torch.device("cpu")))
    monkeypatch.setattr(process_group, "stop_world", lambda: None)
    monkeypatch.setattr(flight_recorder, "record_collectives", lambda run: None)
    monkeypatch.setattr(launch, "finish_run", done.append)
    monkeypatch.setattr(launch, "load_plugins", lambda entries: done.append(list(entries)))
    with RunLock(run) as lock, caplog.at_level("INFO"):
        assert launch.run_rank(run, Stop(), lock) == 0
    assert done == [[], run]
    assert "are done since step 7: nothing is trained" in caplog.text


@pytest.mark.parametrize("changes", [{"completed": False}, {"steps": 6}, {"fingerprint": "other"}, {"steps": None}])
def test_a_run_is_finished_if_its_summary_is_of_its_last_checkpoint_and_configuration(tmp_path, changes):
    run, config = tmp_path / "tried", run_config()
    (run / "checkpoints" / "step-00000007").mkdir(parents=True)
    (run / "checkpoints" / "step-00000007" / "manifest.json").write_text("{}")
    dump_config(config, run / "config.yaml")
    assert finished_at(run) is None
    summary = {"completed": True, "steps": 7, "fingerprint": config_fingerprint(config)}
    (run / "summary.json").write_text(json.dumps(summary))
    assert finished_at(run) == 7
    (run / "summary.json").write_text(json.dumps(summary | changes))
    assert finished_at(run) is None


def test_more_processes_than_gpus_are_refused_before_a_folder_is_made(started, tmp_path):
    with pytest.raises(ConfigError, match=r"2 processes .* torch sees 1; .*--nproc 1.* or set DS_ACCELERATOR=cpu"):
        started(1, 2)
    assert not (tmp_path / "made").exists()


class Killed(BaseException):
    """What a signal does to a process."""


@pytest.mark.parametrize("fault", [None, CheckpointError("no room")])
def test_the_encoder_is_exported_before_the_evaluation_which_also_runs_if_the_export_fails(
    monkeypatch, tmp_path, fault
):
    done = []

    def exported(*_):
        done.append("export")
        if fault:
            raise fault

    def evaluate(_):
        done.append("evaluation")
        raise Killed

    monkeypatch.setattr(export, "export_run", exported)
    monkeypatch.setattr(evaluation, "evaluate_run", evaluate)
    dump_config(run_config(), tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(Killed):
        launch.finish_run(tmp_path)
    assert done == ["export", "evaluation"]


@pytest.mark.parametrize("fault", [DataError("a shard is cut off"), RuntimeError("a fault of the program")])
def test_the_export_and_the_summary_are_written_if_the_evaluation_fails(monkeypatch, tmp_path, caplog, fault):
    def evaluate(_):
        raise fault

    monkeypatch.setattr(export, "export_run", lambda *_: None)
    monkeypatch.setattr(evaluation, "evaluate_run", evaluate)
    dump_config(run_config(), tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text('{"completed": true, "seconds": {"training": 7.5}}')
    with pytest.raises(type(fault), match=str(fault)):
        launch.finish_run(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["completed"] is True
    assert set(summary["seconds"]) == {"training", "export", "evaluation"}
    assert f"univitar-ds eval {tmp_path}" in caplog.text


def test_results_are_written_if_the_table_cannot_be_printed(monkeypatch, tmp_path, caplog):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "export_run", lambda *_: None)
    monkeypatch.setattr(evaluation, "evaluate_run", lambda _: "the table")
    monkeypatch.setattr(export, "refresh_cards", lambda *_: None)
    monkeypatch.setattr(screen, "lost", [])
    monkeypatch.setattr(sys, "stdout", Full())
    dump_config(run_config(), tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text("{}")
    launch.finish_run(tmp_path)
    assert set(json.loads((tmp_path / "summary.json").read_text())["seconds"]) == {"export", "evaluation"}
    assert "stdout cannot be written (No space left on device)" in caplog.text
