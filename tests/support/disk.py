"""Whether DeepSpeed can keep optimizer states on a disk on this machine.

    python -m tests.support.disk

compiles DeepSpeed's asynchronous I/O in the environment, where it stays. Tests do not compile it: that takes minutes,
in which all other tests would wait for its lock.
"""

from __future__ import annotations

import ctypes.util
from functools import cache
from pathlib import Path

import pytest

from univitar_ds.training.engine.compiled_ops import folders
from univitar_ds.training.engine.engine import load_deepspeed

HEADER, OPERATION = Path("/usr/include/libaio.h"), "async_io"


@cache
def obstacle() -> str:
    """Why optimizer states cannot be on a disk here; empty if they can. The header may be elsewhere; then the tests are
    skipped."""
    if not HEADER.is_file() or ctypes.util.find_library("aio") is None:
        return "libaio-dev is not installed"
    if not any((folder / OPERATION / f"{OPERATION}.so").is_file() for folder in folders()):
        return f"DeepSpeed's {OPERATION} is not compiled; python -m tests.support.disk does"
    return ""


needs_disk = pytest.mark.skipif(bool(obstacle()), reason=obstacle())


def main() -> None:
    load_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder().load(verbose=False)


if __name__ == "__main__":
    main()
