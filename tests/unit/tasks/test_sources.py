"""The data of a task: folders in CLIP_benchmark's layout, and other folders with tars."""

import pytest

from tests.support.shards import write_tar
from univitar_ds.errors import ConfigError
from univitar_ds.tasks import sources
from univitar_ds.tasks.sources import DataOptions


def at(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(folder / name, [("a", {"jpg": b"", "txt": b"text"})])
    return folder


def test_a_folder_with_folders_of_tars_has_their_names_as_splits(tmp_path):
    folder = str(at(tmp_path, "test/0.tar", "train/0.tar"))
    assert sources.test_source(DataOptions(folder, cache=tmp_path)).path == f"{folder}/test"
    with pytest.raises(ConfigError, match=r"--split val: .* it has test, train: give one of them"):
        sources.test_source(DataOptions(folder, split="val", cache=tmp_path))


def test_tars_beside_a_folder_of_tars_are_read_as_they_are(tmp_path):
    folder = str(at(tmp_path, "0.tar", "old/0.tar"))
    assert sources.test_source(DataOptions(folder, cache=tmp_path)).path == folder
