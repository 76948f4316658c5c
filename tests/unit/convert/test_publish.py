"""Uploads to a fake hub: one commit of verified files, and errors without the token."""

import os
import sys
from pathlib import Path

import pytest

from tests.support.golden import CASES, golden
from tests.support.hub import TOKEN, Hub, hub_server
from tests.support.progress import run_watched
from univitar_ds.convert import publish
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.recognise import open_stored

ENCODER = golden(CASES[0]).folder


@pytest.fixture(scope="module")
def hub():
    with hub_server() as hub:
        yield hub


def command(hub: Hub, folder: Path, *arguments: str, **changes: str):
    environment = {**os.environ, **hub.environment(folder / "home"), **changes}
    words = [sys.executable, "-m", "univitar_ds", "convert", str(ENCODER), str(folder / "out"), *arguments]
    return run_watched(words, env=environment)


def test_a_model_is_uploaded_completely_and_other_files_stay(hub, tmp_path):
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "thesis.pdf": b"mine"}
    hub.files["lab/photos"], hub.private["lab/photos"] = dict(old), False
    done = command(hub, tmp_path, "--to", "release", "--push", "lab/photos")
    assert done.returncode == 0, done.stderr
    assert "verified: " in done.stdout
    assert f"uploaded to {hub.url}/lab/photos" in done.stdout
    assert hub.commits == 1
    assert hub.files["lab/photos"].keys() == {"README.md", "config.json", "model.safetensors", "thesis.pdf"}
    for name in ("config.json", "model.safetensors", "README.md"):
        assert hub.files["lab/photos"][name] == (tmp_path / "out" / name).read_bytes()
    assert open_stored(tmp_path / "out").format == "release"
    assert not hub.private["lab/photos"]
    assert TOKEN not in done.stdout + done.stderr


def test_a_new_repository_is_private_and_a_refusal_is_one_error_message(hub, tmp_path):
    hub.refusal = 403
    try:
        done = command(hub, tmp_path, "--to", "hf", "--push", "lab/new")
    finally:
        hub.refusal = None
    assert hub.private["lab/new"]
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()
    assert said[-1].startswith("error: lab/new cannot be written on the hub")
    assert f"the result is whole in {tmp_path / 'out'}" in said[-1]
    assert not any("Traceback" in line for line in said)
    assert TOKEN not in done.stdout + done.stderr
    assert open_stored(tmp_path / "out").format == "hf"


def test_a_model_that_cannot_be_uploaded_is_an_error_before_the_conversion(hub, tmp_path):
    done = command(hub, tmp_path, "--to", "hf", "--push", "lab/new", HF_TOKEN="")
    assert done.returncode == 2
    assert "cannot be written without a token of the hub" in done.stderr
    assert not (tmp_path / "out").exists()
    for name in ("photos", "lab/photos/x", "../photos", "lab/..", "https://hub/lab/photos"):
        with pytest.raises(CheckpointError, match="is no name on the hub"):
            publish.check_name(name)


def test_no_error_contains_the_token():
    assert publish._reason(ValueError(f"url?token={TOKEN}\nmore"), TOKEN) == "url?token=***"
    assert publish._reason(KeyError(), None) == "KeyError"
