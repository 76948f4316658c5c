"""This package works beside Hugging Face's package `kernels`, which transformers imports if that is installed."""

import json
import os
import shutil
import site
import venv
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.progress import run_watched

pytestmark = pytest.mark.slow

STAND_IN = '''"""A fake: defines every name, and decorators that return their argument."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return (lambda *_: lambda decorated: decorated) if name.startswith("use_") else type(name, (), {})
'''
LOOK = """
import json, kernels
from univitar_ds import kernels as ours
from univitar_ds.config.deepspeed import deepspeed_path
from univitar_ds.config.model import TextConfig
from univitar_ds.kernels import dispatch
from univitar_ds.model.towers import build_text_tower
from transformers.utils.import_utils import is_kernels_available
text = TextConfig(hidden_size=16, layers=1, heads=1, context_length=8)
tower = build_text_tower(text, vocab_size=300, eos_id=2, pad_id=0)
print(json.dumps({
    "theirs": kernels.__file__, "ours": dispatch.__file__, "deepspeed": str(deepspeed_path("zero3_cpu")),
    "transformers sees it": is_kernels_available(), "parameters": sum(weight.numel() for weight in tower.parameters()),
}))
"""


def copied_checkout(folder: Path) -> Path:
    """Copies the files from which the package is built to `folder`, so that a build does not write into the checkout.

    Returns `folder`.
    """
    for name in ("univitar_ds", "kernels", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


class Environment:
    """A new virtual environment with a fake package `kernels` and without univitar_ds.

    Libraries are imported from the environment that runs the tests.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv")  # pip is not installed; `libraries.pth` makes it importable
        self.python = folder / "venv" / "bin" / "python"
        self.packages = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
        (self.packages / "libraries.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
        source = folder / "stand-in"
        (source / "kernels").mkdir(parents=True)
        (source / "kernels" / "__init__.py").write_text(STAND_IN)
        project = '[project]\nname = "kernels"\nversion = "0.18.5"\n[tool.setuptools]\npackages = ["kernels"]\n'
        (source / "pyproject.toml").write_text(project)
        self.pip("install", str(source))

    def pip(self, command: str, *arguments: str) -> None:
        options = {"install": ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet"]}
        self.run("-m", "pip", command, *options.get(command, ["--yes"]), *arguments)

    def run(self, *arguments: str, cwd: Path | None = None) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        done = run_watched([str(self.python), *arguments], cwd=cwd, env=kept)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout


@pytest.mark.parametrize("way", ["wheel", "editable", "checkout"])
def test_both_packages_work_and_uninstalling_ours_keeps_theirs(tmp_path, way):
    environment, checkout = Environment(tmp_path), copied_checkout(tmp_path / "checkout")
    theirs = environment.packages / "kernels" / "__init__.py"
    if way != "checkout":
        environment.pip("install", *(["--editable"] if way == "editable" else []), str(checkout))
    found = json.loads(environment.run("-c", LOOK, cwd=checkout if way == "checkout" else tmp_path))
    home = environment.packages if way == "wheel" else checkout
    assert Path(found["theirs"]) == theirs
    assert found["transformers sees it"]
    assert Path(found["ours"]) == home / "univitar_ds" / "kernels" / "dispatch.py"
    assert Path(found["deepspeed"]) == home / "univitar_ds" / "ds_configs" / "zero3_cpu.json"
    assert found["parameters"] > 0
    if way != "checkout":
        environment.pip("uninstall", "univitar_ds")
        assert not (environment.packages / "univitar_ds").exists()
    assert theirs.read_text() == STAND_IN
    assert environment.run("-c", "import kernels; print(kernels.get_kernel)")


def test_only_tests_and_univitar_ds_are_packages_of_the_checkout():
    """If the current folder has a folder named as an installed package, Python imports the folder if it has an
    `__init__.py`, and the installed package if not."""
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    assert sorted(packages) == ["tests", "univitar_ds"]
