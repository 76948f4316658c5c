"""Runs simulated steps in processes of their own, where the stubs take the place of CUDA's libraries."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from univitar_ds.errors import first_line
from univitar_ds.simulation import libraries

AT_ONCE = 4
"""Maximum number of simulations that run at the same time; each takes 1 to 2 GB of memory."""
_LEFT_OUT = ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "UNIVITAR_DS_KERNELS")
"""Variables of the environment that would change the simulated rank."""


class NoSimulation(Exception):
    """Raised if this machine cannot simulate a GPU. The message is the reason."""


def check_possible() -> None:
    """Checks that torch is a CUDA build and that the stubs can be compiled, without importing torch.

    Raises: NoSimulation.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NoSimulation(f"the simulation runs on Linux on x86-64, this is {platform.system()} {platform.machine()}")
    build = (_package("torch") / "version.py").read_text(encoding="utf-8")
    if re.search(r"^cuda\b.*= '", build, re.MULTILINE) is None:
        raise NoSimulation("torch is a build without CUDA")
    triton_driver()
    check_compiler()


def check_compiler() -> None:
    """Raises: NoSimulation if a program that compiles the stubs is missing."""
    if missing := libraries.missing_programs():
        raise NoSimulation(
            f"the stand-ins for CUDA's libraries need {', '.join(missing)} (apt-get install gcc binutils)"
        )


def triton_driver() -> Path:
    """Returns the C source of Triton's launcher. Raises: NoSimulation if Triton is not installed."""
    return _package("triton") / "backends/nvidia/driver.c"


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise NoSimulation(f"{name} is not installed")
    return Path(found.origin).parent


def simulate(settings: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the result of `step.simulated` for each `step.Setting`, given and returned as objects for JSON.

    A step that cannot be simulated has the result {"error": its message}.
    Raises: NoSimulation if no step can be simulated on this machine.
    """
    check_possible()
    with tempfile.TemporaryDirectory(prefix="univitar-ds-simulation-") as folder:
        try:
            libraries.build(_package("torch") / "lib", triton_driver(), Path(folder))
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoSimulation(f"the stand-ins for CUDA's libraries cannot be compiled: {_reason(error)}") from error
        at_once = max(1, min(AT_ONCE, len(os.sched_getaffinity(0))))
        for first in range(0, len(settings), at_once):
            with _running(settings[first : first + at_once], folder) as processes:
                for process in processes:
                    out, err = process.communicate()
                    yield json.loads(out.splitlines()[-1]) if process.returncode == 0 else {"error": _last_line(err)}


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    return _last_line(error.stderr) if isinstance(error, subprocess.CalledProcessError) else first_line(error)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")[:300]


@contextmanager
def _running(settings: Sequence[dict[str, Any]], folder: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts a process for each setting. Processes that still run after the body are killed."""
    environment = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT} | {
        "CUDA_VISIBLE_DEVICES": "0",
        "DS_ACCELERATOR": "cuda",
        "OMP_NUM_THREADS": "1",
        "TRITON_LIBCUDA_PATH": folder,
    }
    processes: list[subprocess.Popen[str]] = []
    try:
        for number, setting in enumerate(settings):
            given = Path(folder, f"setting-{number}.json")
            given.write_text(json.dumps(setting), encoding="utf-8")
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "univitar_ds.simulation.program", folder, str(given)],
                    env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    text=True, encoding="utf-8", errors="replace",
                )
            )  # fmt: skip
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def load_stubs(folder: Path) -> None:
    """Loads the stubs into this process, before torch: a library that is loaded already is not searched for again."""
    for path in sorted(folder.glob("lib*.so.*")):
        if ".stand-in." not in path.name:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
