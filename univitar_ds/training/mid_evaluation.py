"""Evaluations while a run trains: their schedule, the logging of their results, and their isolation from the training.

An evaluation computes with copies of the weights, between two steps. It changes neither the engine nor the loader nor
the state of a random generator, so training with and without evaluations gives bitwise equal weights. Its time is not
counted as time of a step. If an evaluation fails on any rank, all ranks abandon it and continue the training.
"""

from __future__ import annotations

import gc
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import first_line
from univitar_ds.training.distributed.preemption import Stop
from univitar_ds.training.distributed.process_group import PeerFailure, World, gather_json, known_to_all
from univitar_ds.training.engine.engine import Engine
from univitar_ds.training.logging.board import EVALUATED, OF_TRAINED, results
from univitar_ds.training.logging.run_logs import RunLogs
from univitar_ds.training.state import State
from univitar_ds.training.watch.phases import MID_EVALUATION, StepClock

logger = logging.getLogger(__name__)

Results = Sequence[Mapping[str, Any]]
"""The results of one evaluation, equal on all ranks: for each kind of weights `weights` (averaged or trained),
`figures` as `Figure.to_dict` returns them, and `notes`. The weights that are exported come first."""
Evaluate = Callable[[Engine, Callable[[], bool]], Results | None]
"""Evaluates the weights of an engine. All ranks call it, with a function that returns whether the rank is asked to
stop.

Returns: None if a rank was asked to stop. Raises: on all ranks if one of them fails, as `all_ranks_or_none`."""


class MidEvaluation:
    """The evaluations of a run while it trains, `evaluation.every_samples` apart. All ranks make the same calls."""

    def __init__(
        self, cfg: RunConfig, world: World, evaluate: Evaluate | None, logs: RunLogs, clock: StepClock, stop: Stop
    ) -> None:
        """Args: evaluate: None: no evaluation is ever due."""
        self._cfg, self._world, self._evaluate = cfg.evaluation, world, evaluate
        self._logs, self._clock, self._stop = logs, clock, stop

    def due(self, state: State) -> bool:
        """Whether the run has passed a multiple of `every_samples` since the last evaluation."""
        every = self._cfg.every_samples
        if not every or self._evaluate is None or not self._cfg.sources:
            return False
        return state.progress.samples // every > state.evaluated // every

    def run(self, engine: Engine, state: State, note: Callable[[dict[str, Any]], None]) -> bool:
        """Evaluates the current weights and logs the results. An evaluation that a stop request interrupts stays due.

        Args: note: adds an event to the run.
        Returns: whether the result is the best of the run; the same on all ranks.
        """
        start, progress = time.monotonic(), state.progress
        with self._clock.section(MID_EVALUATION), _untouched(self._world.device):
            found, failure = self._attempt(engine)
            _free(self._world.device)
        seconds = time.monotonic() - start
        self._logs.leave_out(seconds)
        if failure is not None:
            state.evaluated = progress.samples
            note({"step": progress.step, "event": "evaluation_failed", **failure})
        if found is None:
            return False
        state.evaluated = progress.samples
        values = results(found[0]["figures"], EVALUATED)
        for other in found[1:]:
            values |= results(other["figures"], OF_TRAINED)
        line = {"step": progress.step, "samples_seen": progress.samples, "evaluation_s": round(seconds, 3), **values}
        chosen = score_of(found[0]["figures"], values, self._cfg.best)
        better = chosen is not None and _is_better(*chosen, state.best_evaluation)
        if better:
            figure, value = chosen
            state.best_evaluation = {"step": progress.step, "figure": figure, "value": value}
        self._logs.write_evaluation(line, self._text(progress.step, seconds, chosen, better))
        if chosen is None and self._cfg.best is not None and self._world.is_main:
            logger.warning(
                "evaluation.best is %s, which is not the name of a figure, so no best checkpoint is kept; "
                "choose one of %s",
                self._cfg.best,
                ", ".join(sorted(values)),
            )
        return better

    def _attempt(self, engine: Engine) -> tuple[Results | None, dict[str, Any] | None]:
        """Returns the results and None, or None and the failure: the rank and its reason, equal on all ranks."""
        try:
            return self._evaluate(engine, lambda: self._stop.requested), None
        except Exception as error:
            if not known_to_all(error):
                raise  # the other ranks did not leave the evaluation, so no rank can continue
            own = None if isinstance(error, PeerFailure) else f"{type(error).__name__}: {first_line(error)}"
        reasons = gather_json(own, self._world)  # after `except`: the frames of the error hold memory
        rank = next(rank for rank, reason in enumerate(reasons) if reason is not None)
        return None, {"rank": rank, "reason": reasons[rank]}

    @staticmethod
    def _text(step: int, seconds: float, chosen: tuple[str, float] | None, better: bool) -> str:
        result = "" if chosen is None else f": {chosen[0]} {100 * chosen[1]:.1f} %"
        return f"evaluation after step {step}, {seconds:.0f} s{result}{', the best so far' if better else ''}"


def score_of(
    figures: Sequence[Mapping[str, Any]], values: Mapping[str, float], name: str | None
) -> tuple[str, float] | None:
    """Returns name and value of the figure that decides which checkpoint is the best; None if there is none.

    Args: figures, values: of an evaluation, `values` by name; name: `evaluation.best`.
    """
    if name is not None:
        found = values.get(name, values.get(f"{EVALUATED}/{name}"))
        return None if found is None else (name, found)
    for label, measure in (("mean top-1", "top-1"), ("mean R@1", "R@1")):
        chosen = [figure["value"] for figure in figures if figure["measure"] == measure]
        if chosen:
            return label, math.fsum(chosen) / len(chosen)
    return None


def _is_better(figure: str, value: float, best: Mapping[str, Any]) -> bool:
    """Whether a value is above the best one so far. If that is of another figure, any finite value is better."""
    return math.isfinite(value) and (best.get("figure") != figure or value > best["value"])


@contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Restores the state of all random generators after the body."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _free(device: torch.device) -> None:
    """Frees the memory of an evaluation, also in the allocator's cache: the next steps may need blocks of other
    sizes."""
    gc.collect()  # an error and its frames refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
