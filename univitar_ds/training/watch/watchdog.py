"""Ends a run in which a rank hangs: writes the stacks of all ranks, and reports the rank and what the others wait for.

A thread of each rank compares the age of the rank's section (a step, a checkpoint, ...) with the limit of this section.
The first rank that is over its limit notifies all others through the store of the process group. Each rank then writes
its Python stacks and its last collectives into the run's folder, and its position to the store. Rank 0, or another rank
if rank 0 does not answer, compares the positions, and all ranks end with `STALLED`.

The thread cannot run while C code of another thread holds the GIL. For this case it sets two alarms that need no
Python, and postpones them as long as it runs: faulthandler's own thread writes the stacks, and the signal SIGALRM ends
the process.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from univitar_ds.config.run_folder import CHECKPOINTS, STACKS
from univitar_ds.config.watch import WatchdogConfig
from univitar_ds.errors import UserError, writing
from univitar_ds.formats import checkpoint_dir
from univitar_ds.run_lock import release_all, still_ours
from univitar_ds.training.distributed.preemption import say
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.watch.flight_recorder import write_collectives
from univitar_ds.training.watch.phases import CHECKPOINT, EVALUATION, MID_EVALUATION, SETTLING, STEP, StepClock
from univitar_ds.training.watch.whereabouts import Whereabouts, described

STALLED = 86
"""Exit code of a run that its watchdog has ended. A new start continues the run from its last checkpoint."""
GIVEN_UP = 1
"""Exit code if the run has hung too often without a new checkpoint in between, or in its evaluation after
training."""
LOOK_S = 5.0
"""Seconds between two checks of a rank's own section and of the store."""
ANSWER_S = 20.0
"""Maximum seconds that the ranks have for their answers, several times LOOK_S."""
READ_S = 5.0
"""Seconds that the other ranks have to read the report before rank 0, and the store with it, ends."""
DUMP_S = 10.0
"""Maximum seconds for writing the last collectives: torch may wait for a device that hangs."""
LOCKED_S = 60.0
"""Seconds after the limit at which the signal ends a process whose watchdog thread could not run."""
MAX_FACTOR_S = 540.0
"""Maximum of the limit that follows from `factor`, unless three medians are more: a collective fails by itself after
ten minutes, without naming the missing ranks."""
STALLS, AGAIN = "stalls.jsonl", "again"
_created = itertools.count()
"""Number of watchdogs that this process has created, the same on all ranks: each has its own keys in the store."""


@contextmanager
def watched(cfg: WatchdogConfig, run: Path, world: World, clock: StepClock) -> Iterator[None]:
    """Runs a body under the watchdog. All ranks of `world` run it."""
    if not cfg.enabled:
        yield
        return
    watchdog = Watchdog(cfg, run, world, clock)
    try:
        yield
    finally:
        watchdog.stop()


def limit_s(cfg: WatchdogConfig, section: str, durations: list[float]) -> float:
    """Returns the limit of a section in seconds. Args: durations: seconds of the last steps since `StepClock.start`."""
    if section == CHECKPOINT:
        return cfg.checkpoint_s
    if section in (EVALUATION, MID_EVALUATION):
        return cfg.evaluation_s
    if section != STEP or len(durations) < SETTLING:
        return cfg.first_step_s
    median = statistics.median(durations)
    return max(cfg.min_s, min(cfg.factor * median, max(MAX_FACTOR_S, 3 * median)))


def job_start() -> str:
    """Returns an identifier of this start of a Slurm job, which a requeue changes; "" outside of Slurm."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


class Watchdog:
    """Watches this rank until `stop`."""

    def __init__(self, cfg: WatchdogConfig, run: Path, world: World, clock: StepClock) -> None:
        self._cfg, self._run, self._world, self._clock = cfg, run, world, clock
        self._stopped, self._host = threading.Event(), platform.node()
        self._store: dist.Store | None = None
        if world.size > 1:
            # Its own connection: requests of the main thread lock theirs while they wait for other ranks.
            store = dist.distributed_c10d._get_default_store().clone()
            self._store = dist.PrefixStore(f"watchdog/{next(_created)}", store)
            self._store.set(f"host/{world.rank}", self._host)
        self._path = run / STACKS / f"rank{world.rank:05d}.txt"
        with writing(self._path):
            self._path.parent.mkdir(exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")  # now: faulthandler's thread cannot open it
        free = signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and not any(signal.getitimer(signal.ITIMER_REAL))
        self._signals = free  # else the timer belongs to other code of this process
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops watching, and removes this rank's file of stacks if it is empty."""
        self._stopped.set()
        self._thread.join()
        self._disarm()
        with suppress(dist.DistError):
            if self._store is not None:
                self._answer(ended=True)
        self._file.close()
        with suppress(OSError):
            if self._path.stat().st_size == 0:
                self._path.unlink()
                self._path.parent.rmdir()  # fails if there are stacks

    def _watch(self) -> None:
        since, lost_s, looked = self._clock.position.since, 0.0, time.monotonic()
        while True:
            position, now = self._clock.position, time.monotonic()
            if position.since != since:
                since, lost_s = position.since, 0.0
            elif now - looked > 4 * LOOK_S:  # this process did not run, as in a job that Slurm has suspended
                lost_s += now - looked
            looked = now
            durations = list(self._clock.durations)
            limit, settled = limit_s(self._cfg, position.section, durations), len(durations) >= SETTLING
            left = since + lost_s + limit - now
            if left <= 0 or self._called():
                self._end(position.section, limit, over=left <= 0)
            self._arm(min(left, limit_s(self._cfg, STEP, durations) if settled else self._cfg.min_s))
            if self._stopped.wait(LOOK_S):
                return

    def _arm(self, left_s: float) -> None:
        """Sets the alarms for the case that this thread can no longer run.

        In every section they use at most the limit of a step, since a step may follow: correct code does not hold the
        GIL for minutes."""
        faulthandler.dump_traceback_later(left_s + 2 * LOOK_S, file=self._file)
        if self._signals:
            signal.setitimer(signal.ITIMER_REAL, left_s + LOCKED_S)

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._signals:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _called(self) -> bool:
        """Whether another rank is over its limit."""
        with suppress(dist.DistError):  # the store ends with rank 0
            return self._store is not None and self._store.check(["called"])
        return False

    def _end(self, section: str, limit: float, over: bool) -> None:
        """Writes the position and the stacks of this rank, obtains the report of all ranks, and ends the process."""
        self._disarm()
        report = None
        with suppress(dist.DistError):
            if self._store is not None and over:
                self._store.set("called", "")
        with suppress(OSError, ValueError):
            where = Whereabouts.of(self._clock.position, self._world.rank, self._host)
            self._file.write(f"\n{_now()}, rank {where.rank} on {self._host} {where.text}\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file)
        with suppress(dist.DistError):
            report = self._agreed(section, limit, self._written_collectives())
        release_all()
        os._exit(STALLED if report is None else report["code"])

    def _written_collectives(self) -> str:
        """Writes the last collectives. Returns the first one that the device has not completed, "" without one."""
        found: list[str] = []

        def write() -> None:
            with suppress(OSError, ValueError, RuntimeError):
                found.append(write_collectives(self._path.with_name(f"collectives-{self._path.stem}.json")))

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(DUMP_S)
        return found[0] if found else ""

    def _answer(self, on_device: str = "", ended: bool = False) -> Whereabouts:
        where = Whereabouts.of(self._clock.position, self._world.rank, self._host, on_device, ended)
        if self._store is not None:
            self._store.set(f"where/{where.rank}", json.dumps(where.to_dict()))
            self._store.add("answers", 1)
        return where

    def _agreed(self, section: str, limit: float, on_device: str) -> dict[str, Any]:
        """Returns the report, which one rank writes for all. Raises: DistError if the store has ended."""
        where, store, size = self._answer(on_device), self._store, self._world.size
        if store is None:
            return self._report([where], [self._host], section, limit)
        if not self._world.is_main:
            if _waited(lambda: store.check(["report"]), ANSWER_S + LOOK_S + READ_S):
                return json.loads(store.get("report"))
            if store.add("reporter", 1) > 1:
                _waited(lambda: store.check(["report"]), READ_S)
                return {"code": STALLED}
        else:
            _waited(lambda: store.add("answers", 0) >= size, ANSWER_S)
        found = [
            Whereabouts(**json.loads(store.get(f"where/{rank}"))) if store.check([f"where/{rank}"]) else None
            for rank in range(size)
        ]
        hosts = [store.get(f"host/{rank}").decode() if store.check([f"host/{rank}"]) else "" for rank in range(size)]
        report = self._report(found, hosts, section, limit)
        store.set("report", json.dumps(report))
        time.sleep(READ_S)
        return report

    def _report(self, found: list[Whereabouts | None], hosts: list[str], section: str, limit: float) -> dict[str, Any]:
        """Prints and writes the report on all ranks, and returns it, with the exit code.

        Args: found, hosts: by rank, see `described`."""
        text, step = described(found, hosts), self._clock.position.step
        report = {"time": _now(), "step": step, "section": section, "limit_s": limit}
        report |= {"text": text, "code": STALLED, "checkpoint": None}
        stalls = 1
        with suppress(OSError, ValueError, UserError):
            still_ours(self._run)
            last = checkpoint_dir.latest(self._run / CHECKPOINTS)
            report["checkpoint"] = None if last is None else last.name
            path = self._path.with_name(STALLS)
            earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            stalls += sum(json.loads(line).get("checkpoint") == report["checkpoint"] for line in earlier)
            if stalls > self._cfg.max_stalls or section == EVALUATION:
                report["code"] = GIVEN_UP
            elif start := job_start():
                path.with_name(AGAIN).write_text(start + "\n", encoding="utf-8")
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(report) + "\n")
        over = f"the {section} has taken more than {limit:.0f} s (limit: watchdog in the run file)"
        say(f"error: {over}: {text}. {self._advice(report, stalls)}")
        return report

    def _advice(self, report: dict[str, Any], stalls: int) -> str:
        stacks = f"The stacks of the ranks are in {self._path.parent}"
        if report["section"] == EVALUATION:
            return f"{stacks}; the run is trained, and `univitar-ds eval {self._run}` evaluates it again"
        if report["code"] == GIVEN_UP:
            return (
                f"{stacks}; the run has hung {stalls} times since its last checkpoint (watchdog.max_stalls is "
                f"{self._cfg.max_stalls}), so the job is not started again"
            )
        return f"{stacks}; exit code {STALLED}: a new start continues from the last checkpoint"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _waited(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits until a condition holds, at most `seconds`. Returns whether it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(min(LOOK_S, 0.2))
    return True
