"""Finds the keys in which the configurations of runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from univitar_ds.reporting.record import RunRecord
from univitar_ds.training.logging.trackers import without_credentials

ABSENT = "-"
"""Shown for a run without the key."""


class Difference(NamedTuple):
    """A dotted key, and its value in each run as text, `ABSENT` if a run does not have the key."""

    key: str
    values: list[str]


def differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """Returns the keys whose values differ, in the order of the first run's file. Credentials in values are removed."""
    flat = [dict(_flat(run.config.model_dump(mode="json"))) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [Difference(key, [without_credentials(one.get(key, ABSENT)) for one in flat]) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted key, value as text) for each leaf. A list without mappings is one value."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{index}")
    else:
        yield key, "null" if value is None else str(value)
