"""A snapshot of the memory when an allocation fails, with a fake of torch's allocator."""

import logging

import pytest
import torch

from univitar_ds.config.run_folder import MEMORY
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.watch.memory import MemorySnapshots

SECOND = World(1, 2, 1, torch.device("cpu"))


class Allocator:
    """A fake allocator. Tests call `failed`, as torch calls its observer each time that an allocation fails.

    Args: fault: raised when a snapshot is written; None: none.
    """

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault, self.recorded, self.dumps = fault, 0, []

    def observe(self, failed):
        self.failed = failed

    def record(self, entries):
        self.recorded = entries

    def dump(self, path):
        self.dumps.append(path)
        if self.fault is not None:
            raise self.fault


@pytest.mark.parametrize("history", [False, True])
def test_the_first_failed_allocation_writes_one_snapshot(tmp_path, history, caplog):
    allocator = Allocator()
    MemorySnapshots(tmp_path, SECOND, history, allocator)
    assert allocator.dumps == []
    assert (allocator.recorded > 0) == history
    for _ in range(3):
        allocator.failed(0, 7 << 30, 80 << 30, 1 << 20)
    assert allocator.dumps == [f"{tmp_path}/{MEMORY}/rank00001.pickle"]
    assert allocator.dumps[0] in caplog.text


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("no CUDA")])
def test_an_error_while_a_snapshot_is_written_is_only_logged(tmp_path, fault, caplog):
    allocator = Allocator(fault)
    MemorySnapshots(tmp_path, SECOND, False, allocator)
    allocator.failed(0, 1, 2, 3)
    assert "no snapshot of the memory" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_without_a_gpu_no_folder_for_snapshots_is_made(tmp_path):
    MemorySnapshots(tmp_path, SECOND, True)
    assert not (tmp_path / MEMORY).exists()


def test_the_allocator_of_torch_has_what_the_snapshot_needs():
    """Private functions of torch 2.13, which are called only on a GPU."""
    assert callable(torch.cuda.memory._dump_snapshot)
    assert callable(torch.cuda.memory._record_memory_history)
