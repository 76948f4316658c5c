"""stdout and stderr with another encoding, closed, as a pipe without a reader, or as a file on a full disk.

What is printed is also in files, or only for reading, so no such failure ends a run.
"""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger(__name__)

lost: list[OSError] = []
"""The first failure of stdout, after which it stays silent."""


def prepare_screen() -> None:
    """Makes stdout and stderr escape characters that they cannot encode, and opens them if they were closed.

    Otherwise the next file that is opened would get the closed descriptor, and libraries would print into it.
    """
    lost.clear()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False))
        elif hasattr(stream, "reconfigure"):  # but not a replacement by a notebook or a test
            stream.reconfigure(errors="backslashreplace")


def show(text: str) -> None:
    """Prints to stdout at once. A failure is logged once, kept in `lost`, and ends nothing."""
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
    """Discards what the rest of this process prints: at its end Python flushes the rest, or reports an error."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # of a test, without a descriptor
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
