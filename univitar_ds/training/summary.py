"""Writes summary.json: totals of a run, and its machine and versions."""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.load import config_fingerprint
from univitar_ds.config.run_folder import CHECKPOINTS, SUMMARY
from univitar_ds.config.schema import RunConfig
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.checkpoint.store import store_of
from univitar_ds.run_lock import still_ours
from univitar_ds.training.engine.engine import Engine, versions
from univitar_ds.training.state import State


def write_summary(cfg: RunConfig, run: Path, engine: Engine, state: State) -> None:
    """Writes summary.json after training has ended or was stopped.

    Keeps the entries that evaluation and export added."""
    content: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        content = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    progress = state.progress
    content |= {
        "name": cfg.name,
        "fingerprint": config_fingerprint(cfg),
        "completed": progress.finished(cfg.stages),
        "steps": progress.step,
        "samples": progress.samples,
        "tokens": progress.tokens,
        "bad_samples": progress.bad_samples,
        "rollbacks": state.rollbacks,
        "skipped_updates": state.skipped,
        "best": state.best,
        "last": state.last,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        "checkpoints": _checkpoints(cfg, run),
        "ranks": engine.world.size,
        "threads_per_rank": torch.get_num_threads(),
        "device": str(engine.world.device.type),
        "machine": f"{platform.node()}, {platform.machine()}, {platform.system()} {platform.release()}",
        "versions": versions(),
    }
    content["seconds"] = content.get("seconds", {}) | {"training": round(state.seconds, 1)}
    still_ours(run)
    replace_text(run / SUMMARY, json.dumps(content, indent=2) + "\n")


def _checkpoints(cfg: RunConfig, run: Path) -> list[str]:
    store = store_of(cfg)
    if store is not None:
        return [f"{store.url}/{name}" for name in store.complete()]
    return [folder.name for folder in checkpoint_dir.complete(run / CHECKPOINTS)]
