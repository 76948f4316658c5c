"""A broken package is named in an error message, before a run's folder is made."""

import os
import subprocess
import sys

import pytest

from tests.support.finished import run_config, write_run
from univitar_ds.config.load import dump_config
from univitar_ds.model.libraries import working_imports

BROKEN = {
    "its own fault": 'raise RuntimeError("operator torchvision::nms does not exist\\nand more")',
    "raised by torch": 'import torch; torch.library.register_fake("torchvision::nms")(lambda: None)',
    "a missing file": 'raise OSError("libcudart.so.13: cannot open shared object file")',
}


def install(folder, package, version, code):
    """A stand-in for an installed package whose import runs `code`."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(f"from {package} import _inner\n")
    (folder / package / "_inner.py").write_text(code + "\n")
    metadata = folder / f"{package}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def command(site, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "univitar_ds", *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def is_the_sentence(result, package, version):
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"since {package} {version} is broken or does not fit" in line
    assert f"`pip uninstall {package}`, or install" in line
    return line


FIRST, *OTHERS = BROKEN


@pytest.mark.parametrize("fault", [FIRST, *(pytest.param(fault, marks=pytest.mark.slow) for fault in OTHERS)])
def test_a_torchvision_that_does_not_fit_is_named_before_a_folder_is_made(tmp_path, fault):
    install(tmp_path / "site", "torchvision", "0.28.0+cu130", BROKEN[fault])
    dump_config(run_config(output=str(tmp_path / "runs")), tmp_path / "run.yaml")
    result = command(tmp_path / "site", "train", "--config", tmp_path / "run.yaml")
    line = is_the_sentence(result, "torchvision", "0.28.0+cu130")
    assert "torch 2." in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_any_other_package_that_transformers_imports_is_named_too(tmp_path):
    install(tmp_path / "site", "accelerate", "1.9.0", 'raise ImportError("cannot import name gone")')
    dump_config(run_config(output=str(tmp_path / "runs")), tmp_path / "run.yaml")
    is_the_sentence(command(tmp_path / "site", "train", "--config", tmp_path / "run.yaml"), "accelerate", "1.9.0")


@pytest.mark.parametrize("arguments", [("train", "--resume"), pytest.param(("eval",), marks=pytest.mark.slow)])
def test_broken_packages_are_named_for_resumed_and_evaluated_runs_too(tmp_path, arguments):
    install(tmp_path / "site", "torchvision", "0.28.0+cu130", BROKEN["its own fault"])
    write_run(tmp_path / "run", run_config())
    (tmp_path / "run" / "deepspeed.json").write_text('{"zero_optimization": {"stage": 3}}')
    is_the_sentence(command(tmp_path / "site", *arguments, tmp_path / "run"), "torchvision", "0.28.0+cu130")


def test_a_required_package_is_to_be_installed_again(tmp_path):
    install(tmp_path / "site", "tokenizers", "0.1.0", "")
    dump_config(run_config(output=str(tmp_path / "runs")), tmp_path / "run.yaml")
    result = command(tmp_path / "site", "train", "--config", tmp_path / "run.yaml")
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert "tokenizers" in result.stderr
    assert "`pip install --force-reinstall t" in result.stderr


def test_imports_that_work_are_left_alone():
    with working_imports("transformers"):
        import json
    assert json
