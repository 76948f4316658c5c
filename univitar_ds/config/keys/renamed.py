"""Earlier names of keys, so that run files, overrides and checkpoints of earlier versions remain readable."""

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
"""Earlier and present names of keys; `*` is any index of a list. Only the last part differs."""
METRICS = {"shrunk": "downscaled"}
"""Earlier and present names of the metrics whose sums over steps a checkpoint stores."""


def present_key(dotted: str) -> str:
    """Returns the present name of an override's key, also if the key is below a renamed section."""
    parts = dotted.split(".")
    for old, new in KEYS.items():
        wanted = old.split(".")
        head = parts[: len(wanted)]
        if len(head) == len(wanted) and all(want in ("*", part) for want, part in zip(wanted, head, strict=True)):
            return ".".join([*head[:-1], new.rpartition(".")[2], *parts[len(wanted) :]])
    return dotted


def rename_keys(content: dict[str, Any], where: str, *, report: bool = True) -> None:
    """Renames the earlier keys in a run file's content in place, and logs one line if there are any (with `report`).

    Args: where: name of the run file in messages.
    Raises: ConfigError if a key is given under both names.
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
    if renamed and report:
        logger.info("%s has keys under earlier names: %s", where, ", ".join(renamed))


def present_sums(sums: Mapping[str, float]) -> dict[str, float]:
    """Returns the sums of a checkpoint under their present names."""
    return {METRICS.get(name, name): value for name, value in sums.items()}


def _sections(content: Any, parts: list[str], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the mappings at a path, each with its dotted name and a final dot."""
    if not parts:
        if isinstance(content, dict):
            yield place, content
    elif parts[0] == "*":
        for index, entry in enumerate(content if isinstance(content, list) else ()):
            yield from _sections(entry, parts[1:], f"{place}{index}.")
    elif isinstance(content, dict):
        yield from _sections(content.get(parts[0]), parts[1:], f"{place}{parts[0]}.")
