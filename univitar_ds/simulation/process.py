"""Runs simulated steps in processes of their own, where the stubs take the place of CUDA's libraries."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from univitar_ds.atomic_write import takes_files
from univitar_ds.errors import first_line
from univitar_ds.import_path import safe_environment
from univitar_ds.simulation import libraries

AT_ONCE = 4
"""Maximum number of simulations that run at the same time."""
STEP_BYTES = 2e9
"""Host memory of a simulation, without the optimizer's states that the run keeps in host memory: 1 to 2 GB."""
MEMORY = Path("/proc/meminfo")
"""The kernel's file with the free memory."""
COMMAND = (sys.executable, "-P", "-m", "univitar_ds.simulation.program")
"""The program of a step, to which the folder of the stubs and the file of the setting are added."""
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
        raise NoSimulation(f"the stubs of CUDA's libraries need {', '.join(missing)} (apt-get install gcc binutils)")


def triton_driver() -> Path:
    """Returns the C source of Triton's launcher. Raises: NoSimulation if Triton is not installed."""
    return _package("triton") / "backends/nvidia/driver.c"


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise NoSimulation(f"{name} is not installed")
    return Path(found.origin).parent


def simulate(settings: Sequence[dict[str, Any]], host_bytes: float = 0.0) -> Iterator[dict[str, Any]]:
    """Yields the result of `step.simulated` for each `step.Setting`, given and returned as objects for JSON.

    A step that cannot be simulated has the result {"error": its message}.

    Args: host_bytes: of the states that a rank keeps in host memory, which are real.
    Raises: NoSimulation if no step can be simulated on this machine.
    """
    check_possible()
    at_once = _number_at_once(STEP_BYTES + host_bytes)
    with _prepared(settings) as (folder, files):
        for first in range(0, len(files), at_once):
            with _running(folder, files[first : first + at_once]) as processes:
                for process in processes:
                    yield _result(process)


def _number_at_once(needed: float) -> int:
    """Returns how many steps are simulated at the same time. Args: needed: bytes of host memory of each.

    Raises: NoSimulation if the memory is too small for one.
    """
    lines = MEMORY.read_text(encoding="ascii").splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    if free < needed:
        raise NoSimulation(
            f"a simulated step needs {needed / 1e9:.3g} GB of host memory, of which {free / 1e9:.3g} GB are free"
        )
    return int(min(AT_ONCE, len(os.sched_getaffinity(0)), free // needed))


@contextmanager
def _prepared(settings: Sequence[dict[str, Any]]) -> Iterator[tuple[Path, list[Path]]]:
    """Yields a temporary folder with the compiled stubs, and a file in it for each setting. Raises: NoSimulation."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix="univitar-ds-simulation-", ignore_cleanup_errors=True)
    except OSError as error:
        raise NoSimulation(f"no temporary folder can be made, set TMPDIR to one: {first_line(error)}") from error
    with temporary as name:
        folder = Path(name)
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            raise NoSimulation(f"programs cannot run in {folder.parent} (noexec); set TMPDIR to another folder")
        try:
            libraries.build(_package("torch") / "lib", triton_driver(), folder)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoSimulation(f"the stubs of CUDA's libraries cannot be compiled: {_reason(error)}") from error
        files = [folder / f"setting-{number}.json" for number in range(len(settings))]
        try:
            for file, setting in zip(files, settings, strict=True):
                file.write_text(json.dumps(setting), encoding="utf-8")
        except OSError as error:
            raise NoSimulation(f"{folder} cannot be written: {first_line(error)}") from error
        yield folder, files


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    return _last_line(error.stderr) if isinstance(error, subprocess.CalledProcessError) else first_line(error)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")[:300]


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Waits for a process, and returns what it printed, or why it printed nothing."""
    out, err = process.communicate()
    with suppress(ValueError):
        return json.loads(out)
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return {
            "error": f"its process was ended by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
        }
    return {"error": _last_line(err)}


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a simulated rank. Args: folder: the folder with the stubs."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    return rank_environment(folder) | {"TRITON_CACHE_DIR": str(cache if takes_files(cache) else folder / "triton")}


def rank_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a simulated rank without Triton's cache. Args: folder: the folder with the stubs."""
    kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    return safe_environment(kept) | {
        "CUDA_VISIBLE_DEVICES": "0",
        "DS_ACCELERATOR": "cuda",
        "OMP_NUM_THREADS": "1",
        "TRITON_LIBCUDA_PATH": str(folder),
    }


@contextmanager
def _running(folder: Path, files: Sequence[Path]) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts a process for each file with a setting. Processes that still run after the body are killed."""
    variables = environment(folder)
    processes: list[subprocess.Popen[str]] = []
    try:
        for file in files:
            processes.append(
                subprocess.Popen(
                    [*COMMAND, str(folder), str(file)],
                    env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
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
