"""The environment of a pretended GPU: the CUDA build of torch in its own folder, with stand-ins for CUDA's libraries.

The folder comes first on the path of a process of the tests' environment, which has all other packages. It is made once
(30 s and 1.2 GB: torch alone, without the 3 GB of CUDA's libraries), used again, and removed by `make clean`.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.pretence import libraries
from tests.support.progress import run_watched

FOLDER = ROOT / ".venv-pretence"
MARK = ".univitar-ds"
"""The file by which `make clean` knows the folder; the lock of processes that make it at the same time."""
MADE = "made.json"
"""Written last: what the folder was made from."""


class NoPretence(Exception):
    """Raised with the reason if there can be no pretended GPU here."""


def prepare() -> float:
    """Makes the environment if it is not there. Returns the seconds that it took, 0 if it was there.

    Raises: NoPretence."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NoPretence(
            f"CUDA builds of torch are for Linux on x86-64, this is {platform.system()} {platform.machine()}"
        )
    if missing := libraries.missing_programs():
        raise NoPretence(f"the stand-ins for CUDA's libraries need {', '.join(missing)} (apt-get install gcc binutils)")
    if FOLDER.is_symlink() or (FOLDER.exists() and not (FOLDER / MARK).is_file()):
        raise NoPretence(f"{FOLDER} is there and was not made by the tests; move it")
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
        libraries.build(FOLDER / "torch/lib", _triton_driver())
        made.write_text(json.dumps(wanted), encoding="utf-8")
        return time.monotonic() - begin


def run_pretended(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a module of the tests in a process with a pretended GPU."""
    lib = FOLDER / "torch/lib"
    left_out = {"TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "UNIVITAR_DS_KERNELS"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | {
        "PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}",
        "LD_LIBRARY_PATH": str(lib),
        "TRITON_LIBCUDA_PATH": str(lib),
        "TRITON_CACHE_DIR": str(FOLDER / "triton"),
        "TORCH_EXTENSIONS_DIR": str(FOLDER / "extensions"),
        "DS_ACCELERATOR": "cuda",
        "OMP_NUM_THREADS": "1",
    }
    return run_watched([sys.executable, "-m", module, *arguments], env=environment, cwd=ROOT)


def _ingredients() -> dict[str, Any]:
    digest = hashlib.sha256()
    for path in (Path(libraries.__file__), *libraries.SOURCES.values(), _triton_driver()):
        digest.update(path.read_bytes())
    version = importlib.metadata.version("torch").partition("+")[0]
    return {"torch": version, "sources": digest.hexdigest()}


def _triton_driver() -> Path:
    found = importlib.util.find_spec("triton")
    if found is None:
        raise NoPretence("triton is not installed")
    return Path(found.origin).parent / "backends/nvidia/driver.c"


def _install(version: str) -> None:
    # `===` names the build without a suffix such as +cpu, which is that for CUDA.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input", "--upgrade"]
    command += ["--disable-pip-version-check", "--retries", "1", "--target", str(FOLDER), f"torch==={version}"]
    done = run_watched(command)
    if done.returncode:
        raise NoPretence(f"pip cannot install the CUDA build of torch {version}: {_without_addresses(done.stderr)}")
    built = (FOLDER / "torch/version.py").read_text(encoding="utf-8")
    if "cuda: Optional[str] = None" in built:
        raise NoPretence(f"the index has torch {version} without CUDA alone")


def _without_addresses(message: str) -> str:
    words = message.strip().splitlines()[-1:] or ["no message"]
    return " ".join(word for word in words[0].split() if "://" not in word)[:300]
