"""stdout as it may be: ASCII, closed, a pipe without a reader, a full disk. Real processes of the command."""

import json
import os
import subprocess
import sys

import pytest

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
    assert r"nowhere/k\xf6pek holds neither" in result.stderr


def test_a_reader_that_has_left_ends_a_command_quietly(run):
    read, write = os.pipe()
    os.close(read)
    result = ended([run], stdout=write)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_a_sentence(run):
    with open("/dev/full", "wb") as full:
        result = ended([run], stdout=full)
    assert result.returncode == 2
    assert "stdout takes no more (No space left on device)" in result.stderr
    assert "Traceback" not in result.stderr


def test_closed_streams_are_as_good_as_none(run):
    shell = f"exec {' '.join(COMMAND)} {run} >&- 2>&- <&-"
    assert subprocess.run(["/bin/sh", "-c", shell], check=False).returncode == 0
