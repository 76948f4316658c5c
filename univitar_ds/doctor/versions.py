"""Compares installed versions with the requirements of this package and between nodes, and imports libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable

import torch

from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, SKIPPED, Answers, Found, Row, ranks_named
from univitar_ds.errors import shortened
from univitar_ds.kernels.dispatch import choose
from univitar_ds.training.distributed.process_group import uses_cuda

NAME = "versions"
PROJECT = "univitar_ds"
NEEDED = ("", "train")
"""Extras that training needs; "" is the package without extras. Packages of OTHERS are compared only if installed."""
OTHERS = ("s3", "webdataset", "energon", "fp8", "flash", "flash4", "megatron", "parquet", "wandb", "trackio", "onnx")
IMPORTED = ("deepspeed", "transformers")
"""Packages whose import is tried in a separate process. They import optional packages, which may be broken."""
FLASH = {"flash-attn": "flash_attn", "flash-attn-4": "flash_attn.cute"}
"""Module by distribution. The import is tried too if it is installed."""
_IMPORT_S = 300.0
_ACCELERATOR = "DS_ACCELERATOR"
"""The variable with which DeepSpeed's import fails if it has an unknown value."""


def installed(name: str) -> str | None:
    """Returns the version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def clashes(requirements: Iterable[str], version_of: Callable[[str], str | None] = installed) -> list[Row]:
    """Returns a failed row for each version that does not meet its requirement, and each missing package of NEEDED.

    Args: requirements: as `importlib.metadata.requires` returns them; version_of: returns the version of a package,
        None if it is missing.
    """
    from packaging.requirements import Requirement

    rows: dict[str, Row] = {}
    for text in requirements:
        requirement = Requirement(text)
        used = [
            e for e in (*NEEDED, *OTHERS) if requirement.marker is None or requirement.marker.evaluate({"extra": e})
        ]
        if not used or requirement.name == PROJECT:
            continue
        found, wanted = version_of(requirement.name), f"{requirement.name}{requirement.specifier}"
        if found is None and set(used) & set(NEEDED):
            extra = f"{PROJECT}[{used[0]}]" if used[0] else PROJECT
            row = Row(NAME, FAILED, f"{requirement.name} is not installed", f"pip install '{extra}'")
        elif found is not None and not requirement.specifier.contains(found, prereleases=True):
            row = Row(NAME, FAILED, f"{requirement.name} is {found}, required is {wanted}", f"pip install '{wanted}'")
        else:
            continue
        rows[requirement.name] = row
    return list(rows.values())


def broken_imports(modules: Iterable[str]) -> list[Row]:
    """Imports each module in a separate process. Returns a failed row for each that cannot be imported."""
    rows = []
    for module in modules:
        command = [sys.executable, "-P", "-c", f"import {module}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_IMPORT_S)
        except subprocess.TimeoutExpired:
            rows.append(
                Row(
                    NAME,
                    FAILED,
                    f"`import {module}` takes more than {_IMPORT_S:g} s",
                    "inspect the disk with the environment",
                )
            )
            continue
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            remedy = f"see `{sys.executable} -c 'import {module}'`, and install a build for torch {torch.__version__}"
            if _ACCELERATOR in last:
                remedy = f"unset {_ACCELERATOR}, or set it to cpu to train without GPUs"
            rows.append(Row(NAME, FAILED, f"{module} does not import: {shortened(last, 300)}", remedy))
    return rows


def triton_obstacle(reason: tuple[str, str]) -> list[Row]:
    """Returns a failed row if the fused kernels do not run on this GPU.

    Args: reason: the implementation and the reason for it, as `kernels.dispatch.choose` returns them.
    """
    name, why = reason
    if name == "triton":
        return []
    found, _, remedy = why.partition("; ")
    return [
        Row(NAME, FAILED, f"the fused kernels do not run on this GPU: {found}", remedy or "unset UNIVITAR_DS_KERNELS")
    ]


def _check(context: Context) -> Found:
    requirements = importlib.metadata.requires(PROJECT) if installed(PROJECT) else None
    modules = [*IMPORTED, *(module for name, module in FLASH.items() if installed(name))]
    rows = broken_imports(modules)
    if requirements is None:
        rows.append(Row(NAME, SKIPPED, f"{PROJECT} is not installed as a package, so its requirements are unknown"))
    else:
        rows += clashes(requirements)
    if uses_cuda():
        rows += triton_obstacle(choose("cuda", torch.bfloat16, os.environ.get("UNIVITAR_DS_KERNELS", "auto")))
    names = ("torch", "deepspeed", "transformers", "triton", *FLASH)
    versions = {"python": platform.python_version()} | {name: installed(name) for name in names}
    return Found(rows, {"versions": versions, "cuda": torch.version.cuda})


def _compare(answers: Answers) -> list[Row]:
    """Returns a row with the versions, and a failed row for each package whose version differs between nodes."""
    found = answers.of("versions")
    if not found:
        return []
    first = min(found)
    cuda = answers.values[first]["cuda"]
    named = ", ".join(f"{name} {version}" for name, version in found[first].items() if version)
    rows = [Row(NAME, OK, f"{named}; {f'CUDA {cuda}' if cuda else 'torch without CUDA'}")]
    for name in found[first]:
        places: dict[str, list[int]] = {}
        for rank, versions in found.items():
            places.setdefault(versions.get(name) or "not installed", []).append(rank)
        if len(places) > 1:
            text = "; ".join(f"{version} on {ranks_named(ranks, answers.nodes)}" for version, ranks in places.items())
            rows.append(Row(NAME, FAILED, f"{name} differs: {text}", "install one environment on all nodes"))
    return rows


CHECK = Check(NAME, _check, "the disk with the environment does not answer, or an import hangs", compare=_compare)
