"""stdout that is ASCII, closed, a pipe without a reader, or on a full disk. Real processes of the command."""

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys

import pytest

from univitar_ds import screen

COMMAND = [sys.executable, "-m", "univitar_ds", "report"]


@pytest.fixture
def run(tmp_path):
    """A finished run whose results hold letters that ASCII has not."""
    figure = {"task": "zero-shot", "set": "köpek 犬", "measure": "top-1", "modality": "image", "value": 0.5}
    figure |= {"chance": 0.25, "n": 4, "candidates": 4}
    evaluation = {"checkpoint": "step-00000007", "figures": [figure] * 100, "notes": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    return tmp_path


def ended(arguments, environment=None, **streams):
    environment = {**os.environ, **(environment or {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([*COMMAND, *map(str, arguments)], env=environment, check=False, encoding="utf-8", **streams)


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["PYTHONIOENCODING", "LC_ALL"],
)
def test_letters_that_stdout_cannot_show_are_escaped(run, environment):
    result = ended([run], environment)
    assert result.returncode == 0, result.stderr
    assert r"k\xf6pek \u72ac" in result.stdout


def test_letters_that_stderr_cannot_show_are_escaped():
    result = ended(["nowhere/köpek"], {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert r"nowhere/k\xf6pek does not exist" in result.stderr


def test_a_closed_pipe_ends_a_command_without_a_message(run):
    read, write = os.pipe()
    os.close(read)
    result = ended([run], stdout=write)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_an_error_message(run):
    with open("/dev/full", "wb") as full:
        result = ended([run], stdout=full)
    assert result.returncode == 2
    assert "stdout cannot be written (No space left on device)" in result.stderr
    assert "Traceback" not in result.stderr


def test_closed_streams_cause_no_error(run):
    shell = f"exec {' '.join(COMMAND)} {run} >&- 2>&- <&-"
    assert subprocess.run(["/bin/sh", "-c", shell], check=False).returncode == 0


class Terminal(io.StringIO):
    """A terminal of 60 columns, as far as a status line needs one."""

    def isatty(self):
        return True

    def lines(self) -> list[str]:
        """The lines that a reader sees, the last one being that of the cursor."""
        seen = [""]
        column = 0
        for part in re.findall(r"\x1b\[K|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            if part == "\x1b[K":
                seen[-1] = seen[-1][:column]
            elif part == "\r":
                column = 0
            elif part == "\n":
                seen.append("")
                column = 0
            else:
                seen[-1] = seen[-1][:column] + part + seen[-1][column + len(part) :]
                column += len(part)
        return seen


@contextlib.contextmanager
def on_terminal(monkeypatch):
    """stderr as a terminal. Not a fixture, since pytest replaces stderr between a fixture and its test."""
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.redirect_stderr(stream):
        yield stream
        screen.end_status()
        assert sys.stderr is stream, "stderr was not given back"


def log_of(stream):
    log = logging.Logger("screen")
    log.addHandler(screen.ScreenHandler(stream))
    return log


def test_log_lines_and_warnings_appear_above_the_status_line(monkeypatch):
    with on_terminal(monkeypatch) as terminal:
        log = log_of(terminal)
        log.warning("before")
        screen.show_status("step 1 of a long run, which has a long line")
        log.warning("short")
        sys.stderr.write("Traceback ")
        sys.stderr.write("of a library\n")
        screen.show_status("step 2")
        print("a warning", file=sys.stderr)
        assert terminal.lines() == ["before", "short", "Traceback of a library", "a warning", "step 2"]
        screen.end_status()
        log.warning("after")
        assert terminal.lines()[-3:] == ["step 2", "after", ""]


def test_a_line_of_another_process_of_the_program_erases_the_status_line(monkeypatch):
    with on_terminal(monkeypatch) as terminal:
        screen.show_status("step 1 of a long run, which has a long line")
        other = screen._Status()  # of a process without a status line
        with contextlib.redirect_stderr(terminal), other.above(terminal):
            terminal.write("from a rank\n")
        screen.show_status("step 2")
        assert terminal.lines() == ["from a rank", "step 2"]


def test_a_status_line_is_cut_to_the_width_of_the_terminal(monkeypatch):
    with on_terminal(monkeypatch) as terminal:
        monkeypatch.setattr(Terminal, "fileno", lambda self: 2)
        monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((20, 5)))
        screen.show_status("x" * 30)
        assert terminal.lines() == ["x" * 19]


@pytest.mark.parametrize("kind", ["file", "dumb"])
def test_without_a_terminal_log_lines_have_no_control_characters(monkeypatch, kind):
    stream = Terminal() if kind == "dumb" else io.StringIO()
    monkeypatch.setenv("TERM", "dumb" if kind == "dumb" else "xterm")
    with contextlib.redirect_stderr(stream):
        assert not screen.has_terminal()
        log_of(stream).warning("a line")
    assert stream.getvalue() == "a line\n"


def test_a_closed_terminal_causes_no_error(monkeypatch):
    with on_terminal(monkeypatch):
        screen.show_status("step 1")
        monkeypatch.setattr(
            Terminal, "write", lambda self, text: (_ for _ in ()).throw(OSError(5, "Input/output error"))
        )
        screen.show_status("step 2")
        screen.end_status()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3599.7, "1 h 00 min"),
     (86399, "1 d 00 h"), (100 * 3600, "4 d 04 h")],
)  # fmt: skip
def test_durations_have_two_units(seconds, text):
    assert screen.duration(seconds) == text


def test_a_progress_bar_in_a_pipe_is_log_lines_with_percent_and_time_left(monkeypatch, caplog):
    monkeypatch.setattr(screen, "LINES_AFTER_S", 0.0)
    monkeypatch.setattr(screen, "LINES_EVERY_S", 0.0)
    caplog.set_level("INFO")
    stream = io.StringIO()
    with (
        contextlib.redirect_stderr(stream),
        screen.progress_bar(desc="examine", unit="file", total=4) as bar,
        screen.progress_bar(desc="embed", unit="image") as endless,
        screen.progress_bar(desc="verify", unit="B", total=2000, unit_scale=True) as sized,
        screen.progress_bar(desc="off", unit="file", total=4, disable=True) as off,
    ):
        for one in (bar, endless, sized, off):
            one.update(1)
    text = caplog.text
    assert re.search(r"examine: 25 %, 1 of 4 files, ETA \d", text)
    assert re.search(r"embed: 1 images in \d+ s", text)
    assert "verify: 0 %, 1.00 of 2.00kB, ETA" in text
    assert "off" not in text
    assert stream.getvalue() == ""


def test_a_quick_progress_bar_in_a_pipe_prints_nothing(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(screen, "LINES_AFTER_S", 1000.0)
    with contextlib.redirect_stderr(io.StringIO()), screen.progress_bar(desc="examine", unit="file", total=2) as bar:
        bar.update(2)
    assert caplog.messages == []


def test_libraries_log_only_warnings_and_the_program_its_steps():
    code = """
import logging
from univitar_ds.screen import log_to_screen
log_to_screen()
for name in ("torch._subclasses", "univitar_ds.convert"):
    logging.getLogger(name).info("a step of %s", name)
    logging.getLogger(name).warning("a warning of %s", name)
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    said = [line.partition(" ")[2] for line in result.stderr.splitlines()]
    assert said == [
        "WARNING a warning of torch._subclasses",
        "INFO a step of univitar_ds.convert",
        "WARNING a warning of univitar_ds.convert",
    ]
