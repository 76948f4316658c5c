"""Earlier names of keys: run files, overrides and checkpoints that hold them stay readable."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from univitar_ds.errors import ConfigError

logger = logging.getLogger(__name__)

KEYS = {
    "data.max_clip_s": "data.max_video_s",
    "stages.*.clip_frames": "stages.*.video_frames",
    "stages.*.clip_sampling": "stages.*.video_sampling",
    "logging.pictures_every_steps": "logging.images_every_steps",
}
"""Earlier and present name; `*` is any place in a list. Only the last part differs."""
METRICS = {"shrunk": "downscaled"}
"""The same of the sums over steps that a checkpoint holds."""


def present_key(dotted: str) -> str:
    """The present name of a key of an override, also if it is below a renamed section."""
    parts = dotted.split(".")
    for old, new in KEYS.items():
        wanted = old.split(".")
        head = parts[: len(wanted)]
        if len(head) == len(wanted) and all(want in ("*", part) for want, part in zip(wanted, head, strict=True)):
            return ".".join([*head[:-1], new.rpartition(".")[2], *parts[len(wanted) :]])
    return dotted


def rename_keys(content: dict[str, Any], where: str) -> None:
    """Renames the earlier keys in a run file's content, with one log line if there are any.

    Raises: ConfigError for a key that is given under both names.
    """
    renamed = []
    for old, new in KEYS.items():
        *sections, before = old.split(".")
        after = new.rpartition(".")[2]
        for place, section in _sections(content, sections):
            if before not in section:
                continue
            if after in section:
                raise ConfigError(
                    f"{where}: {place}{before} is now called {place}{after}, and both are given; keep {after}"
                )
            items = [(after if key == before else key, value) for key, value in section.items()]
            section.clear()
            section.update(items)
            renamed.append(f"{place}{before} is now {after}")
    if renamed:
        logger.info("%s has keys under earlier names: %s", where, ", ".join(renamed))


def present_sums(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums of a checkpoint under their present names."""
    return {METRICS.get(name, name): value for name, value in sums.items()}


def _sections(content: Any, parts: list[str], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The mappings that a path leads to, each with its dotted name."""
    if not parts:
        if isinstance(content, dict):
            yield place, content
    elif parts[0] == "*":
        for index, entry in enumerate(content if isinstance(content, list) else ()):
            yield from _sections(entry, parts[1:], f"{place}{index}.")
    elif isinstance(content, dict):
        yield from _sections(content.get(parts[0]), parts[1:], f"{place}{parts[0]}.")
