"""The end of a run after an error: everything is closed, and the user sees that error."""

import logging
from types import SimpleNamespace

import pytest
import torch

from tests.support.runs import small_config
from univitar_ds.config.model import ModelConfig, ObjectiveConfig
from univitar_ds.config.schema import CheckpointConfig, EvaluationConfig, LoggingConfig
from univitar_ds.config.watch import WatchdogConfig
from univitar_ds.errors import CheckpointError, DataError, StorageError
from univitar_ds.training import loop
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.logging import run_logs, writers
from univitar_ds.training.logging.kept_log import JsonLines
from univitar_ds.training.logging.writers import MetricLog
from univitar_ds.training.step.curriculum import Progress

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class Part:
    """Something to close; closing it fails if it is `broken`."""

    def __init__(self, broken=False):
        self.broken, self.closings = broken, 0

    def add_text(self, *given):
        pass

    def flush(self):
        pass

    def close(self):
        self.closings += 1
        if self.broken:
            raise OSError(28, "No space left on device")


def test_the_error_of_the_run_is_raised_if_closing_fails_too(caplog):
    part = Part(broken=True)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CheckpointError, match="damaged"),
        loop.closed_after(part.close),
    ):
        raise CheckpointError("the checkpoint is damaged")
    assert part.closings == 1
    assert "No space left on device" in caplog.text


def test_an_error_that_occurs_only_in_closing_is_raised():
    with pytest.raises(OSError, match="No space left"), loop.closed_after(Part(broken=True).close):
        pass


@pytest.mark.parametrize("broken", ["file", "board", "tracker"])
def test_all_parts_of_a_log_are_closed_if_one_cannot_be(tmp_path, monkeypatch, broken):
    parts = {name: Part(broken=name == broken) for name in ("board", "tracker")}

    parts["file"] = Part(broken=broken == "file")
    monkeypatch.setattr(JsonLines, "close", lambda log, real=JsonLines.close: real(log) or parts["file"].close())
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *_, **__: parts["board"])
    monkeypatch.setattr(writers, "open_trackers", lambda cfg, run: [parts["tracker"]])
    log = MetricLog(small_config(tmp_path, tmp_path, logging={"tensorboard": True}), tmp_path, Progress())
    with pytest.raises(OSError, match="No space left"):
        log.close()
    assert {name: part.closings for name, part in parts.items()} == {"board": 1, "tracker": 1, "file": 1}


@pytest.fixture
def parts(monkeypatch):
    """What a trainer of `train` has to close, and its configuration."""
    made = SimpleNamespace(engine=Part(), metrics=Part(), samples=Part(), reached=[])

    def finished(stages):
        made.reached.append("training")
        raise DataError("no shard is left")

    vision = SimpleNamespace(config=None)
    made.engine.module, made.engine.dtype = SimpleNamespace(vision=vision), None
    progress = SimpleNamespace(step=0, stage=0, samples=0, finished=finished)
    state = SimpleNamespace(progress=progress, events=[{"event": "stage"}])
    monkeypatch.setattr(loop, "set_deterministic", lambda wanted: None)
    monkeypatch.setattr(loop, "build_training", lambda cfg, run, world: (made.engine, state))
    monkeypatch.setattr(loop, "cost_coefficients", lambda config: None)
    monkeypatch.setattr(loop, "find_peak", lambda peak, dtype, world: None)
    monkeypatch.setattr(run_logs, "MetricLog", lambda *_, **__: made.metrics)
    monkeypatch.setattr(run_logs, "SampleLog", lambda *_: made.samples)
    made.config = SimpleNamespace(
        deterministic=False,
        plugins=[],
        data=SimpleNamespace(lanes=1, log_samples=True),
        objective=ObjectiveConfig(),
        checkpoint=CheckpointConfig(),
        evaluation=EvaluationConfig(),
        logging=LoggingConfig(tensorboard=False),
        model=ModelConfig(),
        watchdog=WatchdogConfig(enabled=False),
        stages=[],
    )
    return made


def closings(parts):
    return [part.closings for part in (parts.engine, parts.metrics, parts.samples)]


@pytest.mark.parametrize("broken", ["metrics", "samples"])
def test_the_engine_and_the_other_log_are_closed_if_a_log_cannot_be(parts, tmp_path, broken):
    getattr(parts, broken).broken = True
    with pytest.raises(DataError, match="no shard is left"):
        loop.train(parts.config, tmp_path, ALONE)
    assert closings(parts) == [1, 1, 1]


@pytest.mark.parametrize("broken", ["metrics", "samples"])
def test_a_log_that_cannot_be_closed_ends_the_run_and_closing_again_is_nothing(parts, tmp_path, broken):
    getattr(parts, broken).broken = True
    logs = run_logs.RunLogs(parts.config, tmp_path, ALONE)
    logs.open(SimpleNamespace(step=0, samples=0), [])
    logs.close()
    logs.close()
    assert closings(parts) == [0, 1, 1]
    with pytest.raises(StorageError, match="No space left on device"):
        logs.raise_unwritten()


def test_a_trainer_whose_start_fails_is_closed(parts, monkeypatch, tmp_path):
    def failing(*_, **__):
        raise CheckpointError("the logs cannot be cut")

    monkeypatch.setattr(run_logs, "cut_sample_logs", failing)
    with pytest.raises(CheckpointError, match="cannot be cut"):
        loop.train(parts.config, tmp_path, ALONE)
    assert closings(parts) == [1, 0, 0]
    assert not parts.reached
