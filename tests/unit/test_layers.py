"""Modules import only from their own layer or a lower one, and from other packages only their public modules."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.progress import run_watched

LAYERS = [
    {
        "divisors", "errors", "expressions", "extras", "geometry", "import_path", "locked_folder", "processes",
        "randomness", "regular_files", "screen", "startup", "strict_yaml",
    },
    {"atomic_write", "classes", "identity", "image_ops", "kernels", "owned", "plugins", "tokenization"},
    {"config", "run_lock", "data.storage", "data.media"},
    {
        "preprocessing", "formats", "model", "objectives", "data.shards", "data.decoding", "training.distributed",
        "training.watch",
    },
    {
        "model.teacher", "data.sampler", "data.importing", "data.writing", "training.engine", "training.optimizers",
    },
    {"data", "training.checkpoint"},
    {"data.tools", "viz", "training.step"},
    {"training.logging"},
    {"training"},
    {"simulation"},
    {"planning", "drafting"},
    {"evaluation", "convert", "run", "inference", "peers", "python_api"},
    {"doctor", "launch", "tasks", "reporting"},
    {"demo"},
    {"cli"},
]  # fmt: skip
"""Names below `univitar_ds`; a module belongs to the longest that it begins with."""
LAYER_OF = {f"univitar_ds.{name}": layer for layer, names in enumerate(LAYERS) for name in names}
NEIGHBOURS = {"model", "objectives", "data"}
"""Packages that do not import each other."""
PACKAGES_WITHOUT_INIT = {"univitar_ds.kernels": {"dispatch", "gpu", "reference"}}
"""Their doors: a folder of the top level must give way to an installed package of its name."""
LIBRARIES = {
    "deepspeed": {
        "univitar_ds.training.engine.engine",
        "univitar_ds.training.engine.zero3",
        "univitar_ds.simulation.patches",
    },
    "transformers": {
        "univitar_ds.model.packed",
        "univitar_ds.model.teacher.teacher",
        "univitar_ds.model.towers",
        "univitar_ds.peers.model",
        "univitar_ds.peers.processing",
    },
    "boto3": {"univitar_ds.data.storage.s3_client"},
    "botocore": {"univitar_ds.data.storage.s3_client"},
    "webdataset": {"univitar_ds.data.writing.writer"},
    "megatron": {"univitar_ds.formats.distributed.megatron", "univitar_ds.model.blocks.tensor_parallel"},
    "huggingface_hub": {
        "univitar_ds.formats.fetched",
        "univitar_ds.convert.publish",
        "univitar_ds.model.teacher.teacher",
    },
    "jinja2": {"univitar_ds.reporting.page"},
    "wandb": {"univitar_ds.training.logging.trackers"},
    "trackio": {"univitar_ds.training.logging.trackers"},
    "pyarrow": {
        "univitar_ds.inference.writing.parts",
        "univitar_ds.data.importing.parquet.media",
        "univitar_ds.data.importing.parquet.table",
    },
    "scipy": {"univitar_ds.evaluation.scores"},
    "sklearn": {"univitar_ds.tasks.dense.miou", "univitar_ds.tasks.knn", "univitar_ds.tasks.linear"},
    "torchao": {"univitar_ds.training.fp8"},
    "onnxscript": {"univitar_ds.convert.program"},
}
"""The only modules that import them."""
MOST_FILES, MOST_LINES = 15, 2000


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


COPIED = ROOT / "univitar_ds" / "formats" / "remote_code"
"""Files that are copied into folders for transformers and run there: they are no modules of the package."""
SOURCES = {  # `glob` follows no links
    name_of(path): path for path in sorted(ROOT.glob("univitar_ds/**/*.py")) if path.parent != COPIED
}
SOURCES |= {f"univitar_ds.{name_of(path)}": path for path in sorted(ROOT.glob("kernels/*.py"))}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Every module that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else node.module or "" for name in names}
    return frozenset(found)


def layer_of(module: str) -> str | None:
    names = [name for name in LAYER_OF if module == name or module.startswith(name + ".")]
    return max(names, key=len, default=None)


def package_of(module: str) -> str:
    return module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]


@cache
def doors_of(package: str) -> frozenset[str]:
    """The modules that its `__init__.py` names in `__all__`."""
    if package in PACKAGES_WITHOUT_INIT:
        return frozenset(PACKAGES_WITHOUT_INIT[package])
    for node in ast.parse(SOURCES[package].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that reach themselves: what is left when those without imports are taken away again and again."""
    left = {module: set(there) for module, there in graph.items()}
    while free := {module for module, there in left.items() if not there}:
        left = {module: there - free for module, there in left.items() if module not in free}
    return [[module, *sorted(there)] for module, there in left.items()]


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_its_own_layer_or_a_lower_one(module):
    here = layer_of(module)
    for imported in imports_of(module):
        there = layer_of(imported)
        if there and here:
            assert LAYER_OF[there] <= LAYER_OF[here], f"{module} reaches up to {imported}"
            roots = {here.split(".")[1], there.split(".")[1]}
            assert len(roots) == 1 or not roots <= NEIGHBOURS, f"{module} reaches across to {imported}"


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_public_modules_of_another_package(module):
    here = package_of(module)
    for imported in imports_of(module) & SOURCES.keys():
        package = package_of(imported)
        if package not in (here, imported, "univitar_ds"):
            doors = doors_of(package)
            assert imported.rpartition(".")[2] in doors, f"{module} imports {imported}; {package} names {sorted(doors)}"


def test_every_public_module_exists_in_its_package():
    packages = {package_of(module) for module in SOURCES} - {"univitar_ds"}
    for package in packages:
        for door in doors_of(package):
            assert f"{package}.{door}" in SOURCES, f"{package} has no {door}"
        if package not in PACKAGES_WITHOUT_INIT:
            assert ast.get_docstring(ast.parse(SOURCES[package].read_text(encoding="utf-8"))), package


def test_modules_have_no_import_cycles():
    """Nor through imports inside functions."""
    graph = {module: set(imports_of(module) & SOURCES.keys()) - {module} for module in SOURCES}
    graph["univitar_ds"] = set()  # it imports its public names when they are first asked for
    assert circles(graph) == []


def test_an_import_cycle_is_found():
    assert circles({"a": {"b"}, "b": set(), "c": {"d", "b"}, "d": {"c"}}) == [["c", "d"], ["d", "c"]]


@pytest.mark.parametrize("module", SOURCES)
def test_some_libraries_are_imported_in_one_place(module):
    for library in {imported.split(".")[0] for imported in imports_of(module)} & LIBRARIES.keys():
        assert module in LIBRARIES[library], f"{module} imports {library}; its door is {LIBRARIES[library]}"


def test_code_that_is_copied_imports_nothing_of_the_package():
    found = set()
    for path in sorted(COPIED.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level < 2, path
                found.add((node.module or "").split(".")[0] if node.level == 0 else f".{node.module}")
    beside = {f".{path.stem}" for path in COPIED.glob("*.py")}
    assert found - beside - sys.stdlib_module_names == {"PIL", "numpy", "torch", "transformers"}


def test_every_module_has_a_layer():
    for module in SOURCES:
        assert layer_of(module) or module in ("univitar_ds", "univitar_ds.__main__"), f"{module} has no layer"


def test_no_package_has_too_many_files_or_lines():
    packages = {package_of(module) for module in SOURCES} - {"univitar_ds.kernels"}
    for package in packages - {"univitar_ds"}:
        files = [path for module, path in SOURCES.items() if package_of(module) == package]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        assert len(files) <= MOST_FILES + 1, f"{package} has {len(files)} files beside its __init__.py"
        assert lines <= MOST_LINES, f"{package} has {lines} lines"


def test_importing_the_package_and_its_command_line_loads_no_heavy_library():
    heavy = ["torch", "deepspeed", "transformers", "triton", "av", "PIL", "boto3", "webdataset"]
    code = f"import sys, univitar_ds, univitar_ds.cli.main; print([m for m in {heavy} if m in sys.modules])"
    result = run_watched([sys.executable, "-c", code], check=True)
    assert result.stdout.strip() == "[]"


def test_the_public_names_need_neither_deepspeed_nor_transformers():
    code = (
        "import sys; from univitar_ds import UniViTAR, Preprocessor;"
        "print([m for m in ('deepspeed', 'transformers') if m in sys.modules])"
    )
    result = run_watched([sys.executable, "-c", code], check=True)
    assert result.stdout.strip() == "[]"
