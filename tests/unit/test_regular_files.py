"""A named pipe in the place of a file is an error at once: a read would wait for a writer."""

import json
import os

import pytest

from univitar_ds.errors import CheckpointError
from univitar_ds.formats.recognise import open_stored
from univitar_ds.regular_files import read_bytes, read_utf8


def test_a_pipe_is_refused_and_a_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_bytes, read_utf8):
        with pytest.raises(OSError, match="not a regular file"):
            read(tmp_path / "pipe")
    (tmp_path / "file").write_bytes("ä\r\n".encode())
    assert read_utf8(tmp_path / "file") == "ä\r\n"
    assert read_bytes(tmp_path / "file") == "ä\r\n".encode()


def test_a_folder_is_refused_in_the_words_of_the_system(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "univitar.json", "model.json", "manifest.json", "latest", ".metadata", "metadata.json"]
)
def test_a_model_whose_files_are_pipes_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        open_stored(tmp_path)


def test_weights_that_are_a_pipe_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "univitar", "hidden_size": 8, "num_hidden_layers": 1})
    )
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        open_stored(tmp_path)
