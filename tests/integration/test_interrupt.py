"""Ctrl-C in a terminal: the signal reaches every process of the command, launcher, ranks and decoders."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.finished import run_config
from tests.support.processes import Program
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import dump_config
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.formats import checkpoint_dir
from univitar_ds.processes import children, command
from univitar_ds.training.distributed.preemption import SAVED

pytestmark = pytest.mark.distributed
BIN = Path(sys.executable).parent
TRAIN = [str(BIN / "univitar-ds"), "train", "--config", "run.yaml", "stages.0.samples=100000", "logging.every_steps=1"]
LONG = [*TRAIN, "checkpoint.every_steps=100000", "data.lanes=2", "data.workers=1", "evaluation.sources=[]"]
AT_ONCE = "SIGINT: exiting immediately, the last checkpoint stays"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    shards = write_demo_shards(folder / "shards", images=48, videos=16, shards=2)
    dump_config(run_config(shards, output=str(folder / "runs")), folder / "run.yaml")
    return folder


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def unexpected(lines: list[str]) -> list[str]:
    """Returns the lines without those of steps and of a pack that is not full, which a decoder may find at any time."""
    return [line for line in lines if " INFO step " not in line and "% full" not in line]


def resume(run: Path, nproc: object) -> str:
    return f"continue the run with `univitar-ds train --resume {run} --nproc {nproc}`"


@pytest.mark.slow
@pytest.mark.parametrize("nproc", ["1", "2"])
def test_the_first_ctrl_c_ends_the_run_as_sigterm_with_one_line(nproc, folder):
    run = folder / "runs" / f"once-{nproc}"
    with Program([*LONG, "--nproc", nproc, f"name={run.name}"], folder) as program:
        program.wait_for(lambda: len(steps(run)) >= 2)
        before = len(program.said().splitlines())
        program.press_ctrl_c()
        assert program.ends() == SAVED, program.said()[-3000:]
        program.wait_for(lambda: not program.pids(), running=False)
        (line,) = unexpected(program.said().splitlines()[before:])
    (saved,) = checkpoint_dir.complete(run / CHECKPOINTS)
    assert saved.name == f"step-{steps(run)[-1]:08d}"
    assert f"saving step {steps(run)[-1]}" in line
    assert line.endswith(f"; {resume(run, nproc)}")
    assert json.loads((run / "summary.json").read_text())["completed"] is False


@pytest.mark.slow
def test_the_second_ctrl_c_ends_the_run_at_once_with_one_line(folder):
    run = folder / "runs" / "twice"
    with Program([*LONG, "--nproc", "2", f"name={run.name}"], folder) as program:
        program.wait_for(lambda: len(steps(run)) >= 2)
        (rank,) = (pid for pid in program.pids(RANK="1") if b"univitar_ds.launch" in command(pid))
        os.kill(rank, signal.SIGSTOP)  # so that no step ends
        before = len(program.said().splitlines())
        program.press_ctrl_c()
        while program.process.poll() is None:  # two signals in quick succession count as one
            program.wait_for(lambda: True, running=False)
            program.press_ctrl_c()
        assert program.ends() == 128 + signal.SIGINT
        program.wait_for(lambda: not program.pids(), running=False)
        assert unexpected(program.said().splitlines()[before:]) == [f"{AT_ONCE}; {resume(run, 2)}"]


@pytest.mark.slow
def test_ctrl_c_during_the_start_of_ranks_ends_them_with_one_line(folder):
    with Program([*LONG, "--nproc", "2", "name=early"], folder) as program:
        program.wait_for(lambda: program.pids(RANK="1"))
        program.press_ctrl_c()
        assert program.ends() == 128 + signal.SIGINT, program.said()[-3000:]
        program.wait_for(lambda: not program.pids(), running=False)
        lines = [line for line in program.said().splitlines() if " WARNING " not in line and " INFO " not in line]
        assert lines == [f"{AT_ONCE}; {resume(folder / 'runs' / 'early', 2)}"]


def test_packing_ends_with_one_line_and_can_be_repeated(folder):
    images = folder / "images"
    images.mkdir()
    Image.new("RGB", (3000, 3000), (9, 99, 199)).save(images / "0.png")
    (images / "0.txt").write_text("blue")
    for number in range(1, 300):
        for extension in ("png", "txt"):
            os.link(images / f"0.{extension}", images / f"{number}.{extension}")
    command = [str(BIN / "univitar-ds"), "data", "pack", str(images), str(folder / "packed"), "--workers", "2"]
    with Program(command, folder) as program:
        parent = program.process.pid
        program.wait_for(lambda: any(map(children, children(parent))))  # the children of the server that forks workers
        program.press_ctrl_c()
        assert program.ends() == 130, program.said()[-3000:]
        program.wait_for(lambda: not program.pids(), running=False)
        assert "Traceback" not in program.said(), program.said()[-3000:]
        assert program.said().splitlines()[-1] == "interrupted"
    assert not (folder / "packed" / "manifest.json").exists()
