"""Text files are UTF-8 in every locale: all code that reads or writes text sets the encoding."""

import ast

import pytest

from tests.support.paths import ROOT

SOURCES = sorted(
    path
    for folder in ("univitar_ds", "kernels", "benchmarks", "examples", "slurm")
    for path in ROOT.glob(f"{folder}/**/*.py")
)
MODULES = {"Image", "av", "gzip", "os", "tarfile"}
OTHER_OPENS = MODULES | {"self._cache_dir", "self._shard_cache", "self._storage", "self.logs", "storage"}
"""Modules and objects whose `open` gives no text."""


def faults(source: str) -> list[str]:
    """Calls of a file that would use the locale's encoding, each with its line."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"{call.lineno}: {ast.unparse(call)}" for call in calls if leaves_it_open(call)]


def leaves_it_open(call: ast.Call) -> bool:
    if any(word.arg == "encoding" for word in call.keywords):
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    if name in ("NamedTemporaryFile", "TemporaryFile", "fdopen"):
        return "b" not in mode_of(call, 1 if name == "fdopen" else 0, "r" if name == "fdopen" else "w+b")
    of = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name != "open" or of in OTHER_OPENS or of.endswith(".storage"):
        return False
    return "b" not in mode_of(call, 1 if isinstance(call.func, ast.Name) else 0, "r")


def mode_of(call: ast.Call, place: int, absent: str) -> str:
    mode = next((word.value for word in call.keywords if word.arg == "mode"), None)
    if mode is None and len(call.args) > place:
        mode = call.args[place]
    return absent if mode is None else ast.unparse(mode)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_has_an_encoding(path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("code", "count"),
    [("path.read_text()", 1), ("path.write_text('a')", 1), ("open(path)", 1), ("path.open('a')", 1), ("fdopen(3)", 1),
     ("path.open('ab')", 0), ("open(path, 'rb')", 0), ("open(path, encoding='utf-8')", 0), ("os.open(path, 3)", 0),
     ("path.open(mode='wb')", 0), ("path.read_bytes()", 0), ("NamedTemporaryFile()", 0)],
)  # fmt: skip
def test_a_call_without_one_is_found(code, count):
    assert len(faults(code)) == count
