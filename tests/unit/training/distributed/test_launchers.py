"""Launchers' variables: complete ones make a rank, leftover ones are refused or ignored."""

import os
import socket
import subprocess
import sys

import pytest

from univitar_ds.errors import ConfigError
from univitar_ds.training.distributed import rendezvous
from univitar_ds.training.distributed.launchers import RANK_NAMES, forget_launchers, is_rank
from univitar_ds.training.distributed.ports import free_ports

FIVE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
ELSE = {"HOME": "/root", "PATH": "/bin", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize(
    "environment",
    [{}, SALLOC, {**SALLOC, "SLURM_STEP_NUM_TASKS": "1"}, OMPI, {"PMI_SIZE": "1", "PMI_RANK": "0"},
     dict.fromkeys(RANK_NAMES, ""),
     {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}],
    ids=["nothing", "salloc", "a step of one task", "mpirun -n 1", "PMI of one", "empty", "train.sbatch with one task"],
)  # fmt: skip
def test_this_process_is_alone(environment):
    assert not is_rank({**ELSE, **environment})


@pytest.mark.parametrize("extra", [{}, SALLOC, OMPI, {**STEP, "TORCHELASTIC_RUN_ID": "x"}])
def test_all_five_make_a_rank_and_numbers_of_mpi_are_removed(extra):
    environment = {**ELSE, **FIVE, **extra}
    assert is_rank(environment)
    assert {name: environment[name] for name in FIVE} == FIVE
    assert not [name for name in environment if name.startswith("OMPI_")]  # DeepSpeed compares its local rank with ours


def test_a_step_of_several_tasks_makes_a_rank():
    environment = {**STEP, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert is_rank(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("3", "8")


@pytest.mark.parametrize("names", [["RANK"], ["WORLD_SIZE"], ["RANK", "WORLD_SIZE"], ["MASTER_ADDR", "MASTER_PORT"],
                                   [name for name in FIVE if name != "LOCAL_RANK"]])  # fmt: skip
def test_a_part_of_the_five_is_refused_with_the_list_and_how_to_unset_them(names):
    with pytest.raises(ConfigError) as refused:
        is_rank({**ELSE, **{name: FIVE[name] for name in names}})
    text = str(refused.value)
    present, absent = text.split(" set and ")
    assert all(name in present for name in names)
    assert all(name in absent.split(" not, ")[0] for name in FIVE if name not in names)
    assert f"env {' '.join(f'-u {name}' for name in names)} univitar-ds train" in text
    assert "--nproc" in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"RANK": "abc"}, "RANK is 'abc', which is not an integer"),
     ({"RANK": "2"}, "RANK is 2, allowed is 0 to 1 if WORLD_SIZE is 2"),
     ({"RANK": "-1"}, "RANK is -1, allowed is 0 to 1"),
     ({"LOCAL_RANK": "5"}, "LOCAL_RANK is 5, allowed is 0 to 1"),
     ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0, allowed is 1 to 1048576"),
     ({"WORLD_SIZE": "99999999999"}, "WORLD_SIZE is 99999999999, allowed is 1 to 1048576"),
     ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0', which is not an integer"),
     ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999, allowed is 1 to 65535"),
     ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', which is not an integer"),
     ({"SLURM_STEP_NUM_TASKS": "abc"}, "SLURM_STEP_NUM_TASKS is 'abc', which is not an integer"),
     ({"OMPI_COMM_WORLD_SIZE": "abc"}, "OMPI_COMM_WORLD_SIZE is 'abc', which is not an integer"),
     (STEP, "WORLD_SIZE is 2 and SLURM_STEP_NUM_TASKS 8"),
     ({"OMPI_COMM_WORLD_SIZE": "4"}, "WORLD_SIZE is 2 and OMPI_COMM_WORLD_SIZE 4")],
)  # fmt: skip
def test_impossible_values_are_refused_with_a_message(changed, said):
    with pytest.raises(ConfigError) as refused:
        is_rank({**FIVE, **changed})
    assert said in str(refused.value)
    assert "env -u " in str(refused.value)


@pytest.mark.parametrize("sizes", [{"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
                                   {"PMI_SIZE": "2", "PMI_RANK": "0"}, {"MV2_COMM_WORLD_SIZE": "4"}])  # fmt: skip
def test_several_processes_of_mpirun_are_refused_before_each_trains_a_run_of_its_own(sizes):
    with pytest.raises(ConfigError, match=r"torchrun, deepspeed or srun.*env -u "):
        is_rank({**ELSE, **sizes})


def test_a_step_whose_task_has_no_number_is_refused():
    with pytest.raises(ConfigError, match="SLURM_PROCID and SLURM_LOCALID is not set"):
        is_rank({"SLURM_STEP_NUM_TASKS": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"})


def test_only_variables_of_launchers_are_removed():
    stray = {**FIVE, **OMPI, **STEP, "PMI_RANK": "0", "PMIX_NAMESPACE": "x", "LOCAL_WORLD_SIZE": "2", "CROSS_SIZE": "1",
             "TORCHELASTIC_RESTART_COUNT": "0", "GROUP_RANK": "0", "MPI_LOCALRANKID": "0"}  # fmt: skip
    kept = {**ELSE, "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_RESTART_COUNT": "1", "AZUREML_RUN_ID": "r"}
    environment = {**stray, **kept}
    assert forget_launchers(environment) == sorted(stray)
    assert environment == kept
    assert forget_launchers(environment) == []


MEET = """
import os, sys
from datetime import timedelta
from univitar_ds.errors import UserError
from univitar_ds.training.distributed.rendezvous import meet
try:
    store = meet(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=float(sys.argv[1])))
    print("met")
    sys.stdin.read()
except UserError as error:
    print(error)
"""


def ranks(numbers, size, seconds, port):
    """The output of each of these ranks. All end when all have printed something."""
    processes = []
    for rank in numbers:
        five = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        slurm = {"SLURMD_NODENAME": "here", "SLURM_STEP_NODELIST": "here,there"}
        environment = {**os.environ, **slurm, **{name: str(value) for name, value in five.items()}}
        command = [sys.executable, "-c", MEET, str(seconds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    said = [process.stdout.readline().strip() for process in processes]
    for process in processes:
        process.communicate()
    return said


@pytest.mark.distributed
def test_ranks_that_have_all_started_connect():
    assert ranks([0, 1], 2, 200, free_ports()[0]) == ["met", "met"]


@pytest.mark.distributed
def test_a_rank_without_an_answer_names_the_variables_that_make_it_a_rank_and_how_to_unset_them():
    port = free_ports()[0]
    for number, said in ((0, "rank 1 did not answer within 1 s; "), (1, f"127.0.0.1:{port}, within 1 s; ")):
        (text,) = ranks([number], 2, 1, port)
        assert said in text
        assert number == 1 or "ranks have answered from here, none from there; RANK=0" in text
        assert f"RANK={number}, WORLD_SIZE=2, LOCAL_RANK={number}, MASTER_ADDR=127.0.0.1, MASTER_PORT={port}" in text
        assert "env -u RANK -u WORLD_SIZE -u LOCAL_RANK -u MASTER_ADDR -u MASTER_PORT univitar-ds train" in text


@pytest.mark.slow
@pytest.mark.distributed
def test_every_started_rank_names_the_missing_one():
    said = ranks([0, 2], 3, 30, free_ports()[0])
    assert all(text.startswith("rank 1 did not answer within 30 s; ") for text in said), said


def test_a_connection_to_itself_is_not_the_port_of_rank_0(monkeypatch):
    with socket.socket() as alone:
        alone.bind(("127.0.0.1", 0))
        alone.connect(alone.getsockname())  # TCP allows both ends of a connection to be one socket
        monkeypatch.setattr(socket, "create_connection", lambda *_, **__: alone)
        with pytest.raises(TimeoutError, match=r"nothing listens at 127\.0\.0\.1:7"):
            rendezvous._wait_for_port("127.0.0.1", 7, deadline=0.0)
