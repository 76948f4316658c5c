"""`slurm/*.sbatch` with programs in place of Slurm's; test_slurm.py uses a real Slurm.

`scontrol requeue` succeeds and then `sleep 300` ends the script, as Slurm does.
"""

import os
import subprocess
import sys
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
def test_a_run_with_a_checkpoint_is_resumed_or_examined(job, script, command):
    _, _, folder = job(script, "seed=3")
    assert f"{command} --config demo output={folder} name=run seed=3" in (folder / "started").read_text()
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "latest").write_text("step-00000001\n")
    job(script, "seed=3")
    option = "--resume" if command == "train" else "--config"
    assert f"{command} {option} {folder / 'run'} seed=3" in (folder / "started").read_text()


def test_a_conversion_forwards_its_arguments_and_returns_the_exit_code(job):
    code, _, folder = job("convert.sbatch", "--to", "hf", code=2, SRC="runs/photos", DST="out")
    assert code == 2
    assert "-m univitar_ds convert runs/photos out --to hf" in (folder / "started").read_text()
    code, said, _ = job("convert.sbatch", "--to", "hf", SRC="", DST="out")
    assert code != 0
    assert "SRC: a run, an export" in said


SRUN_OF_EVALUATIONS = """
while [ "$1" != univitar_ds ]; do shift; done
shift
if [ "$2" = table ]; then exec "$REAL" -m univitar_ds "$@"; fi
for word in "$@"; do printf '<%s>' "$word"; done >> "$FOLDER/calls"; echo >> "$FOLDER/calls"
echo "{\\"model\\": \\"$3\\", \\"data\\": \\"$5\\", \\"figures\\": [{\\"task\\": \\"$2\\", \\"measure\\": \\"top-1\\","
echo "\\"modality\\": \\"image\\", \\"value\\": 0.5, \\"chance\\": 0.1, \\"n\\": 8, \\"candidates\\": 10}]}"
[ "$3" != "$BROKEN" ]
"""


def test_an_array_of_any_number_of_jobs_measures_each_pair_once_and_collects_a_table(job, tmp_path):
    (tmp_path / "models.txt").write_text("# two models\nruns/a\nruns/b c  \n\n")
    (tmp_path / "tasks.txt").write_text("zero-shot --data pets\nknn --data 'my cars' --split test\n")
    for name, body in (("srun", SRUN_OF_EVALUATIONS), ("sleep", SLEEP)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    names = {"MODELS": str(tmp_path / "models.txt"), "TASKS": str(tmp_path / "tasks.txt"), "OUT": str(out)}
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0", "REAL": sys.executable}

    def of_array(number: int, **more: str):
        return job("eval_array.sbatch", **names, **array, SLURM_ARRAY_TASK_ID=str(number), **more)

    code, said, _ = of_array(1, BROKEN="runs/b c")
    assert code != 0
    assert "of: eval zero-shot runs/b c --data pets" in said
    assert not list(out.iterdir()), "nothing is left of a pair that failed"
    for number in (0, 1, 2):
        code, said, _ = of_array(number)
        assert code == 0, said
    code, said, _ = of_array(0)
    assert "is there" in said
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted(calls[1:]) == sorted(
        f"<eval><{task}><{model}><--data>{data}<--json>"
        for model in ("runs/a", "runs/b c")
        for task, data in (("zero-shot", "<pets>"), ("knn", "<my cars><--split><test>"))
    )
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in said.splitlines() if row.startswith("|")]
    assert rows[0][-2:] == ["a", "b c"]
    assert {(row[0], row[1], *row[-2:]) for row in rows[2:]} == {
        ("pets", "zero-shot of images", "50.0 %", "50.0 %"),
        ("my cars", "knn of images", "50.0 %", "50.0 %"),
    }
    assert (out / "table.md").read_text().strip() in said
    assert len((out / "table.csv").read_text().splitlines()) == 5


def test_an_array_without_models_is_an_error_message(job, tmp_path):
    (tmp_path / "models.txt").write_text("# none\n")
    (tmp_path / "tasks.txt").write_text("zero-shot --data pets\n")
    names = {name: str(tmp_path / f"{name.lower()}.txt") for name in ("MODELS", "TASKS")}
    code, said, _ = job("eval_array.sbatch", OUT=str(tmp_path / "out"), **names)
    assert code == 2
    assert "has 0 models and" in said


def test_the_scripts_have_no_syntax_errors():
    for script in sorted((ROOT / "slurm").glob("*.sbatch")):
        subprocess.run(["bash", "-n", str(script)], check=True, env=os.environ)
