"""Traces of whole steps by PyTorch's profiler, which chrome://tracing and https://ui.perfetto.dev open."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from univitar_ds.atomic_write import replacing
from univitar_ds.config.run_folder import PROFILE
from univitar_ds.config.watch import ProfileConfig
from univitar_ds.errors import UserError
from univitar_ds.run_lock import still_ours
from univitar_ds.training.distributed.process_group import World

logger = logging.getLogger(__name__)


_LOG_LEVEL, _SILENT = "KINETO_LOG_LEVEL", "6"
"""Environment variable and value that silence the profiler's library: it logs to stderr up to level 5."""


class StepProfiler:
    """Traces the steps of `logging.profile` on this rank. If a trace cannot be written, a warning is logged.

    A run that is resumed within these steps traces the rest of them. Tracing does not change results.
    """

    def __init__(self, cfg: ProfileConfig | None, run: Path, world: World) -> None:
        wanted = cfg is not None and (world.is_main or cfg.ranks == "all")
        self._steps = range(cfg.from_step, cfg.from_step + cfg.steps) if wanted else range(0)
        self._run, self._world = run, world
        self._profile: Any = None
        self._first = 0

    def begin_step(self, number: int) -> None:
        if self._profile is None and number in self._steps:
            activities = [ProfilerActivity.CPU]
            if self._world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            os.environ.setdefault(_LOG_LEVEL, _SILENT)
            self._profile, self._first = torch.profiler.profile(activities=activities), number
            self._profile.start()

    def end_step(self, number: int) -> None:
        if self._profile is not None and number >= self._steps.stop - 1:
            self.close()

    def annotate(self, name: str) -> AbstractContextManager[Any]:
        """Returns a context whose body has this name in the trace."""
        return nullcontext() if self._profile is None else torch.profiler.record_function(name)

    def close(self) -> None:
        """Writes the trace, if one was begun."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        self._steps = range(0)  # one trace for each launch, even after a rollback
        profile.stop()
        path = self._run / PROFILE / f"step{self._first:08d}-rank{self._world.rank:05d}.json.gz"
        try:
            still_ours(self._run)
            path.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                plain = Path(folder, "trace.json")
                profile.export_chrome_trace(str(plain))
                with replacing(path) as partial, plain.open("rb") as read, gzip.open(partial, "wb", 5) as written:
                    shutil.copyfileobj(read, written)
        except (OSError, UserError, RuntimeError) as error:
            logger.warning("no trace of the steps from %d on: %s: %s", self._first, type(error).__name__, error)
            return
        logger.info("trace of the steps from %d on: %s (open it in https://ui.perfetto.dev)", self._first, path)
