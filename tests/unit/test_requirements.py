"""The base and the extras of pyproject.toml, and requirements.txt, which is the installation of a trainer."""

import re
import tomllib

import pytest

from tests.support.paths import ROOT
from univitar_ds.errors import InstallationError
from univitar_ds.extras import extra

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_requirements_are_the_base_and_what_a_trainer_needs_with_the_same_pins():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    wanted = [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["s3"], *EXTRAS["webdataset"]]
    assert listed == wanted
    names = [re.split("[=<>]", line)[0] for line in wanted]
    assert len(set(names)) == len(names)


def test_every_package_of_the_base_has_one_version():
    assert all("==" in line for line in PROJECT["dependencies"])


def test_the_installation_for_development_has_all_that_a_trainer_needs():
    assert "univitar_ds[train,s3,webdataset]" in EXTRAS["dev"]


def test_an_absent_package_is_named_with_the_command_that_installs_it():
    with (
        pytest.raises(InstallationError, match=r"package no_such_package.*pip install 'univitar_ds\[s3\]'"),
        extra("s3"),
    ):
        import no_such_package.part  # noqa: F401


def test_an_error_inside_a_package_is_not_changed():
    with pytest.raises(ModuleNotFoundError), extra("s3"):
        raise ModuleNotFoundError("ours", name="univitar_ds.gone")
    with pytest.raises(ImportError, match="a fault"), extra("s3"):
        raise ImportError("a fault")
