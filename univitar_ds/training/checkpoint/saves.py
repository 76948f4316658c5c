"""Saves checkpoints while the training continues."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from univitar_ds.training.checkpoint.protocol import (
    AbandonedError,
    Content,
    Job,
    Target,
    proceed,
    saving,
)
from univitar_ds.training.distributed.process_group import (
    PeerFailure,
    World,
    all_ranks_or_none,
    gather_json,
    known_to_all,
)

logger = logging.getLogger(__name__)

AGAIN_S = 30.0
"""Seconds after which a save that failed with a transient error of the storage is repeated."""


class Saves:
    """The saves of a run, one at a time. All ranks make the same calls in the same order.

    A thread writes the files and reads them back. When all ranks are `ready`, the next step begins the next job of the
    save; the ranks agree on that in a message that each step sends in any case. `done` is called with the target of
    each completed save.

    After a transient error of the storage on any rank (`UserError.transient`), the whole checkpoint is written again
    once, after `AGAIN_S`, from the same copy of the training state. `failed` is called on all ranks with the event. Any
    other error, and a second one, is raised.
    """

    def __init__(
        self,
        world: World,
        done: Callable[[Target], None],
        *,
        asynchronous: bool,
        failed: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        self._world, self._done, self._failed, self._asynchronous = world, done, failed, asynchronous
        self._flight: _Flight | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a save is being written."""
        return self._flight is not None

    def begin(self, target: Target, step: int, content: Callable[[], Content]) -> None:
        """Begins a save, and completes it unless `asynchronous`. Waits for an earlier save that is still being written.

        Args: content: copies the training state. Called once the earlier save no longer needs its copy.
        Raises: the rank's own error, or PeerFailure for an error of another rank; also for the earlier save.
        """
        if self._flight is not None:
            if self._world.is_main:
                logger.info(
                    "the checkpoint of step %d is still being written, the one of step %d waits for it; a larger "
                    "checkpoint.every_steps avoids that",
                    self._flight.step,
                    step,
                )
            self.finish()
        self._flight = _Flight(target, step, content(), self._world, in_thread=self._asynchronous)
        if self._asynchronous:
            self._wait()  # for `Target.begin` on all ranks: if it fails, the training must not continue
        else:
            self.finish()

    def ready(self) -> bool:
        """Whether this rank has finished its current job of a save, without an error or with a transient one."""
        return self._flight is not None and self._flight.work.done and self._flight.fatal is None

    def raise_failed(self) -> None:
        """Raises the error of this rank's current job if it ends the run. Must be called within `all_ranks_or_none`."""
        if self._flight is not None and self._flight.work.done and self._flight.fatal is not None:
            raise self._flight.fatal

    def advance(self) -> None:
        """Begins the next job of a save, or repeats the save, after all ranks were `ready`. Raises: as `begin`."""
        flight = self._flight
        assert flight is not None
        try:
            with all_ranks_or_none(self._world):
                result = flight.work.result()
        except Exception as error:
            job = self._again(flight, error)
        else:
            job = proceed(flight.jobs, result)
        if job is not None:
            flight.start(job)
            return
        self._flight = None
        self._done(flight.target)

    def finish(self) -> None:
        """Waits until the save in flight is complete. Raises: as `begin`."""
        while self._flight is not None:
            self._wait()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Completes the save in flight if the body raises an error that all ranks raise, and abandons it otherwise.

        A rank that ends alone does not wait, since its storage may hang; the next launch removes its files."""
        try:
            yield
        except Exception as error:
            if known_to_all(error) or self._world.size == 1:
                try:
                    self.finish()
                except Exception as failure:
                    if str(failure) != str(error):  # another error than the one that ends the run
                        logger.warning("the checkpoint in flight was not completed: %s", failure)
            raise
        finally:
            self._abandon()

    def _wait(self) -> None:
        flight = self._flight
        assert flight is not None
        flight.work.wait()
        self.advance()

    def _again(self, flight: _Flight, error: Exception) -> Job | None:
        """Prepares a second attempt after an error that all ranks raise. All ranks call it.

        Returns: the first job of the attempt; None if the checkpoint is complete and only outdated ones could not be
            removed, which the next save does.
        Raises: `error` if it is not transient, or if this was the second attempt.
        """
        own = None if isinstance(error, PeerFailure) else [str(error), _transient(error)]
        found = gather_json([own, flight.target.published], self._world)
        reasons = {rank: reason for rank, (reason, _) in enumerate(found) if reason is not None}
        published = found[0][1]
        if not all(transient for _, transient in reasons.values()) or (flight.repeated and not published):
            raise error
        rank, (reason, _) = next(iter(reasons.items()))
        event = {"event": "save_failed", "checkpoint": flight.step, "rank": rank, "reason": reason}
        self._failed(event | {"complete": published, **({} if published else {"again_after_s": AGAIN_S})})
        return None if published else flight.repeat(self._world)

    def _abandon(self) -> None:
        flight, self._flight = self._flight, None
        if flight is None:
            return
        flight.target.abandon()
        if flight.work.done:
            with suppress(Exception):
                flight.jobs.throw(AbandonedError())


class _Flight:
    """A save that is being written."""

    def __init__(self, target: Target, step: int, content: Content, world: World, *, in_thread: bool) -> None:
        self.target, self.step = target, step
        self._content, self._in_thread = content, in_thread
        self.repeated = False
        self.jobs = saving(target, content, world)
        self.start(next(self.jobs))

    def start(self, job: Job) -> None:
        """Begins a job."""
        note = f"; the save was repeated once, {AGAIN_S:g} s after it had failed before" if self.repeated else ""
        self.work = _Work(job, note, in_thread=self._in_thread)

    def repeat(self, world: World) -> Job:
        """Returns the first job of a second attempt to write the same checkpoint, which begins with a pause."""
        self.jobs.close()
        self.jobs, self.repeated = saving(self.target, self._content, world), True
        first = next(self.jobs)

        def job() -> Any:
            self.target.pause(AGAIN_S)
            return first()

        return job

    @property
    def fatal(self) -> BaseException | None:
        """The error of this rank's job if it ends the run."""
        error = self.work.error
        passes = error is not None and _transient(error) and (not self.repeated or self.target.published)
        return None if passes else error


def _transient(error: BaseException) -> bool:
    return getattr(error, "transient", False)


class _Work:
    """A job that runs in a daemon thread, which does not keep the process alive, or directly.

    Args: note: is appended to the message of a transient error."""

    def __init__(self, job: Job, note: str, *, in_thread: bool) -> None:
        self._job, self._note = job, note
        self._result: Any = None
        self.error: BaseException | None = None
        self._over = threading.Event()
        if in_thread:
            threading.Thread(target=self._run, name="checkpoint", daemon=True).start()
        else:
            self._run()

    @property
    def done(self) -> bool:
        return self._over.is_set()

    def wait(self) -> None:
        self._over.wait()

    def result(self) -> Any:
        """Returns the result of the job, or raises its error."""
        if self.error is not None:
            raise self.error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._job()
        except BaseException as error:
            if self._note and _transient(error):
                error.args = (f"{error}{self._note}",)
            self.error = error
        finally:
            self._over.set()
