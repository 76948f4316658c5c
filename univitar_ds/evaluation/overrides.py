"""The keys of a run file that an evaluation may override, and the files that it may replace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from univitar_ds.config.load import load_config
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import ConfigError
from univitar_ds.regular_files import read_bytes

SECTIONS = ("evaluation", "data", "logging")
"""Sections that an evaluation reads."""
TRAINING_ONLY = ("data.sources", "data.lanes", "data.pool_samples", "data.accept_changed_sources", "data.log_samples")
"""Keys of `SECTIONS` that only training reads. Overriding one would have no effect, so it is an error."""


def overridden(path: Path, config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Returns the configuration in the file `path` with overrides of keys that an evaluation reads.

    Args: config: the configuration in `path`, returned if there are no overrides.
    Raises: ConfigError if an override has another key or makes the run file invalid.
    """
    for entry in overrides:
        key = entry.partition("=")[0]
        if key.split(".")[0] not in SECTIONS:
            raise ConfigError(
                f"{key} is a key of the training, which has no effect on a finished checkpoint; override keys of "
                f"{', '.join(SECTIONS[:-1])} and {SECTIONS[-1]}, or train another run"
            )
        if any(key == own or key.startswith(f"{own}.") or own.startswith(f"{key}.") for own in TRAINING_ONLY):
            raise ConfigError(
                f"{key} is read only by training and has no effect on an evaluation; remove it. The data of an "
                "evaluation is evaluation.sources, for example evaluation.sources.0.path"
            )
    return load_config(path, overrides) if overrides else config


def same_evaluation(before: RunConfig, after: RunConfig) -> bool:
    """Whether both configurations evaluate the same data with the same templates."""
    return all(
        getattr(before.evaluation, name) == getattr(after.evaluation, name)
        for name in ("sources", "image_templates", "video_templates")
    )


def is_result(path: Path) -> bool:
    """Whether a file contains the results of an evaluation. Raises: OSError if it cannot be read."""
    try:
        content = json.loads(read_bytes(path))
    except ValueError:
        return False
    return isinstance(content, dict) and content.keys() >= {"format", "checkpoint", "figures"}
