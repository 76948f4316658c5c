"""Every name that a file imports from the project, or uses of one of its modules, is defined there.

Benchmarks, examples and tests of GPUs or Slurm run rarely, so that a renamed function would be noticed late.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDERS = ("univitar_ds", "benchmarks", "examples", "tests")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
LAZY = {
    "univitar_ds": {"UniViTARModel", "RunConfig", "train", "resume"},
    "univitar_ds.model.blocks.attention": {"flash_attn_varlen_func"},
}
"""Names that modules define when they are first used, and the name that a test puts into a module."""


def place(module: str) -> Path:
    return ROOT.joinpath(*module.split("."))


def is_module(module: str) -> bool:
    return place(module).with_suffix(".py").is_file() or place(module).is_dir()


@cache
def defined(module: str) -> frozenset[str]:
    """Names at the top level of a module, and the modules of a package."""
    folder = place(module)
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    names = {child.stem for child in folder.iterdir()} if folder.is_dir() else set()
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return frozenset(names.union(LAZY.get(module, ()), *(bound(node) for node in tree.body)))


def bound(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    names: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            names.add(child.id)
        elif isinstance(child, ast.alias):
            names.add((child.asname or child.name).split(".")[0])
        elif isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            names.add(child.name)
    return names


def used(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Pairs of a module of the project and a name that is expected in it."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOLDERS:
            for alias in node.names:
                yield str(node.module), alias.name
                if is_module(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_name_of_the_project_that_a_file_uses_is_defined(folder):
    unknown = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path in FILES
        if path.relative_to(ROOT).parts[0] == folder
        for module, name in used(ast.parse(path.read_text(encoding="utf-8")))
        if not name.startswith("__") and not (is_module(module) and name in defined(module))
    ]
    assert unknown == []
