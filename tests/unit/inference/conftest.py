from pathlib import Path

import pytest

from tests.support.finished import run_config, write_run
from tests.unit.inference.folders import write_media


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose encoder takes images of 4 to 64 tokens."""
    folder = tmp_path_factory.mktemp("runs") / "tried"
    stages = run_config().model_dump(mode="json")["stages"]
    stages[0]["image"]["max_tokens"] = 64
    write_run(folder, run_config(stages=stages))
    return folder


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("media") / "files")
