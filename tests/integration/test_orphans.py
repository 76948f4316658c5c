"""A run of several processes leaves no processes after `kill -9` and no files in /dev/shm."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.finished import run_config
from tests.support.processes import Program
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import dump_config
from univitar_ds.processes import command

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
BIN = Path(sys.executable).parent
TRAIN = [str(BIN / "univitar-ds"), "train", "--nproc", "2", "--config", "run.yaml", "evaluation.sources=[]"]
LONG = [*TRAIN, "stages.0.samples=100000", "logging.every_steps=1", "data.lanes=2", "data.workers=1"]
SMALL_SHM = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && "$@"; code=$?; ls /dev/shm; exit $code'
APART = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_SHM, "sh"]
NAMES = {"launcher": "DeepSpeed's launcher", "rank": "a rank"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("orphans")
    shards = write_demo_shards(folder / "shards", images=48, videos=16, shards=2)
    dump_config(run_config(shards, output=str(folder / "runs")), folder / "run.yaml")
    return folder


def logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("victim", ["parent", "launcher", "rank"])
def test_all_processes_of_a_run_end_with_one_that_is_killed(victim, folder):
    run = folder / "runs" / victim
    with Program([*LONG, f"name={run.name}"], folder) as program:
        program.wait_for(lambda: logged(run) >= 2)
        (rank,) = (pid for pid in program.pids(RANK="1") if b"univitar_ds.launch" in command(pid))
        (launcher,) = (pid for pid in program.pids() if b"deepspeed.launcher.launch" in command(pid))
        os.kill({"parent": program.process.pid, "launcher": launcher, "rank": rank}[victim], signal.SIGKILL)
        program.wait_for(lambda: not program.pids(), running=False)
        code = program.ends()
        assert code == (-signal.SIGKILL if victim == "parent" else 128 + signal.SIGKILL), program.said()[-3000:]
        if victim != "parent":
            assert f"error: {NAMES[victim]} was ended by SIGKILL" in program.said()


def test_a_run_needs_no_space_in_dev_shm_and_leaves_no_file_there(folder):
    if subprocess.run([*APART, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small /dev/shm in a namespace of its own")
    compiled = folder / "compiled"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(compiled)}
    ended = subprocess.run(
        [*APART, *TRAIN, "name=small", "data.workers=1", "data.lanes=2"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads((folder / "runs" / "small" / "summary.json").read_text())["ranks"] == 2
    assert "deepspeed" not in ended.stdout, ended.stdout
    assert not compiled.exists() or not list(compiled.iterdir()), "a run on the CPU needs nothing that is compiled"
