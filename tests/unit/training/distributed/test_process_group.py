import pytest
import torch
import torch.distributed as dist

from univitar_ds.errors import ConfigError
from univitar_ds.training.distributed import process_group
from univitar_ds.training.distributed.process_group import World, check_gpus, rank_zero_first, start_world, uses_cuda

SIGNS = ("CUDA_VISIBLE_DEVICES", "CROSS_SIZE", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "DS_ACCELERATOR")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes this machine look like one with so many GPUs that torch can use, and this environment."""

    def like(gpus: int, **environment: str) -> None:
        for name in SIGNS + RANKS:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(process_group, "DEVICES", tmp_path)

    return like


def test_lanes_are_shared_in_ranges_and_all_of_them():
    assert [world(rank, 2).lanes(6) for rank in range(2)] == [[0, 1, 2], [3, 4, 5]]


def test_a_number_of_ranks_that_does_not_divide_the_lanes_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"lanes is 6 .* 4 ranks; run 1, 2, 3, 6 ranks"):
        world(0, 4).lanes(6)


def test_a_run_uses_gpus_if_there_are_any_unless_deepspeed_is_set_to_the_cpu(machine):
    machine(2)
    assert uses_cuda()
    machine(2, DS_ACCELERATOR="cuda")
    assert uses_cuda()
    machine(2, DS_ACCELERATOR="cpu")
    assert not uses_cuda()
    machine(0)
    assert not uses_cuda()


def test_more_processes_than_gpus_are_refused_unless_they_train_on_the_cpu(machine):
    machine(1)
    check_gpus(1)
    with pytest.raises(ConfigError, match=r"2 processes .* torch sees 1; start at most 1 .*or set DS_ACCELERATOR=cpu"):
        check_gpus(2)
    machine(1, DS_ACCELERATOR="cpu", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    check_gpus(2)


def test_a_rank_without_a_gpu_is_refused_before_it_waits_for_the_others(machine):
    machine(1, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    with pytest.raises(ConfigError, match="2 processes"):
        start_world()


@pytest.mark.parametrize(
    ("environment", "reported"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES is 0,1"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f2e"}, "CUDA_VISIBLE_DEVICES is GPU-8f2e"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE is 8"),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS is 0"),
    ],
)
def test_unusable_gpus_are_an_error_and_not_silently_replaced_by_the_cpu(machine, environment, reported):
    machine(0, **environment)
    with pytest.raises(ConfigError, match=rf"{reported}, but torch .* or set DS_ACCELERATOR=cpu to train on the CPU"):
        start_world()
    machine(0, **environment, DS_ACCELERATOR="cpu")
    check_gpus(1)


def test_a_device_file_shows_a_gpu_that_torch_cannot_use_unless_it_is_hidden(machine, tmp_path):
    (tmp_path / "nvidia3").touch()
    (tmp_path / "nvidiactl").touch()
    machine(0)
    with pytest.raises(ConfigError, match=r"nvidia3 exists, but torch"):
        check_gpus(1)
    for hidden in ("", "-1", "NoDevFiles"):
        machine(0, CUDA_VISIBLE_DEVICES=hidden)
        check_gpus(1)


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_GPUS_ON_NODE": "0"}, {"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}],
    ids=["a laptop", "a job without GPUs", "DeepSpeed's launcher on a laptop"],
)
def test_a_machine_without_gpus_trains_on_the_cpu(machine, environment):
    machine(0, **environment)
    check_gpus(2)


@pytest.mark.parametrize("built", [None, "13.0"])
def test_the_remedy_for_a_gpu_that_cannot_be_used_depends_on_how_torch_was_built(machine, monkeypatch, built):
    machine(0, CUDA_VISIBLE_DEVICES="0")
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(ConfigError, match="a driver for CUDA 13.0" if built else "install a CUDA build of torch"):
        check_gpus(1)


@pytest.mark.parametrize("ranks", [{}, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}])
def test_nccl_gets_the_gpu_of_this_rank(machine, monkeypatch, ranks):
    machine(2, **ranks)
    chosen, given = [], {}
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(process_group, "meet", lambda rank, size: dist.HashStore())
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: given.update(more, backend=backend))
    ours = start_world()
    assert ours.device == torch.device("cuda", 1 if ranks else 0)
    assert (given["backend"], given["device_id"], chosen) == ("nccl", ours.device, [ours.device])
    assert (given["rank"], given["world_size"]) == ((3, 4) if ranks else (0, 1))


def test_gloo_is_taken_beside_a_gpu_that_the_run_does_not_use(machine, monkeypatch):
    machine(1, DS_ACCELERATOR="cpu", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    given = {}
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(process_group, "meet", lambda rank, size: dist.HashStore())
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: given.update(more, backend=backend))
    assert start_world().device == torch.device("cpu")
    assert (given["backend"], given["device_id"]) == ("gloo", None)


def test_a_single_rank_prepares_by_itself():
    done = []
    rank_zero_first(world(0, 1), lambda: done.append("prepared"))
    assert done == ["prepared"]
