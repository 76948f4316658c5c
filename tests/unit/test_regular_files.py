"""A named pipe in place of a file is an error at once, since a read would wait for a writer."""

import json
import os

import pytest

from tests.support.finished import run_config, write_run
from univitar_ds.errors import CheckpointError
from univitar_ds.evaluation.report import render_run
from univitar_ds.formats.recognise import open_stored
from univitar_ds.formats.weight_files import weight_files
from univitar_ds.regular_files import is_regular, read_bytes, read_utf8


def test_a_pipe_is_refused_and_a_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_bytes, read_utf8):
        with pytest.raises(OSError, match="not a regular file"):
            read(tmp_path / "pipe")
    (tmp_path / "file").write_bytes("ä\r\n".encode())
    assert read_utf8(tmp_path / "file") == "ä\r\n"
    assert read_bytes(tmp_path / "file") == "ä\r\n".encode()


def test_a_folder_is_refused_with_the_message_of_the_system(tmp_path):
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


def test_an_optional_file_is_present_absent_or_an_error(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    assert is_regular(tmp_path / "file")
    assert not any(
        is_regular(path) for path in (tmp_path, tmp_path / "none", tmp_path / "link", tmp_path / "file" / "x")
    )
    with pytest.raises(CheckpointError, match=r"pipe is a pipe or a device; put a file"):
        is_regular(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.json"])
def test_a_pipe_among_the_files_of_a_run_is_named(tmp_path, name):
    write_run(tmp_path / "run", run_config())
    (tmp_path / "run" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "run" / name)
    with pytest.raises(CheckpointError, match=rf"{name} is a pipe"):
        open_stored(tmp_path / "run")


def test_a_pipe_is_not_taken_for_missing_results_or_weights(tmp_path):
    os.mkfifo(tmp_path / "evaluation.json")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"evaluation\.json is a pipe"):
        render_run(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a pipe"):
        weight_files(tmp_path)
