"""Models on S3 and on the hub, in every format, whose files may be in folders."""

import os
import sys
from pathlib import Path

import pytest

from tests.support.finished import run_config, write_run
from tests.support.golden import CASES, golden
from tests.support.hub import hub_server
from tests.support.progress import run_watched
from tests.support.s3 import BUCKET, S3Server, s3_server
from tests.unit.formats.made import assert_equal, assert_same, tiny_stored
from univitar_ds.convert.conversion import WRITTEN, convert
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.distributed import universal
from univitar_ds.formats.recognise import open_stored
from univitar_ds.formats.stored_model import StoredModel

ENCODER = golden(CASES[0]).folder


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server


def opened(server: S3Server, place: str, session: Path, config_folder: Path | None = None) -> StoredModel:
    session.mkdir()
    return open_stored(place, None, config_folder, StorageSettings(server.url, session=str(session)))


def test_a_universal_checkpoint_is_read_from_s3_with_its_folders(server, tmp_path):
    stored = tiny_stored()
    universal.write(stored, tmp_path / "own")
    place = server.upload(tmp_path / "own", "universal", "**/*")
    server.put("universal/global_step3/zero/old.pt", b"an earlier checkpoint")
    assert_same(opened(server, place, tmp_path / "one"), stored)
    assert not list((tmp_path / "one").rglob("old.pt"))
    assert_same(opened(server, f"{place}/global_step7", tmp_path / "two", tmp_path / "own"), stored)


@pytest.mark.parametrize("pointer", ["../../..", "/", "", "gone"])
def test_a_pointer_to_another_folder_is_followed_nowhere(server, tmp_path, pointer):
    place = server.put("pointer/latest_universal", pointer.encode()).rpartition("/")[0]
    with pytest.raises(CheckpointError, match=f"{place} holds no model in a known format"):
        opened(server, place, tmp_path / "one")


def test_an_object_whose_name_leaves_the_folder_is_refused(server, tmp_path):
    server.put("names/latest_universal", b"tag")
    server.put("names/tag/zero/../../../escaped.pt", b"")
    with pytest.raises(CheckpointError, match=r"escaped\.pt would be written outside of a model's folder"):
        opened(server, f"s3://{BUCKET}/names", tmp_path / "one")
    assert not list(tmp_path.rglob("escaped.pt"))


def test_a_run_and_one_of_its_checkpoints_are_read_from_s3(server, tmp_path):
    run = tmp_path / "tried"
    write_run(run, run_config())
    place = server.upload(run, "runs/tried", "**/*")
    local = open_stored(run)
    for name in ("", "/checkpoints/step-00000007"):
        found = opened(server, place + name, tmp_path / f"session{len(name)}")
        assert found.joint == local.joint
        assert found.tensors.keys() == local.tensors.keys()
        assert_equal(found.tensors, {key: local.tensors[key] for key in found.tensors})
    with pytest.raises(CheckpointError, match="step-00000008/ holds no files"):
        opened(server, f"{place}/checkpoints/step-00000008", tmp_path / "none")


@pytest.mark.slow
def test_every_format_is_read_from_the_hub_by_its_name(tmp_path):
    script = """
import sys
from univitar_ds.convert.conversion import convert
for name in sys.argv[2:]:
    convert(f"lab/{name}", f"{sys.argv[1]}/{name}", "release")
"""
    wanted = open_stored(ENCODER).tensors
    with hub_server() as hub:
        for to in WRITTEN:
            folder = tmp_path / to
            convert(ENCODER, folder, to)
            files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
            hub.files[f"lab/{to}"] = {name: path.read_bytes() for name, path in files.items()}
            hub.private[f"lab/{to}"] = True
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        command = [sys.executable, "-c", script, str(tmp_path / "back"), *WRITTEN]
        done = run_watched(command, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for to in WRITTEN:
        found = open_stored(tmp_path / "back" / to).tensors
        assert found.keys() == wanted.keys()
        assert_equal(found, {key: wanted[key] for key in found})
