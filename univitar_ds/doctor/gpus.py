"""Checks GPUs by the output of `nvidia-smi -q -x`: errors, throttling, other processes and the driver.

The fields are taken from NVIDIA's documentation (nvidia-smi(1), nvsmi_device_v12.dtd) and its earlier versions. This
check has not been run on a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import torch

from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, SKIPPED, Found, Row, listed
from univitar_ds.errors import UserError, shortened

NAME = "GPUs"
COMMAND = ("nvidia-smi", "-q", "-x")
TIMEOUT_S = 60.0
MOST_BYTES = 64 << 20
USED_BY_OTHERS_MIB = 1024
"""If more than this is in use on a GPU before the ranks of this job allocate memory, it counts as used by other
processes. The value is chosen, not measured: the driver itself takes a few hundred MiB."""
SLOWED = {
    "hw_thermal_slowdown": ("is slowed down by its temperature", "inspect the cooling of this node"),
    "sw_thermal_slowdown": ("is slowed down by its temperature", "inspect the cooling of this node"),
    "hw_power_brake_slowdown": ("is slowed down by the power supply", "inspect the power supply of this node"),
    "hw_slowdown": ("is slowed down by the hardware", "see `nvidia-smi -q -d PERFORMANCE`"),
}
"""Maps NVIDIA's name of a "clock event reason" ("throttle reason" in earlier versions) to (text of the row, remedy).
sw_power_cap is not an error: it is usual under load."""
_LOST = re.compile(r"\b(ERR!|GPU is lost|requires reset|Unknown Error)", re.IGNORECASE)
_RESET = "drain this node and reset the GPU (nvidia-smi -r, as root), or reboot the node"


@dataclass(frozen=True)
class Gpus:
    """Output of nvidia-smi: version of the driver, the CUDA version that it supports, an XML element for each GPU."""

    driver: str
    cuda: str
    gpus: list[Element]


def ask() -> bytes | None:
    """Runs nvidia-smi and returns its output; None if it is not installed.

    Raises: UserError if it fails or does not answer within TIMEOUT_S.
    """
    if shutil.which(COMMAND[0]) is None:
        return None
    try:
        done = subprocess.run(COMMAND, capture_output=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"nvidia-smi does not answer within {TIMEOUT_S:g} s; {_RESET}") from error
    if done.returncode:
        text = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines() or ["no message"]
        raise UserError(f"nvidia-smi fails with exit code {done.returncode}: {shortened(text[-1], 200)}; {_RESET}")
    return done.stdout


def parse(text: bytes) -> Gpus:
    """Parses the XML of nvidia-smi. Raises: UserError if `text` is not such XML."""
    remedy = "see `nvidia-smi -q -x` on this node"
    if len(text) > MOST_BYTES or b"<!ENTITY" in text:
        raise UserError(f"nvidia-smi prints {len(text)} bytes (limit {MOST_BYTES}) or defines XML entities; {remedy}")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"nvidia-smi prints no XML ({error}); {remedy}") from error
    if root.tag != "nvidia_smi_log":
        raise UserError(f"nvidia-smi prints <{shortened(root.tag)}> and not <nvidia_smi_log>; {remedy}")
    return Gpus(_text(root, "driver_version"), _text(root, "cuda_version"), root.findall("gpu"))


def visible(gpus: list[Element], environment: Mapping[str, str]) -> list[Element]:
    """Returns those of `gpus` that CUDA_VISIBLE_DEVICES names by index or UUID prefix, in its order.

    Returns all of `gpus` if the variable is not set or names MIG instances.
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None or "MIG" in named:
        return gpus
    chosen = []
    for word in filter(None, (word.strip() for word in named.split(","))):
        chosen += [
            gpu
            for index, gpu in enumerate(gpus)
            if (word.isdecimal() and index == int(word))
            or (word.startswith("GPU-") and _text(gpu, "uuid").startswith(word))
        ]
    return chosen


def rows_of(found: Gpus, torch_cuda: str | None) -> list[Row]:
    """Returns failed rows for the errors of the GPUs and of their driver, or a single OK row if there are none.

    Must be called before any rank of this job allocates GPU memory, which would count as used by other processes.
    Args: torch_cuda: CUDA version that torch was built for, None for a build without CUDA.
    """
    rows = [row for gpu in found.gpus for row in _faults(gpu)]
    rows += _driver_fault(found, torch_cuda)
    names = sorted({_text(gpu, "product_name") for gpu in found.gpus})
    plural = "" if len(found.gpus) == 1 else "s"
    text = f"{len(found.gpus)} GPU{plural} ({', '.join(names)}), driver {found.driver} for CUDA {found.cuda}"
    if not rows:
        rows = [Row(NAME, OK, f"{text}; no uncorrectable memory errors, no throttling, no other processes")]
    return rows


def _faults(gpu: Element) -> Iterator[Row]:
    name = f"{_text(gpu, 'product_name')} at {gpu.get('id', '?')}"
    lost = next((element.text for element in gpu.iter() if element.text and _LOST.search(element.text)), None)
    if lost is not None:
        yield Row(NAME, FAILED, f"{name} does not answer: {shortened(lost.strip())}", _RESET)
        return
    errors = _uncorrectable(gpu)
    if errors:
        yield Row(NAME, FAILED, f"{name} has {errors} uncorrectable memory errors since the driver started", _RESET)
    if _yes(gpu, "remapped_rows/remapped_row_failure") or _yes(gpu, "ecc_errors/aggregate/sram_threshold_exceeded"):
        text = f"{name} has faulty memory that it can no longer repair"
        yield Row(NAME, FAILED, text, "drain this node, replace the GPU")
    if _yes(gpu, "remapped_rows/remapped_row_pending") or _yes(gpu, "retired_pages/pending_retirement"):
        yield Row(NAME, FAILED, f"{name} replaces faulty memory at its next reset", _RESET)
    state = _text(gpu, "fabric/state")
    if state not in ("", "N/A", "Completed"):
        remedy = "start nvidia-fabricmanager on this node, in the same version as the driver"
        yield Row(NAME, FAILED, f"{name} is not part of the NVSwitch fabric: {shortened(state)}", remedy)
    yield from _slowed(gpu, name)
    yield from _others(gpu, name)


def _slowed(gpu: Element, name: str) -> Iterator[Row]:
    for word in ("event", "throttle"):
        for reason, (what, remedy) in SLOWED.items():
            if _text(gpu, f"clocks_{word}_reasons/clocks_{word}_reason_{reason}") == "Active":
                at = _text(gpu, "temperature/gpu_temp") or "an unknown temperature"
                yield Row(NAME, FAILED, f"{name} {what} at {at} ({reason})", remedy)
                return


def _others(gpu: Element, name: str) -> Iterator[Row]:
    used = _mib(_text(gpu, "fb_memory_usage/used"))
    pids = [_text(one, "pid") for one in gpu.findall("processes/process_info")]
    if used > USED_BY_OTHERS_MIB:
        who = f"process {listed(pids)}" if any(pids) else "processes that are not visible here"  # as in a container
        remedy = "end every process that uses it, or leave this GPU out"
        yield Row(NAME, FAILED, f"{used:,} MiB of {name} are in use by {who}", remedy)


def _driver_fault(found: Gpus, torch_cuda: str | None) -> Iterator[Row]:
    if not found.gpus:
        return
    if torch_cuda is None:
        remedy = "install a CUDA build of torch, or set DS_ACCELERATOR=cpu"
        yield Row(NAME, FAILED, f"torch {torch.__version__} was built without CUDA, and this node has GPUs", remedy)
    elif (major := re.match(r"\d+", found.cuda)) and int(major[0]) < int(torch_cuda.partition(".")[0]):
        remedy = f"update the driver, or install torch for CUDA {major[0]}"
        text = f"driver {found.driver} supports CUDA {found.cuda}, torch was built for {torch_cuda}"
        yield Row(NAME, FAILED, text, remedy)


def _uncorrectable(gpu: Element) -> int:
    volatile = gpu.find("ecc_errors/volatile")
    if volatile is None:
        return 0
    counts = [element.text for element in volatile.iter() if "uncorrectable" in element.tag and len(element) == 0]
    counts.append(_text(volatile, "double_bit/total"))  # the counter of GPUs up to Volta
    return sum(int(count) for count in counts if count and count.strip().isdecimal())


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _yes(element: Element, path: str) -> bool:
    return _text(element, path).lower() == "yes"


def _mib(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12}) MiB", text)
    return int(match[1]) if match else 0


def _check(context: Context) -> Found:
    printed = ask()
    if printed is None:
        return Found([Row(NAME, SKIPPED, "no nvidia-smi: no NVIDIA GPU, or the programs of its driver are missing")])
    found = parse(printed)
    seen = Gpus(found.driver, found.cuda, visible(found.gpus, os.environ))
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return Found([Row(NAME, SKIPPED, "DS_ACCELERATOR is cpu")])
    if not seen.gpus:
        return Found([Row(NAME, SKIPPED, f"none of {len(found.gpus)} GPUs is visible to this rank")])
    return Found(rows_of(seen, torch.version.cuda))


CHECK = Check(NAME, _check, _RESET, everywhere=True)
