"""Files in the current folder with the names of modules are never imported instead of these."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from univitar_ds import import_path
from univitar_ds.import_path import PACKAGE_PARENT, drop_current_folder, safe_environment

HOSTILE = ("random", "types", "tempfile", "logging", "torch", "numpy", "yaml", "PIL", "tokenizers", "kernels", "av")


@pytest.fixture
def hostile(tmp_path):
    """A folder of modules and packages that write down when they are imported, and fail."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, name in enumerate(HOSTILE):
        note = f"open({str(tmp_path / 'imported')!r}, 'a').write('{name}\\n')"
        code = f"{note}\nraise ImportError('{name} of the user')\n"
        path = folder / f"{name}.py" if number % 2 == 0 else folder / name / "__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (60, 40), (number, 9, 9)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"image {number}")
    return folder


def ended(hostile, command, **environment):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **environment}
    environment.pop("PYTHONSAFEPATH", None)
    if environment.get("PYTHONPATH") is None:
        environment.pop("PYTHONPATH", None)
    result = subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True, check=False)
    marker = hostile.parent / "imported"
    return result, marker.read_text().split() if marker.exists() else []


CONSOLE = [str(Path(sys.executable).with_name("univitar-ds"))]
MODULE = [sys.executable, "-m", "univitar_ds"]


@pytest.mark.parametrize("start", [CONSOLE, MODULE], ids=["console script", "python -m"])
def test_commands_and_their_processes_import_nothing_from_the_current_folder(hostile, start):
    result, imported = ended(hostile, [*start, "data", "probe", "../images/0.png"], PYTHONPATH=None)
    assert (result.returncode, imported) == (0, []), result.stderr[-2000:]


@pytest.mark.parametrize("entries", [":", ":/nowhere", "/nowhere::/elsewhere"])
def test_an_empty_entry_of_PYTHONPATH_is_not_the_current_folder(hostile, entries):
    for name in ("types", "logging", "tempfile"):  # Python itself may import these before any line of ours
        for path in (hostile / f"{name}.py", hostile / name / "__init__.py"):
            path.unlink(missing_ok=True)
    result, imported = ended(hostile, [*MODULE, "data", "pack", "../images", "../packed"], PYTHONPATH=entries)
    assert (result.returncode, imported) == (0, []), result.stderr[-2000:]


def test_the_processes_of_packing_import_nothing_from_the_current_folder(hostile):
    result, imported = ended(hostile, [*CONSOLE, "data", "pack", "../images", "../packed"], PYTHONPATH=None)
    assert (result.returncode, imported) == (0, []), result.stderr[-2000:]


def test_a_checkout_in_the_current_folder_stays_importable(tmp_path):
    (tmp_path / "univitar_ds").symlink_to(Path(PACKAGE_PARENT) / "univitar_ds")
    (tmp_path / "checkout_only.py").write_text("")
    code = (
        "import sys; sys.path.insert(0, ''); from univitar_ds.import_path import drop_current_folder as drop;"
        "drop(); import checkout_only; print(checkout_only.__file__)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return str(tmp_path)


def test_only_entries_for_the_current_folder_are_removed_from_the_path(elsewhere, monkeypatch):
    monkeypatch.setattr(sys, "path", [elsewhere, "/usr/lib/somewhere", elsewhere])
    drop_current_folder()
    assert sys.path == ["/usr/lib/somewhere", elsewhere]  # such as the folder of the standard library
    monkeypatch.setattr(sys, "path", ["", "/usr/lib/somewhere", elsewhere])
    monkeypatch.setenv("PYTHONPATH", elsewhere)  # DeepSpeed's launcher of several machines sets that
    drop_current_folder()
    assert sys.path == ["/usr/lib/somewhere"]


def test_a_removed_current_folder_causes_no_error(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    drop_current_folder()


def test_children_are_safe_and_find_the_package_where_this_process_found_it(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/usr/lib/python3"])
    assert safe_environment({"A": "b"}) == {"A": "b", "PYTHONSAFEPATH": "1"}
    assert safe_environment({"PYTHONPATH": ":/a:"})["PYTHONPATH"] == "/a"
    assert "PYTHONPATH" not in safe_environment({"PYTHONPATH": "::"})
    monkeypatch.setattr(sys, "path", [PACKAGE_PARENT])
    assert safe_environment({"PYTHONPATH": "/a"})["PYTHONPATH"] == os.pathsep.join([PACKAGE_PARENT, "/a"])
    monkeypatch.setattr(sys, "path", ["/x/lib/python3.11/site-packages"])
    monkeypatch.setattr(import_path, "PACKAGE_PARENT", "/x/lib/python3.11/site-packages")
    assert "PYTHONPATH" not in safe_environment({})  # it would come before the standard library
