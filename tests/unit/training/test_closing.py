"""The end of a run that something has ended: all is closed, and that something is what the user reads."""

import logging
from contextlib import nullcontext
from pathlib import Path

import pytest

from univitar_ds.config.schema import LoggingConfig
from univitar_ds.errors import CheckpointError
from univitar_ds.training import loop
from univitar_ds.training.logging.run_logs import RunLogs
from univitar_ds.training.logging.writers import MetricLog


class Part:
    """Something to close, that cannot be closed where it is told so."""

    def __init__(self, broken=False):
        self.broken, self.closings = broken, 0

    def close(self):
        self.closings += 1
        if self.broken:
            raise OSError(28, "No space left on device")


def test_an_error_of_the_run_is_what_it_ends_with_though_closing_fails_too(caplog):
    part = Part(broken=True)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CheckpointError, match="damaged"),
        loop.closed_after(part.close),
    ):
        raise CheckpointError("the checkpoint is damaged")
    assert part.closings == 1
    assert "No space left on device" in caplog.text


def test_an_error_of_closing_alone_is_raised():
    with pytest.raises(OSError, match="No space left"), loop.closed_after(Part(broken=True).close):
        pass


@pytest.mark.parametrize("broken", ["_file", "_board", "_bar"])
def test_of_a_log_all_parts_are_closed_though_one_cannot_be(tmp_path, broken):
    log = MetricLog(tmp_path, LoggingConfig(tensorboard=False), step=0, samples=0, total_samples=1)
    log._file.close()
    parts = {name: Part(broken=name == broken) for name in ("_file", "_board", "_bar")}
    vars(log).update(parts)
    with nullcontext() if broken == "_bar" else pytest.raises(OSError, match="No space left"):  # a terminal may be gone
        log.close()
    assert [part.closings for part in parts.values()] == [1, 1, 1]


def trainer(**changed):
    made = object.__new__(loop._Trainer)
    parts = {"_metrics": Part(), "_samples": Part(), "engine": Part(), **changed}
    made.engine, made.logs = parts["engine"], RunLogs(None, Path("nowhere"), None)
    vars(made.logs).update({name: parts[name] for name in ("_metrics", "_samples")})
    return made, parts


@pytest.mark.parametrize("broken", ["_metrics", "_samples"])
def test_the_engine_and_the_other_log_are_closed_though_a_log_cannot_be_and_again_is_nothing(broken):
    made, parts = trainer(**{broken: Part(broken=True)})
    made.close()
    assert "No space left" in str(made.logs.unwritten)  # what ends the run, where it had not ended
    assert [parts[name].closings for name in ("_metrics", "_samples", "engine")] == [1, 1, 1]
    made.close()
    assert parts[broken].closings == 1


def test_a_trainer_whose_start_fails_is_closed(monkeypatch, tmp_path):
    made, parts = trainer()

    def start():
        raise CheckpointError("the logs cannot be cut")

    made.start = start
    monkeypatch.setattr(loop, "set_deterministic", lambda wanted: None)
    monkeypatch.setattr(loop, "_Trainer", lambda *given: made)
    with pytest.raises(CheckpointError, match="cannot be cut"):
        loop.train(type("Config", (), {"deterministic": False}), tmp_path, None)
    assert parts["engine"].closings == 1
