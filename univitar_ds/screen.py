"""Prints to stdout and stderr that may have another encoding, be closed, lack a reader or be on a full disk.

Printed results are also in files, or need not be kept, so a failure to print does not end a run.
"""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger(__name__)

lost: list[OSError] = []
"""Contains the first error of stdout, after which nothing is printed."""


def prepare_screen() -> None:
    """Makes stdout and stderr escape characters that they cannot encode, and opens them if they were closed.

    The next opened file would get the number of a closed descriptor, and libraries would print into that file.
    """
    lost.clear()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `descriptor`
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False))
        elif hasattr(stream, "reconfigure"):  # streams of notebooks and tests may lack it
            stream.reconfigure(errors="backslashreplace")


def show(text: str) -> None:
    """Prints to stdout and flushes. The first failure is logged and kept in `lost`; later calls do nothing."""
    if lost:
        return
    try:
        print(text, flush=True)
    except OSError as error:
        lost.append(error)
        silence_stdout()
        if not isinstance(error, BrokenPipeError):
            logger.warning("stdout takes no more (%s): what follows is not printed", error.strerror)


def silence_stdout() -> None:
    """Redirects stdout to /dev/null, so that Python's flush at the end of the process reports no error."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # stdout has no descriptor, as in tests
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
