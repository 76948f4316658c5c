"""Expands `~` and `$VARIABLES` in paths of run files and commands, and makes paths absolute."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, PlainSerializer

from univitar_ds.errors import ConfigError

_DOLLAR = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def expanded(path: str) -> str:
    """Expands `~` and `~user` at the beginning of `path`, and `$NAME`, `${NAME}` and `$$` (a dollar sign) anywhere.

    Also for s3:// addresses. A local path that exists as written keeps its dollar signs.

    Raises: ValueError if a variable is not set or a user is unknown.
    """
    if "$" in path and not ("://" not in path and os.path.exists(os.path.expanduser(path))):
        path = _DOLLAR.sub(lambda match: _value(match, path), path)
    home = os.path.expanduser(path)
    if home == path and path.startswith("~"):
        user = path[1:].partition("/")[0]
        raise ValueError(f"{path}: there is no user {user!r}; write ./{path} for a file of that name")
    return home


def expand(path: str | Path) -> str:
    """Expands a path given to a command; see `expanded`.

    Raises: ConfigError if a variable is not set or a user is unknown.
    """
    try:
        return expanded(str(path))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def absolute(path: str) -> str:
    """Returns the absolute path without resolving links. A path with a scheme (s3://) is returned unchanged."""
    return path if "://" in path else os.path.join(os.getcwd(), path)


def written(path: str) -> str:
    """Returns `path` escaped for a run file, so that `expanded` restores it."""
    return path.replace("$", "$$")


def _value(match: re.Match[str], path: str) -> str:
    name = match[2] or match[3]
    if name is None:
        return "$"
    value = os.environ.get(name)
    if value is None:
        raise ValueError(f"{path}: the variable {name} is not set; set it, or write $$ for a dollar sign")
    return value


PathText = Annotated[str, AfterValidator(expanded), PlainSerializer(written)]
"""The type of a path in a run file."""


def user_cache() -> Path:
    """Returns this program's folder in the user's cache, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "univitar_ds"
