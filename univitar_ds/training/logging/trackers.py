"""Sends the metrics of a run to experiment trackers: Weights & Biases and Trackio.

A tracker may need a network, so a thread sends the metrics, and training does not wait. A tracker that fails is not
used again in this launch, after one warning; the run continues, and its other logs are complete.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.run_folder import TRACKERS
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import first_line
from univitar_ds.extras import extra

logger = logging.getLogger(__name__)

WAITING = 10_000
"""Maximum number of points that wait for a tracker; further points are dropped."""
CLOSING_S = 20.0
"""Seconds that a run waits at its end for a tracker to accept the last points. Launchers kill a process 30 s after
SIGTERM."""
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@\"']+(?=@)")


class Client(Protocol):
    """A connection to a tracker."""

    def log(self, values: Mapping[str, Any], step: int) -> None: ...

    def finish(self) -> None: ...


def without_credentials(text: str) -> str:
    """Returns `text` with `***` in place of user and password in URLs."""
    return _CREDENTIALS.sub("***", text)


class Tracker:
    """One tracker of a run, and the thread that sends points to it. Only on rank 0."""

    def __init__(self, name: str, connect: Callable[[], Client], closing_s: float = CLOSING_S) -> None:
        self._name, self._connect, self._closing_s = name, connect, closing_s
        self._failed = threading.Event()
        self._points: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Queues the values of a step, by their names with groups."""
        if self._failed.is_set():
            return
        if self._points.qsize() < WAITING:
            self._points.put((dict(values), step))
            return
        if not self._dropped:
            logger.warning(
                "%s accepts points too slowly: from step %d on it lacks some of them; metrics.jsonl has all",
                self._name,
                step,
            )
        self._dropped += 1

    def close(self) -> None:
        """Waits until the tracker has accepted all points, at most CLOSING_S. Can be called again."""
        if not self._thread.is_alive():
            return
        self._points.put(None)
        self._thread.join(self._closing_s)
        if self._thread.is_alive() and not self._failed.is_set():
            self._failed.set()
            logger.warning(
                "%s has not taken the last points within %.0f s, the run ends without them; metrics.jsonl has all",
                self._name,
                self._closing_s,
            )

    def _work(self) -> None:
        client = None
        try:
            client = self._connect()
            while (point := self._points.get()) is not None:
                client.log(*point)
            client.finish()
        except BaseException as error:  # also SystemExit, which a library may raise
            if not self._failed.is_set():
                self._failed.set()
                reason = without_credentials(first_line(error))
                logger.warning(
                    "no more metrics to %s in this launch, the run continues: %s: %s",
                    self._name,
                    type(error).__name__,
                    reason,
                )
            if client is not None:
                with suppress(Exception):
                    client.finish()


def open_trackers(cfg: RunConfig, run: Path) -> list[Tracker]:
    """Returns the trackers that the configuration names. They connect in their own threads.

    A resumed run continues under its identifier, which is stored in `trackers.json` in the run's folder.
    Raises: OSError if this file cannot be written.
    """
    chosen = {name: getattr(cfg.logging, name) for name in _CLIENTS}
    if not any(settings is not None for settings in chosen.values()):
        return []
    known = _known(run)
    for name, settings in chosen.items():
        if settings is not None and name not in known:
            identifier = secrets.token_hex(8)
            # Trackio identifies a run by its name, and would continue another run of this name.
            known[name] = f"{settings.name or cfg.name}-{identifier}" if name == "trackio" else identifier
    replace_text(run / TRACKERS, json.dumps(known, indent=2) + "\n")
    shared = json.loads(without_credentials(json.dumps(cfg.model_dump(mode="json"))))
    return [
        Tracker(name, lambda make=make, name=name: make(cfg, known[name], shared))
        for name, make in _CLIENTS.items()
        if chosen[name] is not None
    ]


def _known(run: Path) -> dict[str, str]:
    """Returns the identifiers that an earlier launch has stored, by tracker."""
    with suppress(OSError, ValueError):
        content = json.loads((run / TRACKERS).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return {name: value for name, value in content.items() if isinstance(value, str) and value}
    return {}


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, cfg: RunConfig, identifier: str, shared: dict[str, Any]) -> None:
        with extra("wandb"):
            import wandb

        settings = cfg.logging.wandb
        if settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError(
                "no API key was found; run `wandb login`, set WANDB_API_KEY, or give logging.wandb.mode=offline"
            )
        self._run = wandb.init(
            entity=settings.entity,
            project=settings.project,
            name=settings.name or cfg.name,
            group=settings.group,
            tags=settings.tags or None,
            notes=settings.notes,
            mode=settings.mode,
            id=identifier,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or cfg.output,
            config=shared,
            allow_val_change=True,  # a resumed run may have other settings of the machine
            # Arguments and the state of a repository may have secrets; wandb must not capture or print console output.
            settings=wandb.Settings(
                console="off", silent=True, x_disable_meta=True, disable_git=True, disable_code=True
            ),
        )
        # wandb's own step never decreases, but a rollback or a resumed run returns to an earlier one.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log({**values, "step": step})

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of Trackio, in its folder on this machine."""

    def __init__(self, cfg: RunConfig, identifier: str, shared: dict[str, Any]) -> None:
        with extra("trackio"):
            import trackio

        settings = cfg.logging.trackio
        self._run = trackio.init(
            project=settings.project,
            name=identifier,
            group=settings.group,
            config=shared,
            resume="allow",
            embed=False,
        )

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        self._run.finish()


_CLIENTS: dict[str, Callable[[RunConfig, str, dict[str, Any]], Client]] = {"wandb": _Wandb, "trackio": _Trackio}
"""The trackers by their keys in `logging`."""
