"""Running checks on one rank: limits, errors and the report."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from univitar_ds import processes
from univitar_ds.cli.doctor import table
from univitar_ds.cli.main import main
from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, SKIPPED, Found, Report, Row
from univitar_ds.doctor.ranks import Ranks
from univitar_ds.doctor.run import check_all
from univitar_ds.errors import ConfigError


def rows_of(*checks: Check, limit_s: float = 60.0) -> list[Row]:
    return check_all(Context(Ranks(dist.HashStore(), 0, 1, limit_s)), checks)


def raises(error: Exception):
    def run(context):
        raise error

    return run


GOOD = Check("good", lambda _: Found([Row("good", OK, "it is")]), "")


def test_a_check_that_fails_does_not_hide_the_next_one(capfd):
    broken = Check("broken", raises(ZeroDivisionError("by zero")), "call us")
    wrong = Check("wrong", raises(ConfigError("lanes is 3; give 4")), "")
    first, second, third = rows_of(broken, wrong, GOOD)
    assert (first.state, first.found) == (FAILED, "ZeroDivisionError: by zero")
    assert first.remedy == "see the traceback in the log; call us"
    assert "Traceback" in capfd.readouterr().err
    assert (second.check, second.found, second.remedy) == ("wrong", "lanes is 3", "give 4")
    assert third.state == OK


def test_a_check_that_does_not_answer_fails_at_the_limit_with_its_remedy(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(processes, "TICKS_S", 5.0)  # other threads of the tests compute
    hanging = Check("disk", lambda _: ended.wait() and None, "see the disk")
    try:
        first, second = rows_of(hanging, GOOD, limit_s=0.2)
    finally:
        ended.set()
    assert (first.check, first.state) == ("disk", FAILED)
    assert (first.found, first.remedy) == ("no answer and no progress for 0.2 s (limit)", "see the disk")
    assert second.state == OK


def test_a_check_that_makes_progress_has_the_time_it_needs(monkeypatch):
    """As the import of all packages on a busy machine, which took longer than the limit beside a good run file."""
    looks, enough = [], threading.Event()

    def done(_):
        looks.append(len(looks))
        if len(looks) > 12:  # three limits, as a limit has four looks
            enough.set()
        return 10.0 * len(looks), 0

    monkeypatch.setattr(processes, "done_by", done)
    slow = Check("slow", lambda _: enough.wait() and Found([Row("slow", OK, "it is")]), "")
    (row,) = rows_of(slow, limit_s=0.2)
    assert row.state == OK
    endless = Check("endless", lambda _: threading.Event().wait(), "end it")
    (row,) = rows_of(endless, limit_s=0.05)
    assert (row.state, row.found) == (FAILED, "no answer within 0.5 s, 10 times the limit")


def test_ranks_that_wait_for_each_other_have_the_limit_as_a_whole_since_waiting_on_a_gpu_is_busy(monkeypatch):
    monkeypatch.setattr(processes, "done_by", lambda _: (100 * time.monotonic(), 0))
    (row,) = rows_of(Check("ranks", lambda _: threading.Event().wait(), "", together=True), limit_s=0.1)
    assert row.found == "no answer within 0.1 s (limit)"


def test_the_work_of_children_and_the_bytes_of_a_disk_are_progress(tmp_path):
    before = processes.done_by(os.getpid())
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    (tmp_path / "file").write_bytes(os.urandom(1 << 20))
    after = processes.done_by(os.getpid())
    assert after[0] - before[0] >= 0.25, "in ticks of 10 ms"
    assert after[1] >= before[1]


ROWS = [
    Row("versions", OK, "torch 2.13.0"),
    Row("GPUs", SKIPPED, "none"),
    Row("disk", FAILED, "\x1b[2J is full", "free some", nodes=("b",), numbers={"free_bytes": 0}),
]


def test_the_table_has_states_remedies_and_a_total_and_escapes_control_characters():
    text = table(Report(ROWS, ["a", "b"]), colours=False)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["ok", "versions", "torch", "2.13.0"]
    assert lines[1][:2] == ["-", "GPUs"]
    assert lines[2] == ["FAILED", "disk", "b:", "\\x1b[2J", "is", "full"]
    assert lines[3] == ["remedy:", "free", "some"]
    assert lines[-1] == ["FAILED", "1", "of", "3", "rows;", "the", "remedies", "are", "above"]
    assert "\x1b" not in text


def test_colours_are_added_to_the_states():
    text = table(Report(ROWS, ["a", "b"]), colours=True)
    assert "\x1b[31mFAILED\x1b[0m" in text
    assert "\x1b[32mok    \x1b[0m" in text
    assert table(Report(ROWS[:2], ["a"]), colours=False).endswith("ok  2 rows, none failed")


@pytest.fixture
def two_checks(monkeypatch):
    bad = Check("bad", lambda _: Found([Row("bad", FAILED, "broken", "mend it", numbers={"x_s": 1.5})]), "")
    monkeypatch.setattr("univitar_ds.doctor.run.CHECKS", [GOOD, bad])


def test_the_command_prints_json_and_ends_with_1_for_a_failed_row(two_checks, capsys):
    assert main(["doctor", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["ok"], printed["ranks"], len(printed["nodes"])) == (False, 1, 1)
    assert printed["rows"][1] == {
        "check": "bad", "state": "failed", "found": "broken", "remedy": "mend it", "nodes": [], "numbers": {"x_s": 1.5},
    }  # fmt: skip


def test_the_command_ends_with_0_without_a_failed_row(monkeypatch, capsys):
    monkeypatch.setattr("univitar_ds.doctor.run.CHECKS", [GOOD])
    assert main(["doctor"]) == 0
    assert "1 rows, none failed" in capsys.readouterr().out


def test_overrides_need_a_run_file(capsys):
    assert main(["doctor", "data.lanes=3"]) == 2
    assert "data.lanes=3 overrides a key of a run file; name the run file with --config" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-3", "soon"])
def test_a_limit_is_a_number_of_seconds(capsys, value):
    with pytest.raises(SystemExit):
        main(["doctor", "--timeout", value])
    assert "--timeout" in capsys.readouterr().err
