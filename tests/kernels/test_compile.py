"""What the compiler makes of the kernels for Ampere and Hopper, no GPU needed; in a process without the interpreter."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks/results/kernel_resources.csv"
SIZE = "0.6b"  # one of the table's: all of them take minutes


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict[str, str]]:
    out = tmp_path_factory.mktemp("compiled") / "rows.csv"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(out.parent / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/kernel_resources.py", "--out", str(out), "--sizes", SIZE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return rows_of(out)


def test_what_the_compiler_says_is_what_the_table_says(compiled):
    committed = [row for row in rows_of(COMMITTED) if row["size"] == SIZE]
    assert {row["arch"] for row in compiled} == {"sm_80", "sm_90"}
    assert compiled == committed, "run `python benchmarks/kernel_resources.py` and look at what changed"


def test_no_forward_kernel_spills_and_all_read_16_bytes_at_a_time():
    for row in rows_of(COMMITTED):
        if row["operation"].startswith("patch_embed"):  # pixels lie at even addresses, no more
            continue
        name = f"{row['operation']} {row['kernel']} {row['size']} {row['dtype']} {row['arch']}"
        if row["kernel"] == "forward":
            assert int(row["stack_bytes"]) == 0, f"{name} spills"
            assert int(row["loads_narrower"]) == 0, f"{name} reads less than 8 bytes at a time"
        if row["size"] != "1b-16":  # half a head of 120 values ends between two 16 bytes
            narrow = int(row["loads_8_bytes"]) + int(row["loads_narrower"])
            limit = 0 if row["operation"] != "rope2d_qk_norm" else 3 * int(row["loads_16_bytes"])
            assert narrow <= limit, f"{name}: {narrow} narrow loads"


def test_patch_embed_spills_nowhere_forward():
    rows = [row for row in rows_of(COMMITTED) if row["operation"].startswith("patch_embed")]
    forward = [row for row in rows if row["kernel"] in ("prepare", "embed")]
    assert len(forward) == 16
    assert not any(int(row["stack_bytes"]) for row in forward)
