"""Starts the ranks of a run, trains as one of them, and exports and evaluates after training."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from univitar_ds import startup
from univitar_ds.atomic_write import replace_text
from univitar_ds.config.load import load_config
from univitar_ds.config.run_folder import CHECKPOINTS, CONFIG, EVALUATION, EXPORT, SUMMARY
from univitar_ds.errors import ConfigError, StorageError, UserError, first_line, storage_error
from univitar_ds.formats import checkpoint_dir
from univitar_ds.import_path import safe_environment
from univitar_ds.plugins import load_plugins
from univitar_ds.processes import SIGNALS, Process, children, signals_held
from univitar_ds.run import create_run, describe_resumed, describe_run, reopen_run
from univitar_ds.run_lock import VARIABLE, RunLock, release_all, still_ours
from univitar_ds.screen import log_to_screen, prepare_screen, show
from univitar_ds.training.distributed import orphans, preemption
from univitar_ds.training.distributed.launchers import forget_launchers, is_rank, resume_command
from univitar_ds.training.distributed.ports import free_ports
from univitar_ds.training.distributed.preemption import SAVED, Stop

logger = logging.getLogger("univitar_ds.launch")  # of a rank, which runs this module as a program, too
_RANK_BYTES = 0.6e9
"""Host memory of a rank after its imports, measured by `benchmarks/bench_plan_memory.py`."""
_RANKS_PER_CORE = 8
"""Ranks of a test may share a core; more of them would not come together within the limits of their messages."""
_CAUSES = {
    "SIGKILL": " (by a user, or by the system if memory ran out: see `dmesg`)",
    "SIGBUS": " (a disk or /dev/shm is full, or a mapped file was truncated)",
}


def train(recipe: str, nproc: int | None, overrides: Sequence[str]) -> int:
    """Starts a run from a run file. Returns the exit status.

    Under a launcher, `srun` included, this process becomes one rank. If `nproc` is given, this process starts that many
    ranks on this machine and ignores the variables of launchers in the environment.

    Args: recipe: path of the run file, or the name of a shipped recipe.
    Raises: UserError as `create_run` and `run_rank`.
    """
    config = load_config(recipe, overrides)
    run = Path(config.output, config.name)
    return _ranks(run, nproc, lambda size, lock: create_run(config, recipe, size, lock))


def describe_training(recipe: str, nproc: int | None, overrides: Sequence[str]) -> str:
    """Returns what `train` would do, as text, after its checks. Writes nothing. Raises: as `create_run`."""
    return describe_run(load_config(recipe, overrides), recipe, _foreseen_ranks(nproc))


def describe_resuming(
    run: Path, nproc: int | None, overrides: Sequence[str], extension: Sequence[str] | None = None
) -> str:
    """Returns what `resume` would do, as text, after its checks. Writes nothing. Raises: as `reopen_run`."""
    return describe_resumed(run, overrides, _foreseen_ranks(nproc), extension)


def _foreseen_ranks(nproc: int | None) -> int:
    """Returns the number of ranks. It may exceed the number of GPUs here, since another machine may train."""
    return int(os.environ["WORLD_SIZE"]) if _is_rank(nproc) else nproc or 1


def resume(run: Path, nproc: int | None, overrides: Sequence[str], extension: Sequence[str] | None = None) -> int:
    """Continues the run in folder `run` from its last checkpoint. Returns the exit status.

    Args: nproc: see `train`; extension: see `reopen_run`.

    Raises: UserError as `reopen_run` and `run_rank`.
    """
    return _ranks(run, nproc, lambda size, lock: reopen_run(run, overrides, size, lock, extension))


def _ranks(run: Path, nproc: int | None, prepare: Callable[[int, RunLock], Path]) -> int:
    """Runs as one rank under a launcher, else starts the ranks.

    Args: prepare: creates or reopens the folder, given the number of ranks and the lock.
    """
    with RunLock(run) as lock:
        if _is_rank(nproc):
            with startup.reported("preparing the run"):
                return _join(lambda: prepare(int(os.environ["WORLD_SIZE"]), lock), run, lock)
        nproc = nproc or 1
        with startup.reported("preparing the run"):
            startup.phase("looking for GPUs")
            _check_machine(nproc)
            return _start(prepare(nproc, lock), nproc, lock)


def run_rank(run: Path, stop: Stop, lock: RunLock) -> int:
    """Trains as one rank of the process group that the environment describes. Rank 0 then finishes the run.

    Args: stop: requests to stop this rank; lock: lock of the run's folder, held by rank 0.
    Returns: the exit status: 0, or SAVED if `stop` of any rank was requested.
    Raises: UserError; a StorageError also names the last complete checkpoint.
    """
    try:
        return _train_and_finish(run, stop, lock)
    except StorageError as error:
        raise StorageError(f"{error}; {_kept(run)}") from error


def _kept(run: Path) -> str:
    found = None
    with suppress(OSError, UserError):
        folder = load_config(run / CONFIG).checkpoint.folder
        if folder is not None:  # not read from the store, which may be the cause of the error
            return f"the last complete checkpoint in {folder} is intact"
        found = checkpoint_dir.latest(run / CHECKPOINTS)
    return "no checkpoint was written yet" if found is None else f"the last checkpoint, {found}, is intact"


def _train_and_finish(run: Path, stop: Stop, lock: RunLock) -> int:
    startup.phase("loading PyTorch and DeepSpeed")
    from univitar_ds.formats.run import finished_at, run_configuration
    from univitar_ds.planning.counts.batch import batch_lines
    from univitar_ds.training.callbacks import Callbacks
    from univitar_ds.training.distributed.process_group import broadcast_json, start_world, stop_world
    from univitar_ds.training.watch.flight_recorder import record_collectives

    record_collectives(run)  # before the process group
    startup.phase("connecting the processes")
    world = start_world()
    word = broadcast_json(lock.word, world)
    if not world.is_main:
        lock.watch(word)
        # Equal lines from hundreds of ranks would hide the lines of rank 0.
        logging.getLogger("univitar_ds").setLevel(logging.WARNING)
    config = load_config(run / CONFIG)
    step = broadcast_json(finished_at(run) if world.is_main else None, world)
    if step is not None:
        stop_world()
        if world.is_main:
            logger.info(
                "all stages of %s are done since step %d: nothing is trained, export and evaluation are made again; "
                "--extend adds a stage",
                run,
                step,
            )
            load_plugins(config.plugins)
            finish_run(run)
        return 0
    if world.is_main:
        for line in batch_lines(config, world.size, run_configuration(run)[0]):
            logger.info("%s", line)
    from univitar_ds.training.loop import train as train_rank  # imports DeepSpeed

    evaluate = None
    if config.evaluation.every_samples:
        from univitar_ds.evaluation.during_training import DuringTraining

        evaluate = DuringTraining(config, run, world)
    completed = train_rank(config, run, world, stop, evaluate)
    stop_world()
    if world.is_main:
        if completed:
            finish_run(run)
        if config.plugins:
            callbacks = Callbacks(world)
            callbacks.call("on_end", json.loads((run / SUMMARY).read_text(encoding="utf-8")))
            callbacks.raise_failed()
    return 0 if completed else SAVED


def finish_run(run: Path) -> None:
    """Exports the encoder and evaluates it on held-out data, after training, in one process.

    The export is first, because an evaluation may exceed the time limit of a job. Each of export, evaluation and
    summary is tried even if another one fails.
    Raises: UserError if one of them fails, after the others are written. An evaluation that measures nothing fails.
    """
    from univitar_ds.convert.export import export_run, refresh_cards
    from univitar_ds.evaluation.run import evaluate_run
    from univitar_ds.training.watch.phases import EVALUATION as EVALUATING
    from univitar_ds.training.watch.watching import watching_alone

    config = load_config(run / CONFIG)
    seconds: dict[str, float] = {}
    try:
        with timed(seconds, "export"):
            still_ours(run)
            export_run(run, run / EXPORT)
        logger.info("model exported to %s; `univitar-ds report %s` shows the run", run / EXPORT, run)
    finally:
        try:
            if config.evaluation.sources:
                with timed(seconds, "evaluation"), watching_alone(config, run, EVALUATING):
                    table = evaluate_run(run)
                    refresh_cards(run, run / EXPORT)
                    _log_results(run, table)
                show(table)
        except Exception:
            logger.error("the evaluation failed; training is done, and `univitar-ds eval %s` evaluates it again", run)
            raise
        finally:
            _note_seconds(run, seconds)


def _log_results(run: Path, table: str) -> None:
    """Adds the results to TensorBoard and trackers. A failure is logged: the results are in evaluation.json."""
    from univitar_ds.training.logging.writers import write_results

    try:
        evaluation = json.loads((run / EVALUATION).read_text(encoding="utf-8"))
        step = int(evaluation["checkpoint"].removeprefix("step-"))
        still_ours(run)
        write_results(load_config(run / CONFIG), run, evaluation["figures"], table, step)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("the results are not in TensorBoard: %s: %s", type(error).__name__, first_line(error))


def _note_seconds(run: Path, seconds: dict[str, float]) -> None:
    """Adds durations to the summary that training has written, if there is one."""
    if not (run / SUMMARY).is_file():
        return
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    summary["seconds"] = {**summary.get("seconds", {}), **seconds}
    still_ours(run)
    replace_text(run / SUMMARY, json.dumps(summary, indent=2) + "\n")


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Stores the duration of the body in `seconds[name]`."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = round(time.monotonic() - start, 1)


def _start(run: Path, nproc: int, lock: RunLock) -> int:
    """Trains the prepared run: in this process if `nproc` is 1, else through DeepSpeed's launcher."""
    if nproc == 1:
        return run_rank(run, preemption.listen(Stop(resume=resume_command(run, nproc))), lock)
    from univitar_ds.training.distributed.process_group import uses_cuda

    ranks = base64.urlsafe_b64encode(json.dumps({"localhost": _devices(nproc)}).encode()).decode()
    command = [sys.executable, "-P", "-m", "deepspeed.launcher.launch", f"--world_info={ranks}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_ports()[0]}", "--log_level=critical"]
    command += ["--no_local_rank", "--module", "univitar_ds.launch", str(run)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // nproc))
    environment = {"OMP_NUM_THREADS": threads, **safe_environment(os.environ), VARIABLE: lock.word}
    if not uses_cuda():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    this = Process.of(os.getpid())
    if this is not None:
        environment[orphans.STARTED_BY] = this.text
    logger.info("starting %d processes, which load PyTorch and DeepSpeed", nproc)
    startup.done()
    with signals_held():  # otherwise a signal may end DeepSpeed's launcher, or the ranks before they have saved
        launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    stop = Stop(lambda: _ask_ranks(launcher, stop), lambda: _kill(launcher), resume_command(run, nproc))
    preemption.listen(stop)
    return _result(launcher.wait(), stop)


def _ask_ranks(launcher: subprocess.Popen[bytes], stop: Stop) -> None:
    """Forwards the first signal to the ranks as SIGUSR1. Ends this process if there are no ranks yet."""
    ranks = children(launcher.pid)
    if not ranks:
        stop.leave(stop.number)
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGUSR1)


def _kill(launcher: subprocess.Popen[bytes]) -> None:
    """Kills the launcher before its ranks. Otherwise the launcher would report the end of the ranks."""
    ranks = children(launcher.pid)
    for process in (launcher.pid, *ranks):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    launcher.wait()


def _result(code: int, stop: Stop) -> int:
    """Returns the exit status of the run. `code`: exit status of DeepSpeed's launcher or of the first failed rank."""
    if stop.leaves:  # the thread that handles signals ended the launcher and ends this process
        threading.Event().wait()
    if code - 128 in SIGNALS:
        number = code - 128
        if stop.requested:  # the request came while the ranks were not training
            stop.leave(stop.number)
    else:  # the launcher exits with a negative number if a signal ended a rank
        number = -code if code < 0 else 256 - code
    if number not in list(signal.Signals):
        return code
    name, who = signal.Signals(number).name, "DeepSpeed's launcher" if code < 0 else "a rank"
    cause = _CAUSES.get(name, "")
    preemption.say(f"error: {who} was ended by {name}{cause}; the last checkpoint stays{stop.remedy}")
    return 128 + number


def _join(prepare, run: Path, lock: RunLock) -> int:
    """Runs as one rank under a launcher: rank 0 prepares the folder while the other ranks wait."""
    stop = preemption.listen(Stop(resume=resume_command(run)))
    orphans.end_with_launchers(stop)
    startup.phase("loading PyTorch and DeepSpeed")
    from univitar_ds.training.distributed.process_group import rank_zero_first, start_world
    from univitar_ds.training.watch.flight_recorder import record_collectives

    record_collectives(run)  # before the process group
    try:
        rank_zero_first(start_world(), prepare)
        return run_rank(run, stop, lock)
    except UserError as error:
        leave(error)
    except OSError as error:
        leave(_storage_error(error))


def _is_rank(nproc: int | None) -> bool:
    """Whether this process is a rank of a launcher. With `nproc`, variables of launchers are removed."""
    if nproc is None:
        return is_rank(os.environ)
    if ignored := forget_launchers(os.environ):
        logger.info("--nproc %d is given, so variables of launchers are ignored: %s", nproc, ", ".join(ignored))
    return False


def _check_machine(nproc: int) -> None:
    """Raises: ConfigError if this machine has too few GPUs, or too little memory or too few cores for ranks on its CPU.

    Called before files are replaced and ranks start."""
    from univitar_ds.drafting.machine import this_machine
    from univitar_ds.planning.sizes import amount
    from univitar_ds.training.distributed.process_group import check_gpus, uses_cuda

    check_gpus(nproc)
    if uses_cuda():
        return
    machine = this_machine()
    most = max(1, int(min(machine.memory / _RANK_BYTES, _RANKS_PER_CORE * machine.cores)))
    if nproc > most:
        raise ConfigError(
            f"{nproc} processes are too many for this machine ({machine.cores} cores, {amount(machine.memory)}): each "
            f"takes {amount(_RANK_BYTES)} for its libraries alone, and {_RANKS_PER_CORE} ranks a core are the limit; "
            f"start at most {most} (--nproc {most})"
        )


def _devices(nproc: int) -> list[str] | list[int]:
    """Returns the devices for DeepSpeed's launcher: the first `nproc` of those in CUDA_VISIBLE_DEVICES."""
    from univitar_ds.training.distributed.process_group import uses_cuda

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and uses_cuda():
        return [name.strip() for name in visible.split(",")][:nproc]
    return list(range(nproc))  # on the CPU only the length counts


def leave(error: UserError) -> NoReturn:
    """Ends this rank after a user's error, without waiting for threads or other ranks.

    A DivergedError occurs on all ranks and is reported by rank 0 only. A PeerFailure is not reported here, because the
    rank that failed reports the reason.
    """
    from univitar_ds.training.distributed.process_group import PeerFailure
    from univitar_ds.training.step.train_step import DivergedError

    everybody_knows = isinstance(error, DivergedError) and os.environ.get("RANK", "0") != "0"
    if not isinstance(error, PeerFailure) and not everybody_knows:
        with suppress(OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
    preemption.ignore()  # a launcher's signal must not change the exit code
    release_all()
    os._exit(error.exit_code)


def _storage_error(error: OSError) -> UserError:
    """Returns an error of the storage as a StorageError. Raises: the error itself if it has another cause."""
    sentence = storage_error(error)
    if sentence is None:
        raise error
    return sentence


def _main(arguments: Sequence[str]) -> int:
    """Runs one rank that `_start` has started."""
    prepare_screen()
    log_to_screen()
    stop = preemption.listen(Stop(resume=resume_command(Path(arguments[0]), int(os.environ.get("WORLD_SIZE", "1")))))
    stop.quiet = True  # the process that started the ranks reports
    orphans.end_with_launchers(stop)
    try:
        lock = RunLock(Path(arguments[0]))
        if os.environ.get("RANK", "0") == "0":
            lock.join(os.environ.get(VARIABLE, ""))
        with startup.reported("loading PyTorch and DeepSpeed"):
            return run_rank(lock.run, stop, lock)
    except UserError as error:
        leave(error)
    except OSError as error:
        leave(_storage_error(error))


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
