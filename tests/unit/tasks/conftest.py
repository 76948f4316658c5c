"""The run that the tasks evaluate."""

from pathlib import Path

import pytest

from tests.support.finished import run_config, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, without training."""
    folder = tmp_path_factory.mktemp("runs") / "tried"
    write_run(folder, run_config())
    return folder
