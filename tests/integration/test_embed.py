"""`univitar-ds embed` on two processes, killed in the middle and continued on another number of processes."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.finished import run_config, write_run
from tests.support.processes import Program
from tests.support.shards import write_demo_shards
from tests.unit.inference.folders import BAD, IMAGES, files_of, left_out, write_media

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
COMMAND = [str(Path(sys.executable).parent / "univitar-ds"), "embed", "run"]
COPIES, PART = 200, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run, shards, and a folder with many hard links to each image."""
    folder = tmp_path_factory.mktemp("embedded")
    write_run(folder / "run", run_config())
    write_demo_shards(folder / "shards", images=20, videos=6, shards=2)
    files = write_media(folder / "files")
    for index in range(IMAGES):
        for copy in range(COPIES):
            os.link(files / f"i{index:02d}.png", files / f"copy{copy:03d}-{index}.png")
    return folder


def command(out: Path, nproc: int) -> list[str]:
    out.parent.mkdir(exist_ok=True)
    sources = ["files", "shards", "--out", str(out), "--part-rows", str(PART), "--workers", "1"]
    return [*COMMAND, *sources, "--nproc", str(nproc)]


def test_a_killed_call_continues_on_another_number_of_processes(folder):
    whole, out = folder / "whole" / "f.safetensors", folder / "killed" / "f.safetensors"
    with Program(command(whole, 1), folder) as program:
        assert program.ends() == 0, program.said()
    record = out.parent / ".f.safetensors.progress" / "part-00002.json"
    with Program(command(out, 2), folder) as program:
        program.wait_for(record.exists)
        assert len(program.pids()) > 4  # two processes, their decoders and the server of the processes
        os.kill(program.process.pid, signal.SIGKILL)
        program.process.wait()
        program.wait_for(lambda: not program.pids(), running=False)
    assert not (out.parent / "f.safetensors.index.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.parent.glob("f-*.safetensors")}
    assert set(before) >= {"f-00000.safetensors", "f-00001.safetensors", "f-00002.safetensors"}
    finished = [name for name in before if (record.with_name(f"part-{name[2:7]}.json")).exists()]
    with Program(command(out, 2), folder) as program:
        assert program.ends() == 0, program.said()
        assert f"{len(BAD)} left out" in program.said()
    assert {name: (out.parent / name).stat().st_mtime_ns for name in finished} == {
        name: before[name] for name in finished
    }
    assert files_of(out.parent) == files_of(whole.parent)
    assert not record.parent.exists()
    assert {Path(key).name for key in left_out(out)} == set(BAD)
    index = json.loads((out.parent / "f.safetensors.index.json").read_bytes())
    assert len(index["parts"]) > 20
    assert len(index["key"]) == sum(part["rows"] for part in index["parts"])


def test_ctrl_c_ends_all_processes_and_keeps_finished_parts(folder):
    out = folder / "stopped" / "f.safetensors"
    with Program(command(out, 2), folder) as program:
        program.wait_for((out.parent / ".f.safetensors.progress" / "part-00000.json").exists)
        program.press_ctrl_c()
        assert program.ends() == 130, program.said()
        program.wait_for(lambda: not program.pids(), running=False)
        assert "Traceback" not in program.said()
    assert not list(out.parent.glob("*.partial"))
    assert (out.parent / "f-00000.safetensors").exists()
