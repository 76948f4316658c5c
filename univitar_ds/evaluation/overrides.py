"""Which keys of a run file an evaluation may override, and which files it may replace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from univitar_ds.config.load import load_config
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import ConfigError

SECTIONS = ("evaluation", "data", "logging")
OF_TRAINING = ("data.sources", "data.lanes", "data.pool_samples", "data.accept_changed_sources", "data.log_samples")
"""Keys of those sections that only training reads: overriding one would silently change nothing."""


def overridden(path: Path, config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run's `config`, read from `path`, with overrides of keys that an evaluation reads.

    Raises: ConfigError for an override of anything else, or one that makes the run file invalid.
    """
    for entry in overrides:
        key = entry.partition("=")[0]
        if key.split(".")[0] not in SECTIONS:
            raise ConfigError(
                f"{key} is a key of the training, which has no effect on a finished checkpoint; override keys of "
                f"{', '.join(SECTIONS[:-1])} and {SECTIONS[-1]}, or train another run"
            )
        if any(key == own or key.startswith(f"{own}.") or own.startswith(f"{key}.") for own in OF_TRAINING):
            raise ConfigError(
                f"{key} is read by training only, an evaluation reads evaluation.sources: override "
                "evaluation.sources.0.path, for example"
            )
    return load_config(path, overrides) if overrides else config


def same_evaluation(before: RunConfig, after: RunConfig) -> bool:
    """Whether both evaluations measure the same on the same data."""
    return all(
        getattr(before.evaluation, name) == getattr(after.evaluation, name)
        for name in ("sources", "image_templates", "video_templates")
    )


def is_result(path: Path) -> bool:
    """Whether a file holds the results of an evaluation."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() >= {"format", "checkpoint", "figures"}
