"""Which implementation runs where, and what a process without a GPU does not load."""

import logging
import subprocess
import sys

import pytest
import torch

from univitar_ds.errors import ConfigError
from univitar_ds.kernels import dispatch, reference


@pytest.fixture
def equipped(monkeypatch, tmp_path):
    """A machine with triton and what it compiles with, whatever this one has."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name if name == "gcc" else None)
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def forgotten():
    dispatch.implementation.cache_clear()
    yield
    dispatch.implementation.cache_clear()


def test_triton_runs_on_cuda_and_the_reference_elsewhere(equipped):
    assert dispatch.choose("cuda", torch.bfloat16)[0] == "triton"
    assert dispatch.choose("cuda", torch.float64)[0] == "reference"
    assert dispatch.choose("cpu", torch.bfloat16)[0] == "reference"
    assert dispatch.implementation("cpu", torch.float32) is reference


def test_the_choice_is_logged_once_with_its_reason(caplog):
    with caplog.at_level(logging.INFO, "univitar_ds.kernels.dispatch"):
        for _ in range(3):
            dispatch.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)
    assert [record.getMessage() for record in caplog.records] == [
        "token-wise operations on cpu in float32: reference (no kernels for cpu)"
    ]


def test_without_triton_the_reference_runs_on_cuda_and_logs_the_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert dispatch.choose("cuda", torch.bfloat16) == ("reference", "triton is not installed; pip install triton")
    with pytest.raises(ConfigError, match="not installed; pip install triton"):
        dispatch.choose("cuda", torch.bfloat16, "triton")


def test_without_a_compiler_for_triton_the_reference_runs_on_cuda_and_logs_the_reason(equipped, monkeypatch):
    monkeypatch.setenv("CC", "icc")
    assert dispatch.choose("cuda", torch.bfloat16) == (
        "reference", "triton needs a C compiler and there is no icc; install gcc, or name one in CC"
    )  # fmt: skip
    monkeypatch.setattr("shutil.which", lambda name: "/opt/icc" if name == "icc" else None)
    assert dispatch.choose("cuda", torch.bfloat16)[0] == "triton"
    monkeypatch.delenv("CC")
    name, reason = dispatch.choose("cuda", torch.bfloat16)
    assert (name, "there is no gcc or clang" in reason) == ("reference", True)
    monkeypatch.setattr("shutil.which", lambda name: name)
    (equipped / "Python.h").unlink()
    name, reason = dispatch.choose("cuda", torch.bfloat16)
    assert (name, f"there is no {equipped}/Python.h" in reason) == ("reference", True)


def test_the_environment_can_name_one(monkeypatch):
    assert dispatch.choose("cuda", torch.bfloat16, "reference") == ("reference", f"{dispatch.VARIABLE} asks for it")
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ConfigError, match="'cuda'; choose one of auto, reference"):
        dispatch.implementation("cpu", torch.float32)


def test_every_implementation_has_every_operation():
    code = "import importlib; from univitar_ds.kernels.dispatch import *; import univitar_ds.kernels.dispatch as d;" + (
        "print([n for n in d.IMPLEMENTATIONS.values() for o in d.OPERATIONS"
        " if not callable(getattr(importlib.import_module(n), o, None))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_encoder_runs_on_the_cpu_without_triton():
    code = (
        "import sys, torch; from tests.unit.model.made import GRIDS, drawn_patches, small_encoder;"
        "small_encoder()(drawn_patches(GRIDS), GRIDS).sum().backward(); print('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
