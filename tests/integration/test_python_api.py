"""Training from Python: errors before anything starts, an interrupt that saves, and `resume`."""

import signal

import pytest

from tests.support.runs import metrics, small_config
from tests.support.shards import write_demo_shards
from univitar_ds import resume, train
from univitar_ds.errors import ConfigError, RunError


def test_a_wrong_configuration_is_an_error_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="stages"):
        train({"name": "run", "output": str(tmp_path / "runs")})
    for wrong in (None, [1], {"name": "run", 1: 2}):
        with pytest.raises(ConfigError, match="config"):
            train(wrong)
    with pytest.raises(ConfigError, match="list of texts"):
        train("demo", overrides="seed=3")
    with pytest.raises(ConfigError, match=r"optimizer\.betas"):
        train("demo", overrides=["optimizer.betas=3", f"output={tmp_path / 'runs'}"])
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_start_has_a_message_and_an_exit_code(tmp_path):
    config = small_config(tmp_path / "absent", tmp_path / "runs")
    lines: list[str] = []
    with pytest.raises(RunError, match="absent") as caught:
        train(config, report=lines.append)
    assert caught.value.exit_code == 2
    assert any("absent" in line for line in lines)


@pytest.fixture
def in_background():
    """This process ignores SIGINT, as those that a shell starts in the background, and so do those that it starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("in_background")
def test_an_interrupt_saves_a_checkpoint_and_so_does_an_error_of_the_report_function(tmp_path):
    write_demo_shards(tmp_path / "shards")
    config = small_config(tmp_path / "shards", tmp_path / "runs")
    long = [stage.model_copy(update={"samples": 20_000}) for stage in config.stages]  # minutes, if nothing ends it
    run = tmp_path / "runs" / "small"
    sent = []

    def interrupt(line: str) -> None:
        if "samples/s" in line and not sent:
            sent.append(line)
            raise KeyboardInterrupt

    with pytest.raises(RunError) as caught:
        train(config.model_copy(update={"stages": long}), report=interrupt)
    assert caught.value.exit_code == 85
    before = metrics(run)[-1]["step"]

    def broken(line: str) -> None:
        if "samples/s" in line:
            raise ValueError(line)

    with pytest.raises(ValueError, match="samples/s"):
        resume(run, report=broken)
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, steps[-1] + 1))
    assert steps[-1] > before
