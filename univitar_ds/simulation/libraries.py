"""Stub libraries in place of those of CUDA that a CUDA build of torch is linked against.

torch is linked against about 750 functions of 14 libraries (3 GB as packages), and all of them must be found when torch
is imported. Few are called if nothing computes on the device: `cuda_runtime.c` and `cuda_driver.c` define those, and
all other functions return 0. The names are read from torch's own libraries, so the list fits every version of torch.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME, DRIVER = "libcudart.so", "libcuda.so"
SOURCES = {RUNTIME: HERE / "cuda_runtime.c", DRIVER: HERE / "cuda_driver.c"}
"""Sources of the functions that are called, by the beginning of the library's name."""
VENDOR = re.compile(r"lib(?:cu|nccl|nv)\w*\.so\.\d+")
"""Names of the libraries that come with CUDA."""
PROGRAMS = ("cc", "nm", "readelf")


def missing_programs() -> list[str]:
    """Returns the programs that `build` needs and that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


def build(torch_lib: Path, triton_driver: Path, folder: Path) -> None:
    """Compiles the stub libraries into `folder`.

    Args: torch_lib: the folder of torch's own libraries; triton_driver: the C source of Triton's launcher, which calls
        the driver too.
    Raises: subprocess.CalledProcessError if a compiler or linker fails.
    """
    wanted, libraries = _undefined(torch_lib)
    wanted[""] |= set(re.findall(r"\bcu[A-Z]\w+(?=\()", triton_driver.read_text(encoding="utf-8")))
    sources = {name: path.read_text(encoding="utf-8") for name, path in SOURCES.items()}
    written = {name for source in sources.values() for name in re.findall(r"^int (\w+)\(", source, re.MULTILINE)}
    for library in libraries:
        source = next((source for name, source in sources.items() if library.startswith(name)), "")
        names = wanted.get(library, set())
        # torch names no library for some functions; all of those are put into one that it always loads.
        loose = wanted[""] if library.startswith((RUNTIME, DRIVER)) else set()
        others = sorted((names | loose) - written)
        code = source + "".join(f"int {name}(void) {{ return 0; }}\n" for name in others)
        # The functions need the version that torch was linked against.
        version = _VERSIONS.get(library, library)
        script = f"{version} {{ global: {' '.join(f'{name};' for name in sorted(names))} }};\n" if names else ""
        _compile(folder / library, code, script)


_VERSIONS = {"libnvshmem_host.so.3": "NVSHMEM"}
"""Versions of symbols by library, where they are not the name of the library."""


def _undefined(torch_lib: Path) -> tuple[dict[str, set[str]], list[str]]:
    """Returns the functions of CUDA that torch's libraries lack, by library ("" if torch names none), and all libraries
    of CUDA that they need."""
    wanted: dict[str, set[str]] = defaultdict(set)
    libraries, defined = set(), set()
    by_version = {version: library for library, version in _VERSIONS.items()}
    for path in sorted(torch_lib.glob("*.so")):
        libraries |= set(VENDOR.findall(_output("readelf", "--dynamic", path)))
        for line in _output("nm", "--dynamic", path).splitlines():
            kind, symbol = line.split()[-2:]
            name, _, version = symbol.partition("@")
            if kind == "U" and re.match(r"(?:__)?(?:cu|nccl|nv)", name):
                wanted[by_version.get(version, version)].add(name)
            elif kind not in "Uw":
                defined.add(name)
    return {library: names - defined for library, names in wanted.items()}, sorted(libraries)


def _compile(library: Path, code: str, script: str) -> None:
    source, versions = library.with_suffix(".stand-in.c"), library.with_suffix(".stand-in.map")
    source.write_text(code, encoding="utf-8")
    versions.write_text(script, encoding="utf-8")
    options = ["-Wl,--version-script", str(versions)] if script else []
    command = ["cc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", *options, "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
