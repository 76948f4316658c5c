"""Measures the memory of conversions, and their speed next to DeepSpeed's own program.

    python benchmarks/bench_convert.py WORK memory [--size 1b]
    python benchmarks/bench_convert.py WORK speed [--size 0.3b] [--rounds 5]

WORK gets the sources, which later calls use again, and the results, which are removed at once. `memory` takes about 45
GB there for the 1B, `speed` 8 GB for the 0.3B.

`memory` converts an encoder in the layout of the release, and a run with moments in a checkpoint of 4 ranks. The limit
of a conversion is 1.2 times the largest file of weights that it writes (the largest tensor, where each has a file of
its own) plus 1 GiB. The peak is that of the process by the kernel (ru_maxrss), with mapped pages.

`speed` converts a checkpoint of DeepSpeed, ZeRO stage 3 of 2 ranks, to weights in files of at most 5 GB, alternating
between `univitar-ds convert` and `deepspeed.utils.zero_to_fp32`; each in a process of its own, with its imports.

Rows are added to results/bench_convert.csv.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# No heavy imports: the kernel counts the memory that this process has when it starts a child as the child's.
from benchmarks.rows import RESULTS, ROOT, add_rows, git_commit, processor

GIB = 1 << 30
CASES = (
    ("release", "release", "1GB"), ("release", "release", "5GB"), ("release", "release", None),
    ("release", "hf", "1GB"), ("release", "hf", "5GB"), ("release", "universal", None),
    ("run", "release", "1GB"), ("run", "hf", "1GB"), ("run", "hf", "5GB"), ("run", "hf", None),
    ("run", "universal", None), ("run", "dcp", None), ("run", "megatron", None),
)  # fmt: skip
"""Source, format, and --shard-size."""
DEEPSPEED = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert
convert(sys.argv[1], sys.argv[2], max_shard_size="5GB", safe_serialization=True)
"""


class Cost(NamedTuple):
    """Time and peak memory of a process."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("part", choices=("memory", "speed"))
    parser.add_argument("--size", help="preset of the encoder; default: 1b for memory, 0.3b for speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", metavar="TEXT", help="cases whose 'source to format' contains TEXT")
    arguments = parser.parse_args()
    about = {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    if arguments.part == "memory":
        rows = memory(arguments.work, arguments.size or "1b", arguments.only or "")
    else:
        rows = speed(arguments.work, arguments.size or "0.3b", arguments.rounds)
    for found in rows:
        sys.stderr.write(f"{found}\n")
        add_rows(RESULTS / "bench_convert.csv", [{**found, **about}])


def memory(work: Path, size: str, only: str) -> Iterator[dict[str, Any]]:
    for kind, to, shard in CASES:
        if only not in f"{kind} to {to}":
            continue
        source, out = source_of(work, kind, size), work / "out"
        cost = run(convert_command(source, out, to, shard))
        largest = largest_unit(out, to)
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        shutil.rmtree(out)
        limit = 1.2 * largest + GIB
        yield row("memory", size, f"{kind} to {to}", shard, cost, written, largest, limit)


def speed(work: Path, size: str, rounds: int) -> Iterator[dict[str, Any]]:
    source, out = source_of(work, "deepspeed", size), work / "out"
    config = ["--config-from", str(source / "config")]
    commands = {
        "zero_to_fp32": [sys.executable, "-c", DEEPSPEED, str(source), str(out)],
        "deepspeed to hf": [*convert_command(source, out, "hf", "5GB"), *config],
        "deepspeed to release": [*convert_command(source, out, "release", "5GB"), *config],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    written: dict[str, int] = {}
    for number in range(rounds):
        names = list(commands)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            costs[name].append(run(commands[name]))
            written[name] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            shutil.rmtree(out)
    for name, found in costs.items():
        middle = Cost(*(statistics.median(values) for values in zip(*found, strict=True)))
        yield row("speed", size, name, "5GB", middle, written[name], None, None)


def row(
    part: str, size: str, case: str, shard: str | None, cost: Cost, written: int, largest: int | None,
    limit: float | None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "part": part,
        "size": size,
        "case": case,
        "shard_size": shard,
        "wall_s": round(cost.wall_s, 1),
        "cpu_s": round(cost.cpu_s, 1),
        "peak_mib": round(cost.peak_bytes / (1 << 20)),
        "limit_mib": None if limit is None else round(limit / (1 << 20)),
        "largest_mib": None if largest is None else round(largest / (1 << 20)),
        "written_mib": round(written / (1 << 20)),
    }


def convert_command(source: Path, out: Path, to: str, shard: str | None) -> list[str]:
    command = [sys.executable, "-m", "univitar_ds", "convert", str(source), str(out), "--to", to]
    return command if shard is None else [*command, "--shard-size", shard]


def source_of(work: Path, kind: str, size: str) -> Path:
    """Returns the folder of a source, which is written first if it is missing."""
    folder = work / f"{kind}-{size}"
    if not folder.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        partial = work / f".{folder.name}"
        shutil.rmtree(partial, ignore_errors=True)  # of a call that was interrupted
        ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if kind == "deepspeed" else []
        module = [*ranks, "-m", "benchmarks.convert.sources", kind, size, str(partial.absolute())]
        subprocess.run([sys.executable, *module], cwd=ROOT, check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
        partial.rename(folder)
    return folder


def run(command: list[str]) -> Cost:
    """Runs a command and returns its cost. Raises: SystemExit if the command fails."""
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def largest_unit(out: Path, to: str) -> int:
    """Returns the size of the largest file, or of the largest tensor where one file has all tensors."""
    if to != "megatron":
        return max(path.stat().st_size for path in out.rglob("*") if path.is_file())
    sizes = subprocess.run(
        [sys.executable, "-m", "benchmarks.convert.largest", str(out)], cwd=ROOT, check=True, capture_output=True
    )
    return int(sizes.stdout)


if __name__ == "__main__":
    main()
