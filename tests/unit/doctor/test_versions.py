"""Installed versions against requirements, and libraries that do not import."""

import tomllib

import pytest

from tests.support.paths import ROOT
from univitar_ds.doctor import versions
from univitar_ds.doctor.findings import FAILED, OK, Answers
from univitar_ds.doctor.versions import broken_imports, clashes, triton_obstacle

REQUIREMENTS = [
    "torch==2.13.0",
    'deepspeed==0.19.8; extra == "train"',
    'boto3==1.44.5; extra == "s3"',
    'flash-attn-4>=4.0.0b36; extra == "flash4"',
    'pytest==1.0; extra == "dev"',
    'univitar_ds[s3,train]; extra == "dev"',
]


def found(**installed: str) -> list[tuple[str, str]]:
    rows = clashes(REQUIREMENTS, lambda name: installed.get(name.replace("-", "_")))
    assert all(row.state == FAILED for row in rows)
    return [(row.found, row.remedy) for row in rows]


GOOD = {"torch": "2.13.0+cu128", "deepspeed": "0.19.8"}


def test_the_required_versions_fit_with_any_build():
    assert found(**GOOD) == []
    assert found(**GOOD, boto3="1.44.5", flash_attn_4="4.0.0b40", pytest="9.0") == []


def test_another_version_fails_with_the_command_that_installs_the_right_one():
    assert found(**{**GOOD, "torch": "2.12.1"}) == [
        ("torch is 2.12.1, required is torch==2.13.0", "pip install 'torch==2.13.0'")
    ]
    ((text, _),) = found(**GOOD, flash_attn_4="4.0.0b7")
    assert text == "flash-attn-4 is 4.0.0b7, required is flash-attn-4>=4.0.0b36"


def test_packages_that_training_needs_must_be_installed_and_others_need_not():
    assert found(torch="2.13.0") == [("deepspeed is not installed", "pip install 'univitar_ds[train]'")]
    assert found(deepspeed="0.19.8") == [("torch is not installed", "pip install 'univitar_ds'")]


def test_a_library_that_does_not_import_fails_with_its_last_line(tmp_path, monkeypatch):
    (tmp_path / "flash_of_another_torch.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert broken_imports(["json"]) == []
    (row,) = broken_imports(["flash_of_another_torch"])
    assert row.state == FAILED
    assert "flash_of_another_torch does not import: ImportError: undefined symbol: _ZN3c104cuda" in row.found
    assert "a build for torch" in row.remedy
    (tmp_path / "flash_of_another_torch.py").write_text("raise ValueError('DS_ACCELERATOR must be one of cuda, cpu')")
    (row,) = broken_imports(["flash_of_another_torch"])
    assert row.remedy == "unset DS_ACCELERATOR, or set it to cpu to train without GPUs"


def test_a_gpu_without_the_fused_kernels_fails_with_what_is_missing():
    assert triton_obstacle(("triton", "")) == []
    (row,) = triton_obstacle(("reference", "triton needs a C compiler and there is no gcc or clang; install gcc"))
    assert "do not run on this GPU: triton needs a C compiler" in row.found
    assert row.remedy == "install gcc"


@pytest.mark.parametrize(("second", "states"), [("2.13.0", [OK]), ("2.12.0", [OK, FAILED])])
def test_nodes_have_the_same_versions(second, states):
    values = {r: {"versions": {"torch": v}, "cuda": None} for r, v in ((0, "2.13.0"), (2, second))}
    rows = versions.CHECK.compare(Answers(values, ["a", "a", "b", "b"]))
    assert [row.state for row in rows] == states
    assert "torch 2.13.0; torch without CUDA" in rows[0].found
    if len(rows) == 2:
        assert rows[1].found == "torch differs: 2.13.0 on rank 0 on a; 2.12.0 on rank 2 on b"


def test_the_packages_of_every_extra_are_compared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    without_versions = {"bench", "dev"}
    assert {*versions.NEEDED, *versions.OTHERS} == {"", *project["optional-dependencies"]} - without_versions


def test_this_environment_fits_its_requirements():
    import importlib.metadata

    assert clashes(importlib.metadata.requires("univitar_ds")) == []
