"""The house has floors: a file imports its own floor or a lower one, and some libraries have one door."""

import ast
import sys
from pathlib import Path

import pytest

from tests.support.progress import run_watched

ROOT = Path(__file__).parents[2]

FLOORS = {
    "univitar_ds.errors": 0,
    "univitar_ds.geometry": 0,
    "univitar_ds.import_path": 0,
    "univitar_ds.processes": 0,
    "univitar_ds.screen": 0,
    "univitar_ds.randomness": 0,
    "univitar_ds.config": 0,
    "univitar_ds.identity": 0,
    "univitar_ds.owned": 0,
    "univitar_ds.run_lock": 0,
    "kernels": 1,
    "univitar_ds.pictures": 0,
    "univitar_ds.sheet": 1,
    "univitar_ds.preprocessing": 2,
    "univitar_ds.model": 3,
    "univitar_ds.objectives": 3,
    "univitar_ds.data": 3,
    "univitar_ds.training": 4,
    "univitar_ds.evaluation": 5,
    "univitar_ds.convert": 5,
    "univitar_ds.run": 5,
    "univitar_ds.launch": 6,
    "univitar_ds.demo": 6,
    "univitar_ds.demo_folder": 0,
    "univitar_ds.cli": 6,
    "univitar_ds.cli_data": 6,
    "univitar_ds.cli_parts": 6,
}
NEIGHBOURS = {"univitar_ds.model", "univitar_ds.objectives", "univitar_ds.data"}
DOORS = {
    "deepspeed": {"univitar_ds/training/engine.py"},
    "transformers": {"univitar_ds/model/towers.py", "univitar_ds/model/teacher.py"},
    "boto3": {"univitar_ds/data/s3_connection.py"},
    "botocore": {"univitar_ds/data/s3_connection.py"},
}
SOURCES = sorted([*ROOT.glob("univitar_ds/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def imported_modules(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room_of(module: str) -> str | None:
    return next((room for room in FLOORS if module == room or module.startswith(room + ".")), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_its_own_floor_or_a_lower_one(path):
    relative = path.relative_to(ROOT)
    here = room_of(".".join(relative.with_suffix("").parts))
    for module in imported_modules(path):
        there = room_of(module)
        if there and here:
            assert FLOORS[there] <= FLOORS[here], f"{relative} reaches up to {module}"
            assert here == there or not {here, there} <= NEIGHBOURS, f"{relative} reaches across to {module}"
        library = module.split(".")[0]
        if library in DOORS:
            assert str(relative) in DOORS[library], f"{relative} imports {library}; its door is {DOORS[library]}"


def test_every_file_of_the_package_has_a_floor():
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert room_of(module) or path.name in ("__init__.py", "__main__.py"), f"{path} has no floor"


def test_importing_the_package_and_its_command_line_loads_no_heavy_library():
    heavy = ["torch", "deepspeed", "transformers", "triton", "av", "PIL", "boto3"]
    code = f"import sys, univitar_ds, univitar_ds.cli; print([m for m in {heavy} if m in sys.modules])"
    result = run_watched([sys.executable, "-c", code], check=True)
    assert result.stdout.strip() == "[]"


def test_the_public_face_is_reached_without_deepspeed_or_transformers():
    code = (
        "import sys; from univitar_ds import UniViTAR, Preprocessor;"
        "print([m for m in ('deepspeed', 'transformers') if m in sys.modules])"
    )
    result = run_watched([sys.executable, "-c", code], check=True)
    assert result.stdout.strip() == "[]"
