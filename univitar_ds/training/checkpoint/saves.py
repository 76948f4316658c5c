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
    save_now,
    saving,
)
from univitar_ds.training.distributed.process_group import World, all_ranks_or_none, known_to_all

logger = logging.getLogger(__name__)


class Saves:
    """The saves of a run, one at a time. All ranks make the same calls in the same order.

    A thread writes the files and reads them back. When all ranks are `ready`, the next step begins the next job of the
    save; the ranks agree on that in a message that each step sends anyway. `done` is called with the target of each
    completed save.
    """

    def __init__(self, world: World, done: Callable[[Target], None], *, asynchronous: bool) -> None:
        self._world, self._done, self._asynchronous = world, done, asynchronous
        self._flight: _Flight | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a save is being written."""
        return self._flight is not None

    def begin(self, target: Target, step: int, content: Callable[[], Content]) -> None:
        """Begins a save, and completes it unless `asynchronous`. Waits for an earlier save that is still being written.

        Args: content: copies the training state. Called once the earlier save no longer needs its copy.
        Raises: the rank's own error or PeerFailure, also of the earlier save.
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
        jobs = saving(target, content(), self._world)
        if not self._asynchronous:
            save_now(jobs, self._world)
            self._done(target)
            return
        self._flight = _Flight(target, step, jobs, next(jobs))
        self._wait()  # all ranks wait for `Target.begin`: without its success the training must not continue

    def ready(self) -> bool:
        """Whether this rank has done its current job of a save."""
        return self._flight is not None and self._flight.work.succeeded

    def raise_failed(self) -> None:
        """Raises the error of this rank's current job. Must be called within `all_ranks_or_none`."""
        if self._flight is not None and self._flight.work.done:
            self._flight.work.result()

    def advance(self) -> None:
        """Begins the next job of a save, after all ranks were `ready`."""
        flight = self._flight
        assert flight is not None
        job = proceed(flight.jobs, flight.work.result())
        if job is not None:
            flight.work = _Work(job)
            return
        self._flight = None
        self._done(flight.target)

    def finish(self) -> None:
        """Waits until the save in flight is complete. Raises: as `begin`."""
        while self._flight is not None:
            self._wait()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Completes a save in flight if the body raises an error that all ranks know, so that all of them are here.

        A rank that ends alone does not wait, since its storage may hang; the next launch removes what it left."""
        try:
            yield
        except Exception as error:
            if known_to_all(error) or self._world.size == 1:
                try:
                    self.finish()
                except Exception as failure:
                    if str(failure) != str(error):  # not the reason for which the run ends
                        logger.warning("the checkpoint in flight was not completed: %s", failure)
            raise
        finally:
            self._abandon()

    def _wait(self) -> None:
        flight = self._flight
        assert flight is not None
        with all_ranks_or_none(self._world):
            flight.work.wait()
            flight.work.result()
        self.advance()

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

    def __init__(self, target: Target, step: int, jobs: Any, first: Job) -> None:
        self.target, self.step, self.jobs = target, step, jobs
        self.work = _Work(first)


class _Work:
    """A job in a daemon thread, which does not keep the process alive."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._result: Any = None
        self._error: BaseException | None = None
        self._over = threading.Event()
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    @property
    def done(self) -> bool:
        return self._over.is_set()

    @property
    def succeeded(self) -> bool:
        return self.done and self._error is None

    def wait(self) -> None:
        self._over.wait()

    def result(self) -> Any:
        """Returns what the work returned, or raises its error."""
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._job()
        except BaseException as error:
            self._error = error
        finally:
            self._over.set()
