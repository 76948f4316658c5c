"""How paths of run files and commands are read: `~`, `$VARIABLES` and the folder in which a relative path starts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, PlainSerializer

from univitar_ds.errors import ConfigError

_DOLLAR = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def expanded(path: str) -> str:
    """The expanded path: `~` and `~user` at its beginning, `$NAME` and `${NAME}` anywhere, `$$` for a dollar.

    The same for local paths and s3:// addresses. A local path that exists under exactly this name stays as it is.

    Raises: ValueError that names a variable that is not set, or a user that is not known.
    """
    if "$" in path and not ("://" not in path and os.path.exists(os.path.expanduser(path))):
        path = _DOLLAR.sub(lambda match: _value(match, path), path)
    home = os.path.expanduser(path)
    if home == path and path.startswith("~"):
        user = path[1:].partition("/")[0]
        raise ValueError(f"{path}: there is no user {user!r}; write ./{path} for a file of that name")
    return home


def expand(path: str | Path) -> str:
    """`expanded` for a path of a command. Raises: ConfigError."""
    try:
        return expanded(str(path))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def absolute(path: str) -> str:
    """The absolute path, without resolving its parts; a path with a scheme (s3://) stays."""
    return path if "://" in path else os.path.join(os.getcwd(), path)


def written(path: str) -> str:
    """The path escaped for a run file, so that `expanded` returns it unchanged."""
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
"""A path in a run file."""
