"""Reports a package of an extra that is not installed, with the command that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from univitar_ds.errors import InstallationError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Wraps statements that only import packages of the extra `name`, as in `pip install 'univitar_ds[train]'`.

    Raises: InstallationError if a package is not installed. Errors within an installed package are not changed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "univitar_ds":
            raise
        raise InstallationError(
            f"this needs the package {package}, which is not installed; pip install 'univitar_ds[{name}]'"
        ) from error
