"""Compares the cost of the loader with a bare loop, webdataset with a DataLoader, and megatron-energon.

    python benchmarks/bench_loader.py SHARDS [--rounds 3] [--peer-python PYTHON] [--s3]
    python benchmarks/bench_loader.py SHARDS --before CHECKOUT --contenders ours bare
    python benchmarks/bench_loader.py SHARDS --contenders ours --augment crop flip jitter hue grey
    python benchmarks/bench_loader.py SHARDS --curve 30 [--s3] [--sizes native_8k]

SHARDS is a folder written by `univitar-ds data pack`, with at least four shards, so that all contenders can split the
shards among workers. Each contender of `loader/contenders.py` runs in a separate process. All contenders run once per
round, so that the rows of a round have the same conditions. A row has: CPU seconds per 1,000 samples of the process and
all its descendants, over whole epochs after warm-up; samples per second; memory; and for ours the seconds from the
start of all decoding processes to the first pack. Ratios are medians over the rounds. `pip install -e '.[bench]'`
installs psutil, `pip install -e '.[energon]'` installs energon for --contenders ours bare webdataset energon.
--peer-python is the Python of another environment with these packages. --s3 adds a row for ours that reads the same
shards from a store on this machine (moto), whose CPU time is not counted. --before adds rows of another checkout of
this project, run by the .venv of that checkout. --augment adds rows of ours with these augmentations, each alone.
--curve MINUTES writes the memory of ours over time to results/bench_loader_pages.csv, with --s3 for shards in such a
store.

Memory is the proportional set size (a page shared by n processes counts 1/n in each) of the trainer's process and the
decoding processes, shared slots included. `base_mb` is the memory of the process after importing the loader. If other
programs on the machine use torch, the proportional set size is too small; --curve also counts distinct pages.
"""

from __future__ import annotations

import argparse
import json
import logging
import mmap
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.loader.contenders import CONTENDERS, Task  # noqa: E402
from benchmarks.rows import RESULTS, add_rows, git_commit, processor  # noqa: E402

SIZES = {
    "native": (576, 5832, 112, 16384, 880),
    "native_8k": (576, 5832, 112, 8192, 880),
    "small": (64, 256, 28, 16384, 220),
}
"""(minimum tokens, maximum tokens, divisor in px, token budget, mean tokens of the photos)."""
AUGMENT = {
    "crop": {"crop_scale": [0.9, 1.0], "crop_ratio": [0.75, 1.33]},
    "flip": {"flip": 0.5},
    "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
    "hue": {"hue": 0.1},
    "grey": {"grey": 1.0},
}
"""Settings of `stages.N.augment`."""


_KERNEL_PAGES = 1 << 51
_MAPPED, _FRAME = 1 << 63, (1 << 55) - 1


def family(pid: int | None = None) -> list[psutil.Process]:
    """Returns a process (default: this process) and its descendants."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and its live descendants."""
    total = 0.0
    for process in family():
        times = process.cpu_times()
        total += times.user + times.system
    return total


def memory_mb(pid: int | None = None) -> tuple[float, float]:
    """Returns the proportional and the resident set size of the family in MB."""
    infos = [process.memory_full_info() for process in family(pid)]
    return sum(info.pss for info in infos) / 2**20, sum(info.rss for info in infos) / 2**20


def distinct_mb(pid: int) -> float:
    """Returns the MB of memory pages that the family has mapped, each page counted once. Needs root.

    Must be called from outside of the family, since counting needs 9 MB.
    """
    frames: set[int] = set()
    for process in family(pid):
        proc = Path(f"/proc/{process.pid}")
        with (proc / "maps").open(encoding="utf-8") as maps, (proc / "pagemap").open("rb", 0) as pages:
            for line in maps:
                begin, end = (int(address, 16) // mmap.PAGESIZE for address in line.split()[0].split("-"))
                if begin >= _KERNEL_PAGES:
                    continue
                pages.seek(8 * begin)
                entries = array("Q", pages.read(8 * (end - begin)))
                frames.update(entry & _FRAME for entry in entries if entry & _MAPPED)
    frames.discard(0)
    if not frames:
        raise SystemExit("--curve counts memory pages in /proc/PID/pagemap, which only root may read")
    return len(frames) * mmap.PAGESIZE / 2**20


class Times(logging.Handler):
    """Records the time at which each decoding process reports that it is up."""

    def __init__(self) -> None:
        super().__init__()
        self.up: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "is up" in record.getMessage():
            self.up.append(time.monotonic())


def measure(name: str, task: Task, epoch: int, epochs: int) -> dict[str, Any]:
    """Runs a contender for half an epoch to warm up, then for `epochs`. Returns the row of the measurement.

    Args: epoch: number of samples of an epoch."""
    if name == "ours":
        import univitar_ds.data.loader  # noqa: F401
    base, _ = memory_mb()
    first, after_up = first_pack(name, task)
    batches = CONTENDERS[name](task)
    _take(batches, epoch // 2)
    start, cpu = time.monotonic(), cpu_seconds()
    samples = _take(batches, epochs * epoch)
    cpu, wall = cpu_seconds() - cpu, time.monotonic() - start
    pss, rss = memory_mb()
    batches.close()
    row = {
        "cpu_s_per_1000": 1000 * cpu / samples,
        "samples_per_s": samples / wall,
        "first_pack_s": first,
        "first_pack_after_up_s": after_up,
        "base_mb": base,
        "pss_mb": pss,
        "rss_mb": rss,
        "samples": samples,
    }
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def first_pack(name: str, task: Task) -> tuple[float, float | None]:
    """Returns the seconds to the first pack of a rank with one lane: from the start of the loader, and from the time at
    which all decoding processes are up (None: no such processes)."""
    times = Times()
    logger = logging.getLogger("univitar_ds.data.decoding.supervisor")
    logger.setLevel(logging.INFO)
    logger.addHandler(times)
    begun = time.monotonic()
    batches = CONTENDERS[name](replace(task, lanes=1))
    next(batches)
    now = time.monotonic()
    logger.removeHandler(times)
    batches.close()
    return now - begun, max(0.0, now - max(times.up)) if times.up else None


def _take(batches: Iterator[int], samples: int) -> int:
    count = 0
    while count < samples:
        count += next(batches)
    return count


def run(title: str, name: str, task: Task, epoch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs `measure` in a new process, in the checkout --before if the title begins with "before"."""
    python, root = arguments.peer_python if name in ("webdataset", "energon") else sys.executable, ROOT
    if title.startswith("before"):
        root = arguments.before.resolve()
        python = root / ".venv" / "bin" / "python"
    settings = {key: value for key, value in asdict(task).items() if value != {}}  # an older --before has no `augment`
    request = json.dumps({"name": name, "task": settings, "epoch": epoch, "epochs": arguments.epochs})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [str(python), str(root / "benchmarks" / "bench_loader.py"), task.shards, "--request", request]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


@contextmanager
def store(shards: str) -> Iterator[tuple[str, str]]:
    """Uploads the shards to a store on this machine. Yields the address of the shards and of the store."""
    from tests.support.s3 import s3_server

    with s3_server() as server:
        yield server.upload(Path(shards), "bench"), server.url


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    manifest = json.loads(Path(arguments.shards, "manifest.json").read_text(encoding="utf-8"))
    epoch = manifest["counts"]["train"]["image"]
    rows = []
    with store(arguments.shards) as (address, endpoint):
        for sizes in arguments.sizes:
            local = Task(arguments.shards, None, arguments.workers, *SIZES[sizes])
            remote = Task(address, endpoint, arguments.workers, *SIZES[sizes])
            tasks = [(name, name, local) for name in arguments.contenders]
            tasks += [(f"ours_{name}", "ours", replace(local, augment=AUGMENT[name])) for name in arguments.augment]
            tasks += [("ours_s3", "ours", remote)] if arguments.s3 else []
            if arguments.before:
                tasks.insert(1, ("before", "ours", local))
                tasks += [("before_s3", "ours", remote)] if arguments.s3 else []
            for number in range(arguments.rounds):
                for title, name, task in tasks:
                    row = run(title, name, task, epoch, arguments)
                    rows.append({"sizes": sizes, "contender": title, "round": number, **row})
                    print(rows[-1], file=sys.stderr, flush=True)
    return rows


def detail(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yields a line per contender: the median over rounds of its cost, and of the ratios to ours in the same round."""
    for sizes in dict.fromkeys(row["sizes"] for row in rows):
        of_sizes = [row for row in rows if row["sizes"] == sizes]
        by_name = {name: [row for row in of_sizes if row["contender"] == name] for name in _names(rows)}
        for name, own in by_name.items() if "ours" in by_name else ():
            ratios = [a["cpu_s_per_1000"] / b["cpu_s_per_1000"] for a, b in zip(own, by_name["ours"], strict=True)]
            speeds = [b["samples_per_s"] / a["samples_per_s"] for a, b in zip(own, by_name["ours"], strict=True)]
            cost = statistics.median(row["cpu_s_per_1000"] for row in own)
            yield (
                f"{sizes:7} {name:11} {cost:6.3f} CPU s per 1,000 samples, {statistics.median(ratios):.2f} times ours; "
                f"ours gives {statistics.median(speeds):4.2f} times its samples/s; {own[-1]['pss_mb']:.0f} MB"
            )


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows))


def curve(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns rows of the memory of ours every ten seconds, measured from another process.

    --pause limits the rate of packs."""
    (sizes,) = arguments.sizes
    with store(arguments.shards) if arguments.s3 else nullcontext((arguments.shards, None)) as (address, endpoint):
        context = multiprocessing.get_context("spawn")
        samples = context.Value("q", 0)
        task = Task(address, endpoint, arguments.workers, *SIZES[sizes])
        loading = context.Process(target=load_forever, args=(task, arguments.pause, samples), daemon=True)
        loading.start()
        rows: list[dict[str, Any]] = []
        while not samples.value:
            time.sleep(0.01)
        begun = time.monotonic()
        while loading.is_alive() and (elapsed := time.monotonic() - begun) < 60 * arguments.curve:
            pss, rss = memory_mb(loading.pid)
            row = {"sizes": sizes, "contender": "ours_s3" if arguments.s3 else "ours", "seconds": round(elapsed)}
            row |= {"samples": samples.value, "pss_mb": round(pss), "rss_mb": round(rss)}
            rows.append({**row, "distinct_mb": round(distinct_mb(loading.pid))})
            print(rows[-1], file=sys.stderr, flush=True)
            time.sleep(10)
        loading.terminate()
    return rows


def load_forever(task: Task, pause: float, samples: Synchronized[int]) -> None:
    for count in CONTENDERS["ours"](task):
        samples.value += count
        time.sleep(pause)


def write(rows: list[dict[str, Any]], name: str) -> None:
    machine = {"machine": processor(), "cores": os.cpu_count()}
    versions = {"python": platform.python_version(), "commit": git_commit()}
    add_rows(RESULTS / name, [{**row, **machine, **versions} for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=["native"], choices=SIZES)
    parser.add_argument("--contenders", nargs="+", default=["ours", "bare", "webdataset"], choices=CONTENDERS)
    parser.add_argument("--augment", nargs="*", default=[], choices=AUGMENT)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--curve", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between packs of the curve")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.request:
        request = json.loads(arguments.request)
        row = measure(request["name"], Task(**request["task"]), request["epoch"], request["epochs"])
        print(json.dumps(row), flush=True)
        os._exit(0)  # contenders and some of their processes never end
    if arguments.curve and len(arguments.sizes) > 1:
        parser.error("--curve takes one of --sizes")
    if arguments.curve:
        write(curve(arguments), "bench_loader_pages.csv")
        return
    rows = compare(arguments)
    write(rows, "bench_loader.csv")
    print("\n".join(detail(rows)))


if __name__ == "__main__":
    main()
