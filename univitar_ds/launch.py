"""From a run file to a finished run: starting the ranks, being one, and what follows training."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.load import load_config
from univitar_ds.config.run_folder import CHECKPOINTS, CONFIG, EXPORT, SUMMARY
from univitar_ds.errors import StorageError, UserError, storage_error
from univitar_ds.import_path import safe_environment
from univitar_ds.processes import SIGNALS, Process, children, signals_held
from univitar_ds.run import create_run, reopen_run
from univitar_ds.run_lock import VARIABLE, RunLock, release_all, still_ours
from univitar_ds.screen import prepare_screen, show
from univitar_ds.training.checkpoint import atomic_dir
from univitar_ds.training.distributed import orphans, preemption
from univitar_ds.training.distributed.launchers import forget_launchers, is_rank
from univitar_ds.training.distributed.preemption import SAVED, Stop

logger = logging.getLogger(__name__)
_CAUSES = {
    "SIGKILL": " (by a person or, where memory ran out, by the system: see `dmesg`)",
    "SIGBUS": " (a disk or /dev/shm is full, or a mapped file was truncated)",
}


def train(recipe: str, nproc: int | None, overrides: Sequence[str]) -> int:
    """Start a run from a run file; returns the exit status.

    Under a launcher, `srun` included, this process is one rank. If `nproc` is given, it starts that many
    processes here and ignores the variables of launchers in the environment.
    """
    config = load_config(recipe, overrides)
    run = Path(config.output, config.name)
    return _ranks(run, nproc, lambda size, lock: create_run(config, recipe, size, lock))


def resume(run: Path, nproc: int | None, overrides: Sequence[str]) -> int:
    """Continue the run in folder `run` from its last checkpoint; returns the exit status. `nproc`: see `train`."""
    return _ranks(run, nproc, lambda size, lock: reopen_run(run, overrides, size, lock))


def _ranks(run: Path, nproc: int | None, prepare: Callable[[int, RunLock], Path]) -> int:
    """Run as one rank under a launcher, else start the ranks; `prepare` makes or reopens the folder for their
    number."""
    with RunLock(run) as lock:
        if _is_rank(nproc):
            return _join(lambda: prepare(int(os.environ["WORLD_SIZE"]), lock), run, lock)
        nproc = nproc or 1
        _check_gpus(nproc)
        return _start(prepare(nproc, lock), nproc, lock)


def run_rank(run: Path, stop: Stop, lock: RunLock) -> int:
    """Train as one rank of the process group that the environment describes; rank 0 then finishes the run.

    Args: lock: of the run's folder, as rank 0 has it.
    Returns: the exit status, 0 or SAVED if `stop` of any rank was requested.
    Raises: UserError; StorageError names the last whole checkpoint.
    """
    try:
        return _train_and_finish(run, stop, lock)
    except StorageError as error:
        raise StorageError(f"{error}; {_kept(run)}") from error


def _kept(run: Path) -> str:
    found = None
    with suppress(OSError):
        found = atomic_dir.latest(run / CHECKPOINTS)
    return "no checkpoint was written yet" if found is None else f"the last checkpoint, {found}, is whole"


def _train_and_finish(run: Path, stop: Stop, lock: RunLock) -> int:
    from univitar_ds.training.distributed.process_group import gather_json, start_world, stop_world
    from univitar_ds.training.loop import train as train_rank

    world = start_world()
    word = gather_json(lock.word, world)[0]
    if not world.is_main:
        lock.watch(word)
        # The same lines from hundreds of ranks would hide those of the first one.
        logging.getLogger("univitar_ds").setLevel(logging.WARNING)
    completed = train_rank(load_config(run / CONFIG), run, world, stop)
    stop_world()
    if not completed:
        return SAVED
    if world.is_main:
        finish_run(run)
    return 0


def finish_run(run: Path) -> None:
    """After training, on one process: export of the encoder, and evaluation on held-out data.

    The export comes first, since an evaluation may take longer than a job may run. Export, evaluation and summary do
    not depend on each other's success.
    Raises: UserError if one of them failed, after everything else was written; an evaluation that measured
        nothing counts as failed.
    """
    from univitar_ds.convert.official import export_encoder
    from univitar_ds.evaluation.run import evaluate_run

    seconds: dict[str, float] = {}
    try:
        with timed(seconds, "export"):
            still_ours(run)
            export_encoder(run, run / EXPORT)
        logger.info("encoder exported to %s", run / EXPORT)
    finally:
        try:
            if load_config(run / CONFIG).evaluation.sources:
                with timed(seconds, "evaluation"):
                    table = evaluate_run(run)
                show(table)
        except Exception:
            logger.error("the evaluation failed; training is done, and `univitar-ds eval %s` evaluates it again", run)
            raise
        finally:
            _note_seconds(run, seconds)


def _note_seconds(run: Path, seconds: dict[str, float]) -> None:
    """Adds entries to the summary that training has written, if there is one."""
    if not (run / SUMMARY).is_file():
        return
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    summary["seconds"] = {**summary.get("seconds", {}), **seconds}
    still_ours(run)
    replace_text(run / SUMMARY, json.dumps(summary, indent=2) + "\n")


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Store the seconds that the body took under `name`."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = round(time.monotonic() - start, 1)


def _start(run: Path, nproc: int, lock: RunLock) -> int:
    """Train the prepared run: in this process when it is the only one, else through DeepSpeed's launcher."""
    if nproc == 1:
        return run_rank(run, preemption.listen(), lock)
    from univitar_ds.training.distributed.process_group import uses_cuda

    ranks = base64.urlsafe_b64encode(json.dumps({"localhost": _devices(nproc)}).encode()).decode()
    command = [sys.executable, "-P", "-m", "deepspeed.launcher.launch", f"--world_info={ranks}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={_free_port()}", "--log_level=critical", "--no_local_rank"]
    command += ["--module", "univitar_ds.launch", str(run)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // nproc))
    environment = {"OMP_NUM_THREADS": threads, **safe_environment(os.environ), VARIABLE: lock.word}
    if not uses_cuda():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    this = Process.of(os.getpid())
    if this is not None:
        environment[orphans.STARTED_BY] = this.text
    with signals_held():  # a signal would kill DeepSpeed's launcher, or make it end the ranks before they have saved
        launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    stop = preemption.listen(Stop(first=lambda: _ask_ranks(launcher, stop), leaving=lambda: _kill(launcher)))
    return _result(launcher.wait(), stop)


def _ask_ranks(launcher: subprocess.Popen[bytes], stop: Stop) -> None:
    """Passes a first signal to the ranks; if there are none yet, nothing has been trained."""
    ranks = children(launcher.pid)
    if not ranks:
        stop.leave(stop.number)
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGUSR1)


def _kill(launcher: subprocess.Popen[bytes]) -> None:
    """Ends the launcher before its ranks; otherwise it would report their end."""
    ranks = children(launcher.pid)
    for process in (launcher.pid, *ranks):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    launcher.wait()


def _result(code: int, stop: Stop) -> int:
    """The exit status of the run from that of DeepSpeed's launcher, which is that of the first rank that failed."""
    if stop.leaves:  # the thread that handles signals ended it
        threading.Event().wait()
    if code - 128 in SIGNALS:
        number = code - 128
        if stop.requested:  # while the ranks were not training
            stop.leave(stop.number)
    else:  # it exits with a negative number if a signal ended a rank
        number = -code if code < 0 else 256 - code
    if number not in list(signal.Signals):
        return code
    name, who = signal.Signals(number).name, "DeepSpeed's launcher" if code < 0 else "a rank"
    cause = _CAUSES.get(name, "")
    preemption.say(f"error: {who} was ended by {name}{cause}; the last checkpoint stays, resume the run from it")
    return 128 + number


def _join(prepare, run: Path, lock: RunLock) -> int:
    """Run as one rank under a launcher: rank 0 prepares the folder while the others wait."""
    stop = preemption.listen()
    orphans.end_with_launchers(stop)
    from univitar_ds.training.distributed.process_group import rank_zero_first, start_world

    try:
        rank_zero_first(start_world(), prepare)
        return run_rank(run, stop, lock)
    except UserError as error:
        leave(error)
    except OSError as error:
        leave(_refused(error))


def _is_rank(nproc: int | None) -> bool:
    if nproc is None:
        return is_rank(os.environ)
    if ignored := forget_launchers(os.environ):
        logger.info("--nproc %d is given, so variables of launchers are ignored: %s", nproc, ", ".join(ignored))
    return False


def _check_gpus(nproc: int) -> None:
    """Called before anything is replaced: a run that cannot start replaces nothing."""
    from univitar_ds.training.distributed.process_group import check_gpus

    check_gpus(nproc)


def _devices(nproc: int) -> list[str] | list[int]:
    """The value of CUDA_VISIBLE_DEVICES for DeepSpeed's launcher: the first ones of those that the user has made
    visible."""
    from univitar_ds.training.distributed.process_group import uses_cuda

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown and uses_cuda():
        return [name.strip() for name in shown.split(",")][:nproc]
    return list(range(nproc))  # on the CPU only their number counts


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def leave(error: UserError) -> NoReturn:
    """End a rank after a user's error: one rank reports it, and neither threads nor peers keep the process alive."""
    from univitar_ds.training.distributed.process_group import PeerFailure
    from univitar_ds.training.step.train_step import DivergedError

    everybody_knows = isinstance(error, DivergedError) and os.environ.get("RANK", "0") != "0"
    if not isinstance(error, PeerFailure) and not everybody_knows:
        with suppress(OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
    preemption.ignore()  # launchers end the other ranks when the first one is gone; this sets the exit code
    release_all()
    os._exit(error.exit_code)


def _refused(error: OSError) -> UserError:
    """The error of the storage as a StorageError. Raises: the error itself if it is of another kind."""
    sentence = storage_error(error)
    if sentence is None:
        raise error
    return sentence


def _main(arguments: Sequence[str]) -> int:
    """One rank started by `_start`."""
    prepare_screen()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    stop = preemption.listen()
    stop.quiet = True  # the process that started the ranks reports
    orphans.end_with_launchers(stop)
    try:
        lock = RunLock(Path(arguments[0]))
        if os.environ.get("RANK", "0") == "0":
            lock.join(os.environ.get(VARIABLE, ""))
        return run_rank(lock.run, stop, lock)
    except UserError as error:
        leave(error)
    except OSError as error:
        leave(_refused(error))


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
