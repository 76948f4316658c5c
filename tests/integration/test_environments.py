"""Whole small runs in difficult environments: variables of launchers, folders with modules, `python -O`."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.finished import run_config
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import dump_config
from univitar_ds.training.distributed.ports import free_ports

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
BIN = Path(sys.executable).parent
FIVE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
LEFT_BEHIND = {**FIVE, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
               "PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
               "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}  # fmt: skip
HOSTILE = ("random", "types", "tempfile", "logging", "torch", "numpy", "tokenizers", "kernels", "deepspeed")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environments")
    shards = write_demo_shards(folder / "shards", images=48, videos=16, shards=2)
    data = {"sources": [{"path": str(shards)}], "workers": 1}
    config = run_config(shards, output=str(folder / "runs"), data=data, logging={"peak_tflops": 0.05})
    dump_config(config, folder / "run.yaml")
    return folder / "run.yaml"


def ended(command, cwd=None, **environment) -> subprocess.CompletedProcess[str]:
    quiet = {name: value for name, value in os.environ.items() if name not in LEFT_BEHIND and name != "PYTHONSAFEPATH"}
    environment = {**quiet, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("nproc", [1, 2])
def test_with_nproc_a_run_ignores_variables_of_launchers_in_the_shell(run_file, nproc):
    name = f"left-{nproc}"
    command = [BIN / "univitar-ds", "train", "--config", run_file, "--nproc", nproc, f"name={name}"]
    result = ended(command, **LEFT_BEHIND)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "variables of launchers are ignored: LOCAL_RANK, MASTER_ADDR, MASTER_PORT, OMPI_COMM_WORLD" in result.stderr
    summary = json.loads((run_file.parent / "runs" / name / "summary.json").read_text())
    assert (summary["completed"], summary["ranks"]) == (True, nproc)


def test_torchrun_determines_the_ranks_in_a_shell_of_mpirun(run_file):
    port = str(free_ports()[0])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--master-port", port, "--nproc-per-node", "2"]
    command = [*launcher, "-m", "univitar_ds", "train", "--config", run_file, "name=in-mpi"]
    result = ended(command, OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_LOCAL_RANK="0")
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((run_file.parent / "runs" / "in-mpi" / "summary.json").read_text())["ranks"] == 2


START = {
    "one process": ([BIN / "univitar-ds", "train"], {}),
    "two processes": ([BIN / "univitar-ds", "train", "--nproc", "2"], {}),
    "torchrun": ([BIN / "torchrun", "--master-port", "PORT", "--nproc-per-node", "2", "-m", "univitar_ds", "train"],
                 {}),
    "deepspeed": ([BIN / "deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--module", "univitar_ds", "train"],
                  {"PYTHONSAFEPATH": "1"}),
}  # fmt: skip


@pytest.mark.parametrize("start", START)
def test_a_run_imports_nothing_from_the_current_folder(run_file, tmp_path, start):
    for number, name in enumerate(HOSTILE):
        path = tmp_path / f"{name}.py" if number % 2 == 0 else tmp_path / name / "__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write('{name}')\nraise ImportError('{name}')\n")
    command, environment = START[start]
    command = [str(free_ports()[0]) if word == "PORT" else word for word in command]
    result = ended([*command, "--config", run_file, f"name=hostile-{start.split()[0]}"], cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()


def test_python_O_changes_no_bit_of_a_run_nor_of_packed_data(run_file, tmp_path):
    made = {}
    for level in ("", "1"):
        folder = tmp_path / f"level{level}"
        images = folder / "images"
        images.mkdir(parents=True)
        (images / "a.ppm").write_bytes(b"P6 40 30 255\n" + bytes(range(256))[:240] * 15)
        (images / "a.txt").write_text("a caption")
        commands = [
            ["train", "--config", run_file, f"output={folder}", "name=run", "--nproc", "1"],
            ["eval", folder / "run"],
            ["convert", "export", folder / "run", folder / "again"],
            ["data", "pack", images, folder / "packed"],
            ["data", "verify", folder / "packed", "--report", folder / "verify.json"],
        ]
        for arguments in commands:
            result = ended([sys.executable, "-m", "univitar_ds", *arguments], PYTHONOPTIMIZE=level)
            assert result.returncode == 0, (arguments, result.stderr[-3000:])
        weights = [folder / "run" / "export" / "model.safetensors", folder / "again" / "model.safetensors"]
        shards = sorted((folder / "packed").glob("*.tar"))
        assert shards
        figures = json.loads((folder / "run" / "evaluation.json").read_text())["figures"]
        made[level] = [*(hashlib.sha256(path.read_bytes()).hexdigest() for path in [*weights, *shards]), figures]
    assert made[""] == made["1"]
