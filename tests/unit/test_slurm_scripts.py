"""What `slurm/*.sbatch` do, with programs in the place of Slurm's; test_slurm.py has a real Slurm.

`scontrol requeue` succeeds and then `sleep 300` ends the script, as Slurm does.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SCONTROL = """
case $1 in
show) if [ "$2" = hostnames ]; then echo a; echo b; else echo "JobId=7 JobState=$STATE PreemptTime=None "; fi ;;
requeue) echo "$*" >> "$FOLDER/requeued"; exit "${REFUSED:-0}" ;;
esac
"""
SRUN = """
case " $* " in
*univitar_ds*) echo "$*" > "$FOLDER/started"; exit "$CODE" ;;
*" --nodes=1 "*) exit "${HERE:-0}" ;;
*) exit "${THERE:-0}" ;;
esac
"""
SLEEP = '[ "$1" = 300 ] && kill -KILL $PPID; exit 0'


@pytest.fixture
def job(tmp_path):
    """Runs a script as a job whose trainer ends with `code`. Returns its exit code, what it printed, its folder."""
    for name, body in (("scontrol", SCONTROL), ("srun", SRUN), ("sleep", SLEEP)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(script: str, *arguments: str, code: int = 0, state: str = "RUNNING", **variables: str):
        slurm = {"JOB_ID": "7", "JOB_NODELIST": "a,b", "JOB_NUM_NODES": "2", "SUBMIT_DIR": str(ROOT)}
        environment = {f"SLURM_{name}": value for name, value in slurm.items()} | {"SLURMD_NODENAME": "a"}
        environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "FOLDER": str(tmp_path), "CODE": str(code), "STATE": state}
        names = {"RUN": str(tmp_path / "run"), "CONFIG": "demo", "PYTHON": "python", **variables}
        done = subprocess.run(
            ["bash", str(ROOT / "slurm" / script), *arguments],
            env={**environment, **names},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr, tmp_path

    return run


def requeued(folder: Path) -> bool:
    return (folder / "requeued").exists()


@pytest.mark.parametrize(
    ("code", "state", "again"),
    [
        (85, "RUNNING", True),
        (85, "SIGNALING", True),  # Slurm still delivers the signal that made the run save
        (85, "CANCELLED", False),
        (85, "COMPLETING", False),
        (0, "RUNNING", False),
        (2, "RUNNING", False),
        (143, "RUNNING", False),
    ],
)
def test_only_a_run_that_has_saved_is_requeued_and_not_after_scancel(job, code, state, again):
    ended, said, folder = job("train.sbatch", code=code, state=state)
    assert requeued(folder) == again, said
    assert again or ended == code


def test_a_requeue_that_the_controller_refuses_is_tried_again(job):
    ended, said, folder = job("train.sbatch", code=85, REFUSED="1")
    assert ended == 85
    assert (folder / "requeued").read_text().count("requeue 7") == 5, said


@pytest.mark.parametrize(
    ("here", "there", "again"),
    [("0", "1", True), ("0", "0", False), ("1", "1", False)],
    ids=["a node is lost", "both nodes work", "a Slurm that starts no second step"],
)
@pytest.mark.parametrize("code", [1, 2, 143])
def test_a_run_that_lost_a_node_is_requeued(job, code, here, there, again):
    _, said, folder = job("train.sbatch", code=code, HERE=here, THERE=there)
    assert requeued(folder) == again, said
    assert ("does not start tasks any more" in said) == again


@pytest.mark.parametrize(("script", "command"), [("train.sbatch", "train"), ("preflight.sbatch", "doctor")])
def test_a_run_that_has_a_checkpoint_is_continued_or_examined_as_it_is(job, script, command):
    _, _, folder = job(script, "seed=3")
    assert f"{command} --config demo output={folder} name=run seed=3" in (folder / "started").read_text()
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "latest").write_text("step-00000001\n")
    job(script, "seed=3")
    option = "--resume" if command == "train" else "--config"
    assert f"{command} {option} {folder / 'run'} seed=3" in (folder / "started").read_text()


def test_a_conversion_passes_its_arguments_on_and_its_code_back(job):
    code, _, folder = job("convert.sbatch", "--to", "hf", code=2, SRC="runs/photos", DST="out")
    assert code == 2
    assert "-m univitar_ds convert runs/photos out --to hf" in (folder / "started").read_text()
    code, said, _ = job("convert.sbatch", "--to", "hf", SRC="", DST="out")
    assert code != 0
    assert "SRC: a run, an export" in said


def test_the_scripts_have_no_faults_of_syntax():
    for script in sorted((ROOT / "slurm").glob("*.sbatch")):
        subprocess.run(["bash", "-n", str(script)], check=True, env=os.environ)
