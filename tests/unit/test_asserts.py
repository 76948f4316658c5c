"""`python -O` removes asserts, so none may have an effect."""

import ast
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SOURCES = sorted(
    path
    for folder in ("univitar_ds", "kernels", "benchmarks", "examples", "slurm")
    for path in ROOT.glob(f"{folder}/**/*.py")
)
PURE_FUNCTIONS = {"all", "any", "bool", "int", "isinstance", "issubclass", "len", "max", "min", "set", "sorted", "sum"}
PURE_METHODS = {"all", "any", "is_contiguous", "is_dir", "is_file", "items", "keys", "numel", "size", "values"}
EFFECTS = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)


def faults(source: str) -> list[str]:
    """What of a file's code `python -O` would leave out although it may have an effect, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id == "__debug__":
            found.append(f"{node.lineno}: __debug__")
        if not isinstance(node, ast.Assert):
            continue
        for part in ast.walk(node.test):
            if isinstance(part, EFFECTS) or (isinstance(part, ast.Call) and not pure(part.func)):
                found.append(f"{part.lineno}: {ast.unparse(part)}")
    return found


def pure(function: ast.expr) -> bool:
    if isinstance(function, ast.Attribute):
        return function.attr in PURE_METHODS
    return isinstance(function, ast.Name) and function.id in PURE_FUNCTIONS


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_has_an_effect(path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "code",
    ["assert channel.recv() == 1", "assert (n := 1)", "assert rows.pop()", "assert all(next(a) for _ in b)",
     "async def f():\n    assert await g()", "assert lock.acquire(), 'x'", "if __debug__: f()", "assert f(x)"],
)  # fmt: skip
def test_an_effect_is_found(code):
    assert faults(code)


def test_a_decoding_process_answers_under_python_O(tmp_path):
    code = """
import sys
from univitar_ds.data.decoding.supervisor import WorkerSupervisor, RestartBudget
from univitar_ds.data.decoding.forkserver import ForkServer
from univitar_ds.data.decoding.decode_job import DecodeItem, DecodeJob
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.decoding.shared_slots import SharedSlots
from univitar_ds.data.media.frame_sampling import UNIFORM
from univitar_ds.data.storage.base import LOCAL
from univitar_ds.data.media.resize import fit_image
from PIL import Image
import numpy as np
image = Image.fromarray(np.arange(28 * 42 * 3, dtype=np.uint8).reshape(28, 42, 3))
image.save(sys.argv[1], "PNG")
slots = SharedSlots.create(1, 28 * 42 * 3)
server = ForkServer(slots)
size = len(open(sys.argv[1], "rb").read())
item = DecodeItem(sys.argv[1], 0, size, (1, 2, 3), 1)
failures = WorkerSupervisor(0, server, slots, LOCAL, RestartBudget(0)).decode_pack(
    0, DecodeJob("image", UNIFORM, DecodeLimits(10**6, 30.0, 60.0), [item])
)
print(sys.flags.optimize, failures, bytes(slots.view(0)[: 28 * 42 * 3]) == np.asarray(image).tobytes())
server.close()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "image")]
    environment = {**os.environ, "PYTHONOPTIMIZE": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.stdout.split("\n")[0] == "1 [] True", ended.stderr[-2000:]
