"""Logs of a run whose storage fails for a moment: they lose nothing, and say so if they must."""

import errno
import json
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer, record_writer

from tests.support.finished import run_config
from univitar_ds.errors import StorageError
from univitar_ds.run_lock import LockLost
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.logging import kept_log, writers
from univitar_ds.training.logging.board import Board
from univitar_ds.training.logging.kept_log import JsonLines
from univitar_ds.training.logging.run_logs import RunLogs
from univitar_ds.training.step.curriculum import Progress

PASSING = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN]


class Disk:
    """The disk below a log: while it has a `fault`, a write stops after `accepted` bytes and the file cannot be opened
    or cut."""

    def __init__(self, monkeypatch, accepted=4):
        self.fault, self.accepted = None, accepted
        monkeypatch.setattr(os, "write", lambda file, content, real=os.write: self._write(real, file, content))
        for real in (os.open, os.ftruncate, os.replace):
            monkeypatch.setattr(os, real.__name__, lambda *given, real=real, **named: self._do(real, given, named))

    def _write(self, real, file, content):
        if self.fault is not None:
            real(file, content[: self.accepted])
        return self._do(real, (file, content), {})

    def _do(self, real, given, named):
        if self.fault is not None:
            raise OSError(self.fault, os.strerror(self.fault))
        return real(*given, **named)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(kept_log, "CLOSING_S", 0.0)
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def log_at(folder, check=lambda: None):
    return JsonLines(folder / "metrics.jsonl", check)


def steps_in(folder, name="metrics.jsonl"):
    return [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()]


def add(log, *steps):
    for step in steps:
        log.append(json.dumps({"step": step}))


@pytest.mark.parametrize("fault", PASSING)
def test_lines_of_an_outage_are_written_after_it_in_their_order(tmp_path, disk, caplog, fault):
    caplog.set_level("INFO")
    log = log_at(tmp_path)
    add(log, 1, 2)
    disk.fault = fault
    add(log, 3, 4)
    disk.fault = None
    add(log, 5, 6)
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
    warning, news = (record.message for record in caplog.records)
    assert "metrics.jsonl cannot be written: " + os.strerror(fault) in warning
    assert "the run continues" in warning
    assert news.endswith("is written again, with the 3 lines that had been kept")


def test_an_outage_that_ends_while_the_log_is_closed_loses_nothing(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(kept_log, "CLOSING_S", 600.0)
    monkeypatch.setattr(kept_log.time, "sleep", lambda seconds: setattr(disk, "fault", None))
    log = log_at(tmp_path)
    disk.fault = errno.EIO
    add(log, 1, 2)
    log.close()
    assert steps_in(tmp_path) == [1, 2]


def test_lines_that_are_missing_at_the_end_are_counted_in_the_error(tmp_path, disk):
    log = log_at(tmp_path)
    disk.fault = errno.EIO
    add(log, 1, 2)
    with pytest.raises(StorageError, match="its last 2 lines are missing; check the disk"):
        log.close()
    log.close()


def test_the_oldest_lines_beyond_the_limit_are_lost_and_counted(tmp_path, disk, monkeypatch, caplog):
    monkeypatch.setattr(kept_log, "MOST_BYTES", 3 * len(b'{"step": 1}\n'))
    log = log_at(tmp_path)
    add(log, 1)
    disk.fault = errno.EIO
    add(log, 2, 3, 4, 5, 6)
    disk.fault = None
    add(log, 7)
    log.close()
    assert steps_in(tmp_path) == [1, 5, 6, 7]
    assert caplog.records[-1].message.endswith("its last 3 lines had been kept, 3 older ones are lost (limit: 0 MB)")


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_an_error_that_does_not_pass_is_raised_and_the_file_ends_with_a_whole_line(tmp_path, disk, monkeypatch, fault):
    log = log_at(tmp_path)
    add(log, 1)
    disk.fault = fault
    monkeypatch.setattr(os, "ftruncate", os.truncate)
    with pytest.raises(StorageError, match=os.strerror(fault)):
        add(log, 2)
    assert steps_in(tmp_path) == [1]


def test_what_a_storage_has_lost_although_it_had_accepted_it_is_counted(tmp_path, disk, monkeypatch, caplog):
    monkeypatch.setattr(kept_log, "TAIL", 5)
    log = log_at(tmp_path)
    add(log, 1, 2, 3)
    disk.fault = errno.EIO
    add(log, 4)
    disk.fault = None
    os.truncate(tmp_path / "metrics.jsonl", 2 * len('{"step": 1}\n') + 3)
    add(log, 5)
    log.close()
    assert steps_in(tmp_path) == [1, 2, 4, 5]
    assert any("metrics.jsonl lacks 12 bytes at its end" in record.message for record in caplog.records)


def test_nothing_is_written_while_it_is_unknown_whose_the_folder_is(tmp_path):
    unknown = StorageError("the lock cannot be read")
    unknown.transient = True
    faults = [None, unknown, unknown, None, LockLost("taken over")]

    def check():
        if (fault := faults.pop(0)) is not None:
            raise fault

    log = log_at(tmp_path, check)
    for step, seen in enumerate(([1], [1], [1], [1, 2, 3, 4]), start=1):
        add(log, step)
        assert steps_in(tmp_path) == seen
    with pytest.raises(LockLost):
        add(log, 5)
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_tensorboard_shows_the_points_of_an_outage_and_of_its_step_once(tmp_path, monkeypatch):
    faults: list[int] = []

    def failing(writer, data, real=record_writer.RecordWriter.write):
        if faults:
            raise OSError(faults[-1], os.strerror(faults[-1]))
        real(writer, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", failing)
    board = Board(tmp_path, 0)
    for step in range(1, 8):
        if step == 6:
            faults.clear()
        board.points({"eval/top-1": step}, step)
        if step == 3:
            faults.append(errno.EIO)
        board.scalars({"step": step, "loss": 10.0 + step})
    board.close()
    shown = EventAccumulator(str(tmp_path / "tb")).Reload()
    for name, first in (("loss/loss", 10.0), ("eval/top-1", 0.0)):
        found = [(point.step, point.value) for point in shown.Scalars(name)]
        assert found == [(step, first + step) for step in range(1, 8)], name


def test_all_logs_of_a_run_outlast_an_outage(tmp_path, disk):
    logs = RunLogs(run_config(logging={"every_steps": 1}), tmp_path, World(0, 1, 0, torch.device("cpu")))
    logs.open(Progress(), [])
    events = []
    for step in range(1, 6):
        disk.fault = errno.EIO if step in (2, 3) else None
        events.append({"step": step, "event": "stage", "stage": "a", "samples_seen": 0})
        logs.write_event(events)
        logs.write_evaluation({"step": step, "eval/top-1": 0.5}, "")
        logs.raise_unwritten()
    disk.fault = None
    logs.close()
    logs.raise_unwritten()
    for name in ("metrics.jsonl", "events.jsonl"):
        assert steps_in(tmp_path, name) == [1, 2, 3, 4, 5]
    shown = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("eval/top-1")
    assert [point.step for point in shown] == [1, 2, 3, 4, 5]


def test_an_event_of_an_outage_is_written_with_the_next_line_of_metrics(tmp_path, disk):
    log = writers.EventLog(tmp_path)
    disk.fault = errno.EIO
    for count in (1, 2, 3):
        log.write([{"step": step} for step in range(count)])
    assert not (tmp_path / "events.jsonl").exists()
    disk.fault = None
    log.flush()
    assert steps_in(tmp_path, "events.jsonl") == [0, 1, 2]
