"""What the compiler makes of the kernels for Ampere and Hopper, no GPU needed; in a process without the interpreter."""

import csv
import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.progress import run_watched

COMMITTED = ROOT / "benchmarks/results/kernel_resources.csv"
SIZE = "0.6b"  # one of the table's: all of them take minutes
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""That one program may have (CUDA programming guide, compute capabilities)."""


PAIRS = ("sigmoid_pairs", "softmax_norms", "softmax_pairs")
"""The losses of pairs."""


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def loops_of(ptx: str) -> list[str]:
    """What lies between a label and a branch back to it."""
    lines = ptx.splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(\$L\w+):", line))}
    branches = [(re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line), end) for end, line in enumerate(lines)]
    spans = [(labels[match[1]], end) for match, end in branches if match]
    return ["\n".join(lines[start:end]) for start, end in spans if start < end]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the table of one size lies, and the PTX of all of its kernels."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/gpu/kernel_resources.py", "--sizes", SIZE]
    command += ["--out", str(folder / "rows.csv"), "--ptx", str(folder)]
    done = run_watched(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_registers_of_the_compiler_are_those_of_the_table(folder):
    compiled = rows_of(folder / "rows.csv")
    committed = [row for row in rows_of(COMMITTED) if row["size"] == SIZE]
    assert {row["arch"] for row in compiled} == {"sm_80", "sm_90"}
    assert compiled == committed, "run `python benchmarks/gpu/kernel_resources.py` and look at what changed"


@pytest.mark.slow
def test_no_product_of_a_loop_has_its_left_side_in_registers_while_the_next_step_writes_them(folder):
    """Triton 3.7 takes the registers of an asynchronous product for free before a wait says that it has read them."""
    products = 0
    for path in folder.glob("*-sm_90.ptx"):
        for loop in loops_of(path.read_text(encoding="utf-8")):
            multiplied = re.findall(r"wgmma\.mma_async[^;]*;", loop)
            products += len(multiplied)
            from_registers = any(re.search(r"\}, \{%r", product) for product in multiplied)
            pending = [int(count) for count in re.findall(r"wgmma\.wait_group\S* (\d+);", loop)]
            assert not (from_registers and any(pending)), f"{path.name}: {pending} groups of products are pending"
    assert products >= 4 * 4, "the products of two kernels, for stills and videos, stand in loops"


@pytest.mark.slow
def test_a_backward_waits_for_the_rows_of_this_round_alone(folder):
    """A wait for 0 groups would be one for all reads, those of the next round too."""
    found = list(folder.glob("*-backward-*.ptx"))
    assert len(found) == 4 * len(SHARED_BYTES)
    for path in found:
        (loop,) = loops_of(path.read_text(encoding="utf-8"))
        pending = [int(count) for count in re.findall(r"cp\.async\.wait_group\s+(\d+);", loop)]
        assert pending, f"{path.name}: no reads ahead"
        assert all(pending), f"{path.name}: it waits for what it has only just asked for"


def test_every_program_fits_the_shared_memory_of_its_gpu_and_no_backward_over_rows_spills():
    for row in rows_of(COMMITTED):
        name = f"{row['operation']} {row['kernel']} {row['size']} {row['dtype']} {row['arch']}"
        assert int(row["shared_bytes"]) <= SHARED_BYTES[row["arch"]], name
        if row["kernel"] == "backward":
            assert int(row["stack_bytes"]) == 0, f"{name} spills"


def test_no_forward_kernel_spills_and_all_read_16_bytes_at_a_time():
    for row in rows_of(COMMITTED):
        if row["operation"].startswith(("patch_embed", *PAIRS)):  # pixels lie at even addresses, no more
            continue
        name = f"{row['operation']} {row['kernel']} {row['size']} {row['dtype']} {row['arch']}"
        if row["kernel"] == "forward":
            assert int(row["stack_bytes"]) == 0, f"{name} spills"
            assert int(row["loads_narrower"]) == 0, f"{name} reads less than 8 bytes at a time"
        if row["size"] != "1b-16":  # half a head of 120 values ends between two 16 bytes
            narrow = int(row["loads_8_bytes"]) + int(row["loads_narrower"])
            limit = 0 if row["operation"] != "rope2d_qk_norm" else 3 * int(row["loads_16_bytes"])
            assert narrow <= limit, f"{name}: {narrow} narrow loads"


def test_the_losses_of_pairs_spill_nowhere_and_read_all_but_the_numbers_of_an_image_16_bytes_at_a_time():
    rows = [row for row in rows_of(COMMITTED) if row["operation"].startswith(PAIRS)]
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        assert int(row["stack_bytes"]) == 0, row
        assert int(row["loads_16_bytes"]) >= 2, row
        assert int(row["loads_8_bytes"]) <= 1, row  # the caption id of the image
        assert int(row["loads_narrower"]) <= 3, row  # its normaliser, count, sum or weight


def test_patch_embed_spills_nowhere_forward():
    rows = [row for row in rows_of(COMMITTED) if row["operation"].startswith("patch_embed")]
    forward = [row for row in rows if row["kernel"] in ("prepare", "embed")]
    assert len(forward) == 16
    assert not any(int(row["stack_bytes"]) for row in forward)
