"""Describes the keys of the run file as text: type, limits, default and meaning."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection

from pydantic import BaseModel

from univitar_ds.config.keys.foreign import answer, similar_keys
from univitar_ds.config.keys.renamed import present_key
from univitar_ds.config.keys.tree import INDEX, Key, all_keys, is_mapping
from univitar_ds.errors import ConfigError, shortened

WIDTH = 100
"""Maximum number of columns of the text."""
_OVERVIEW = """
`univitar-ds config SECTION` describes the keys of a section, `univitar-ds config KEY` one key (stages.0.lr).
A key without a default must be given. On the command line: univitar-ds train --config FILE KEY=VALUE ..."""


def describe(name: str | None, changeable: Collection[str] = (), fixed: Collection[str] = ()) -> str:
    """Returns the description of a section with all keys below it, or of a key.

    If `name` is None: one line for each section, and for each key that is in no section.

    Args: name: as in a run file or an override: `stages`, `data.sources`, `stages.0.lr`, `stages.N.lr`, `stages.lr`;
        changeable: keys and sections that a resumed run may change, as their descriptions then state;
        fixed: exceptions, keys below `changeable` that a resumed run may not change.
    Raises: ConfigError, which names similar keys, if there is no such key.
    """
    if name is None:
        top = [key for key in all_keys().values() if len(key.parts) == 1]
        width = max(len(key.name) for key in top)
        return "\n".join([*(_line(key, width) for key in top), _OVERVIEW])
    found = find_key(name)
    below = [key for key in all_keys().values() if key.name == found.name or key.name.startswith(f"{found.name}.")]
    return "\n".join(_entry(key, len(_depth(key)) - len(_depth(found)), changeable, fixed) for key in below)


def find_key(name: str) -> Key:
    """Returns the key for a name in any form that `describe` accepts. Raises: as `describe`."""
    keys = all_keys()
    parts = present_key(name.strip().strip(".")).split(".")
    wanted = [INDEX if part.isdigit() or part == "*" else part for part in parts]
    if (found := keys.get(".".join(wanted))) is not None:
        return found
    for key in keys.values():
        here = [*_depth(key), *([wanted[-1]] if is_mapping(key.field.annotation) and len(wanted) > 1 else [])]
        if [part for part in wanted if part != INDEX] in (here, _depth(key)):
            return key
    shown = shortened(name)
    if wanted[-1:] == [INDEX] and ".".join(wanted[:-1]) in keys:
        return keys[".".join(wanted[:-1])]
    if (known := answer(parts[-1])) is not None:
        raise ConfigError(f"there is no key {shown!r}: {known}")
    near = similar_keys(".".join(wanted), keys)
    hint = f"similar: {', '.join(near)}" if near else "`univitar-ds config` lists the sections"
    raise ConfigError(f"there is no key {shown!r}; {hint}")


def _depth(key: Key) -> list[str]:
    return [part for part in key.parts if part != INDEX]


def _line(key: Key, width: int) -> str:
    value = "" if key.section is not None else f" ({key.type}{_default(key)})"
    return textwrap.fill(f"{key.name:<{width}}  {key.description}{value}", WIDTH, subsequent_indent=" " * (width + 2))


def _entry(key: Key, depth: int, changeable: Collection[str], fixed: Collection[str]) -> str:
    indent = "    " * depth
    meaning = key.description
    if key.name not in fixed and any(key.name == one or key.name.startswith(f"{one}.") for one in changeable):
        meaning += "; a resumed run may change it"
    head = textwrap.fill(
        f"{key.name}: {key.type}{_default(key)}",
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_on_hyphens=False,
    )
    return head + "\n" + textwrap.fill(meaning, WIDTH, initial_indent=indent + "  ", subsequent_indent=indent + "  ")


def _default(key: Key) -> str:
    if key.required:
        return "; must be given"
    value = key.field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        given = value.model_dump(mode="json", include=value.model_fields_set)
        return f"; default {json.dumps(given)}" if given else ""
    return f"; default {json.dumps(key.default)}"
