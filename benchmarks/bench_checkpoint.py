"""Measures how long the training waits for a checkpoint, and how much it slows down while one is written.

    python benchmarks/bench_checkpoint.py [--megabytes 400] [--repeats 5] [--folder /tmp] [--busy]

One rank of one thread trains nothing: its state is a number of tensors, and a step is three matrix products.
`synchronous_s` is the time of a save that the training waits for. `pause_s` is what an asynchronous one takes from the
training: the copy to host memory, the preparation of the folder, and continuing at later steps; `pause_pct` is its
share. `first_pause_s` is that of the first save, which gets the memory from the system. `slowdown_pct` compares the
median time of the steps while the thread writes and reads back with that of as many steps without a save, in turns, so
that other load affects both; on cores that are busy with other programs it is mostly the share of the thread.
`slowdown_cpu_pct` compares the CPU time of the steps instead, which such a share does not change. The files of both
kinds are compared byte for byte. With `--busy` a process keeps another core busy, so that no core is free for the
thread. Rows are added to results/bench_checkpoint.csv.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.rows import RESULTS, add_rows, git_commit, processor, rounded
from univitar_ds.training.checkpoint.atomic_dir import LocalFolder
from univitar_ds.training.checkpoint.protocol import Retention
from univitar_ds.training.checkpoint.saves import Saves
from univitar_ds.training.checkpoint.sharded import copied_state
from univitar_ds.training.checkpoint.staging import Staging
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.engine.engine import ParamShard

TENSOR = 1 << 20
"""Elements of a parameter, about those of a matrix of the 0.3B encoder."""
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
SIDE = 640
"""Rows and columns of the matrices that a step multiplies."""
RETENTION = Retention(1)


def engine_of(megabytes: int) -> Any:
    """Returns an object with the parts of an engine that a save needs, and a training state of this size."""
    count = max(1, megabytes * 10**6 // (4 * TENSOR * len(KINDS)))
    pieces = [
        ParamShard(f"layers.{number}", (TENSOR,), 0, {kind: torch.randn(TENSOR) for kind in KINDS})
        for number in range(count)
    ]
    return SimpleNamespace(
        world=World(0, 1, 0, torch.device("cpu")),
        module=nn.Module(),
        pieces=lambda: pieces,
        optimizer_state=lambda: {"updates": 1.0, "groups": [], "global_steps": 1},
    )


class Training:
    """Runs steps of a training, and continues asynchronous saves between them."""

    def __init__(self, saves: Saves) -> None:
        self._saves = saves
        self._matrix = torch.randn(SIDE, SIDE)

    def step(self) -> tuple[float, float, float]:
        """Returns the seconds and the CPU seconds of a step, and the seconds of continuing a save before it."""
        begin = time.perf_counter()
        self._saves.raise_failed()
        if self._saves.ready():
            self._saves.advance()
        middle, used = time.perf_counter(), time.thread_time()
        for _ in range(3):
            self._matrix @ self._matrix
        return time.perf_counter() - middle, time.thread_time() - used, middle - begin


@contextmanager
def another_core_busy(wanted: bool):
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(megabytes: int, repeats: int, folder: Path) -> dict[str, Any]:
    engine, staging = engine_of(megabytes), Staging(World(0, 1, 0, torch.device("cpu")))
    waiting, going_on = (Saves(engine.world, lambda _: None, asynchronous=on) for on in (False, True))
    training = Training(going_on)

    def save(saves: Saves, name: str, step: int) -> None:
        target = LocalFolder(folder / name / "checkpoints", step, RETENTION)
        saves.begin(target, step, lambda: copied_state(engine, {}, {}, staging))

    for name in ("waiting", "going_on"):
        (folder / name).mkdir()
    synchronous, pauses, alone, beside = [], [], [], []
    for number in range(repeats + 1):
        synchronous.append(seconds_of(lambda number=number: save(waiting, "waiting", number)))
        pause = seconds_of(lambda number=number: save(going_on, "going_on", number))
        steps = 0
        while going_on.in_flight:
            *seconds, waited = training.step()
            beside.append(seconds)
            pause += waited
            steps += 1
        pauses.append(pause)
        alone += [training.step()[:2] for _ in range(steps)]
        ours, theirs = (folder / name / "checkpoints" / f"step-{number:08d}" for name in ("waiting", "going_on"))
        names = sorted(path.name for path in ours.iterdir())
        _, mismatch, errors = filecmp.cmpfiles(ours, theirs, names, shallow=False)
        assert not mismatch, mismatch
        assert not errors, errors
    size = sum(path.stat().st_size for path in ours.iterdir())
    wait, pause = statistics.median(synchronous[1:]), statistics.median(pauses[1:])
    (step, cpu), (step_beside, cpu_beside) = (
        [statistics.median(column) for column in zip(*times, strict=True)] for times in (alone, beside)
    )
    return {
        "megabytes": round(size / 1e6),
        "synchronous_s": rounded(wait),
        "pause_s": rounded(pause),
        "pause_pct": rounded(100 * pause / wait),
        "first_pause_s": rounded(pauses[0]),
        "step_ms": rounded(1e3 * step),
        "step_while_writing_ms": rounded(1e3 * step_beside),
        "slowdown_pct": rounded(100 * (step_beside / step - 1), 2),
        "slowdown_cpu_pct": rounded(100 * (cpu_beside / cpu - 1), 2),
        "steps": len(beside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400, help="size of the training state")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind, beside a first one")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are written"
    )
    parser.add_argument("--busy", action="store_true", help="keep another core busy meanwhile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, another_core_busy(options.busy):
        found = measure(options.megabytes, options.repeats, Path(folder))
    row = {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "busy": "one core" if options.busy else "none",
        "load": round(os.getloadavg()[0], 1),
        **found,
    }
    print(row)
    add_rows(RESULTS / "bench_checkpoint.csv", [row])


if __name__ == "__main__":
    main()
