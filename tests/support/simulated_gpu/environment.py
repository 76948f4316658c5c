"""The environment of a simulated GPU: the CUDA build of torch in its own folder, with stubs of CUDA's libraries.

A process with a simulated GPU runs in the environment of the tests, with this folder first on its path. The folder is
made once (30 s and 1.2 GB: torch without the 3 GB of CUDA's libraries), used again, and removed by `make clean`.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.progress import run_watched
from univitar_ds.simulation import libraries
from univitar_ds.simulation.process import NoSimulation, check_compiler, rank_environment, triton_driver

FOLDER = ROOT / ".venv-simulated-gpu"
MARK = ".univitar-ds"
"""The file by which `make clean` recognizes the folder. It is also the lock between processes that make the folder."""
MADE = "made.json"
"""The file with the versions that the folder was made from. It is written last."""


def prepare() -> float:
    """Makes the environment if it does not exist. Returns the seconds that it took, 0 if it existed.

    Raises: NoSimulation.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NoSimulation(
            f"CUDA builds of torch are for Linux on x86-64, this is {platform.system()} {platform.machine()}"
        )
    check_compiler()
    if FOLDER.is_symlink() or (FOLDER.exists() and not (FOLDER / MARK).is_file()):
        raise NoSimulation(f"{FOLDER} exists and was not made by the tests; move it")
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / MARK).open("a") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        begin = time.monotonic()
        wanted = _ingredients()
        made = FOLDER / MADE
        before = json.loads(made.read_text(encoding="utf-8")) if made.is_file() else {}
        if before == wanted:
            return 0.0
        made.unlink(missing_ok=True)
        if before.get("torch") != wanted["torch"]:
            _install(wanted["torch"])
        libraries.build(FOLDER / "torch/lib", triton_driver(), FOLDER / "torch/lib")
        made.write_text(json.dumps(wanted), encoding="utf-8")
        return time.monotonic() - begin


def run_simulated(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a module in a process with a simulated GPU."""
    lib = FOLDER / "torch/lib"
    environment = rank_environment(lib) | {
        "PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}",
        "LD_LIBRARY_PATH": str(lib),
        "TRITON_CACHE_DIR": str(FOLDER / "triton"),
        "TORCH_EXTENSIONS_DIR": str(FOLDER / "extensions"),
    }
    return run_watched([sys.executable, "-m", module, *arguments], env=environment, cwd=ROOT)


def _ingredients() -> dict[str, Any]:
    digest = hashlib.sha256()
    for path in (Path(libraries.__file__), *libraries.SOURCES.values(), triton_driver()):
        digest.update(path.read_bytes())
    version = importlib.metadata.version("torch").partition("+")[0]
    return {"torch": version, "sources": digest.hexdigest()}


def _install(version: str) -> None:
    # `===` selects the build without a suffix such as +cpu, which is the build for CUDA.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input", "--upgrade"]
    command += ["--disable-pip-version-check", "--retries", "1", "--target", str(FOLDER), f"torch==={version}"]
    done = run_watched(command)
    if done.returncode:
        raise NoSimulation(f"pip cannot install the CUDA build of torch {version}: {_without_addresses(done.stderr)}")
    built = (FOLDER / "torch/version.py").read_text(encoding="utf-8")
    if "cuda: Optional[str] = None" in built:
        raise NoSimulation(f"the package index has torch {version} only without CUDA")


def _without_addresses(message: str) -> str:
    words = message.strip().splitlines()[-1:] or ["no message"]
    return " ".join(word for word in words[0].split() if "://" not in word)[:300]
