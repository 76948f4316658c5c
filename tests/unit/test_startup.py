"""Reports of the phases of a start."""

import logging
import threading
import time

import pytest

from tests.support.progress import wait_until
from univitar_ds import startup
from univitar_ds.cli.main import main
from univitar_ds.doctor.context import Check
from univitar_ds.doctor.findings import OK, Found, Row
from univitar_ds.errors import ConfigError
from univitar_ds.screen import progress_bar


@pytest.fixture
def reports(caplog, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    caplog.set_level(logging.INFO)
    return caplog


def test_a_long_phase_is_reported_repeatedly(reports, monkeypatch):
    monkeypatch.setattr(startup, "AFTER_S", 0.01)
    monkeypatch.setattr(startup, "AGAIN_S", 0.01)
    with startup.reported("loading"):
        wait_until(lambda: "loading ..." in reports.messages, "a report")
        startup.phase("building the model")
        wait_until(lambda: "building the model ..." in reports.messages, "a report")
        wait_until(
            lambda: any("building the model (" in text and " s so far)" in text for text in reports.messages),
            "a report",
        )


def test_a_phase_is_not_repeated_as_often_as_it_could_be(reports, monkeypatch):
    monkeypatch.setattr(startup, "AFTER_S", 0.01)
    monkeypatch.setattr(startup, "AGAIN_S", 1000.0)
    with startup.reported("loading"):
        wait_until(lambda: reports.messages, "a report")
        time.sleep(0.1)
    assert reports.messages == ["loading ..."]


def test_a_start_whose_phases_are_short_reports_the_one_that_lasts_when_it_is_due(reports, monkeypatch):
    monkeypatch.setattr(startup, "AFTER_S", 0.3)
    with startup.reported("one"):
        startup.phase("two")
        startup.phase("three")
        wait_until(lambda: reports.messages, "a report")
    assert reports.messages == ["three ..."]


def test_a_quick_start_and_everything_after_a_start_report_nothing(reports, monkeypatch):
    monkeypatch.setattr(startup, "AFTER_S", 1000.0)
    with startup.reported("loading"):
        startup.phase("building")
        startup.done()
        startup.phase("training")
        assert not [thread for thread in threading.enumerate() if thread.name == "startup"]
    startup.phase("later")
    assert reports.messages == []


def test_an_inner_start_is_a_phase_of_the_outer_one(reports, monkeypatch):
    monkeypatch.setattr(startup, "AFTER_S", 0.01)
    with startup.reported("outer"):
        with startup.reported("inner"):
            wait_until(lambda: "inner ..." in reports.messages, "a report")
        startup.phase("after")
        wait_until(lambda: "after ..." in reports.messages, "a report")


@pytest.mark.parametrize(("name", "rank", "speaks"), [("RANK", "1", 0), ("SLURM_PROCID", "3", 0), ("RANK", "0", 1)])
def test_only_the_first_rank_reports(reports, monkeypatch, name, rank, speaks):
    monkeypatch.setenv(name, rank)
    with startup.reported("loading"):
        assert len([thread for thread in threading.enumerate() if thread.name == "startup"]) == speaks


def test_a_start_that_fails_ends_its_reports(reports):
    with pytest.raises(ValueError, match="broken"), startup.reported("loading"):
        raise ValueError("broken")
    assert not [thread for thread in threading.enumerate() if thread.name == "startup"]


COMMANDS = {
    "univitar_ds.evaluation.run.evaluate_run": ["eval", "RUN"],
    "univitar_ds.tasks.run.run_task": ["eval", "knn", "MODEL", "--data", "SOURCE"],
    "univitar_ds.evaluation.report.render_run": ["report", "RUN"],
    "univitar_ds.inference.classify.listed": ["classify", "MODEL", "a.jpg", "--labels", "a,b"],
    "univitar_ds.inference.embed_files.embed_files": ["embed", "MODEL", "SOURCE", "--out", "OUT.parquet"],
    "univitar_ds.doctor.run.examine": ["doctor"],
}


@pytest.mark.parametrize("slow", COMMANDS)
def test_commands_that_take_long_before_they_print_say_what_they_do(reports, monkeypatch, slow):
    monkeypatch.setattr(startup, "AFTER_S", 0.01)

    def lasts(*_, **__):
        wait_until(lambda: "loading the program ..." in reports.messages, "a report")
        raise ConfigError("the work has begun")

    monkeypatch.setattr(slow, lasts)
    assert main(COMMANDS[slow]) == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "startup"]


def test_the_checks_of_the_doctor_are_named_while_they_last(reports, monkeypatch):
    monkeypatch.setattr(startup, "AFTER_S", 0.01)
    monkeypatch.setattr(startup, "AGAIN_S", 0.01)
    seen = Row("disk", OK, "there")

    def look(_):
        wait_until(lambda: "checking: disk ..." in reports.messages, "a report")
        return Found([seen])

    monkeypatch.setattr("univitar_ds.doctor.run.CHECKS", [Check("disk", look, "")])
    assert main(["doctor"]) == 0


def test_nothing_is_reported_while_a_progress_bar_is_shown(reports, monkeypatch):
    monkeypatch.setattr(startup, "AFTER_S", 0.01)
    monkeypatch.setattr(startup, "AGAIN_S", 0.01)
    with startup.reported("loading"):
        with progress_bar(desc="embedding", unit="image"):
            before = len(reports.messages)
            time.sleep(0.1)
            assert len(reports.messages) <= before + 1, "one that was being logged"
        startup.phase("writing")
        wait_until(lambda: "writing ..." in reports.messages, "a report")
