"""Finds the paths in a run file and makes them absolute, so that a run can be resumed from any folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from univitar_ds.config.deepspeed import AUTO
from univitar_ds.config.paths import absolute, written
from univitar_ds.config.schema import RunConfig
from univitar_ds.plugins import is_file

NAMES_OR_PATHS = ("deepspeed", "model.init_from", "model.text.path", "objective.teacher.path")
"""Keys whose value is a path if that path exists, else a name."""
PATHS = (
    "output",
    "data.sources.*.path",
    "data.sources.*.class_names",
    "data.sources.*.table.images",
    "data.cache.folder",
    "model.text.tokenizer",
    "objective.teacher.cache",
    "evaluation.sources.*.path",
    "evaluation.sources.*.class_names",
    "evaluation.sources.*.table.images",
    *NAMES_OR_PATHS,
)
"""Keys whose value is a path; `*` is every item of a list."""
_RESULT_PATHS = ("model.init_from", "model.text.path", "model.text.tokenizer", "objective.teacher.path")


def anchored(config: RunConfig) -> RunConfig:
    """Returns the configuration with absolute paths."""
    content = config.model_dump(mode="json")
    for dotted in PATHS:
        for section, key, value in _values(content, dotted):
            path = value.replace("$$", "$")
            if dotted not in NAMES_OR_PATHS or (path != AUTO and os.path.exists(path)):
                section[key] = written(absolute(path))
    content["plugins"] = [written(absolute(entry)) if is_file(entry) else entry for entry in config.plugins]
    return RunConfig.model_validate(content)


def unite_paths(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Replaces a path in `after` by that in `before` if only one of them is absolute and both may name the same file.

    Earlier versions stored relative paths in config.yaml and in every checkpoint.

    Args: before, after: results of `load.result_part`.
    """
    for dotted in _RESULT_PATHS:
        for (_, _, old), (section, key, new) in zip(_values(before, dotted), _values(after, dotted), strict=False):
            if os.path.isabs(old) != os.path.isabs(new) and _ends_with(*sorted((old, new), key=os.path.isabs)):
                section[key] = old


def _ends_with(short: str, long: str) -> bool:
    """Whether the relative path `short` may name the same file as the absolute path `long`."""
    return os.path.normpath(long).endswith(os.sep + os.path.normpath(short).lstrip("./"))


def _values(content: Any, dotted: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yields (section, key, value) for each value at this dotted key that is not None; `*` matches every list item."""
    *names, key = dotted.split(".")
    for section in _sections(content, names):
        if section.get(key) is not None:
            yield section, key, section[key]


def _sections(node: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    if node is None:
        return
    if not names:
        yield node
        return
    for child in node if names[0] == "*" else [node.get(names[0])]:
        yield from _sections(child, names[1:])
