"""Traces of whole steps by PyTorch's profiler. The files can be opened in chrome://tracing and https://ui.perfetto.dev."""

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
"""Environment variable and value that silence the profiler's library, whose messages on stderr have levels 0 to 5."""


class StepProfiler:
    """Traces the steps that `logging.profile` selects, if it selects this rank. Tracing does not change results.

    Each launch writes at most one trace for a rank, `profile/stepNNNNNNNN-rankNNNNN.json.gz` in the run's folder. A run
    that is resumed within the selected steps traces the rest of them.
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
        """Ends and writes the trace, if one was begun. If it cannot be written, a warning is logged."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        self._steps = range(0)  # no second trace if a rollback repeats these steps
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
            reason = f"{type(error).__name__}: {error}"
            logger.warning("the trace that begins at step %d cannot be written: %s", self._first, reason)
            return
        logger.info("trace that begins at step %d: %s (open it in https://ui.perfetto.dev)", self._first, path)
