"""Local storage, selection of a storage by address, and storage settings."""

import json
import os

import pytest

from tests.support.open_files import open_below
from univitar_ds.config.data import DataConfig
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.data.storage.local import KEPT_OPEN, LocalStorage, OpenFiles
from univitar_ds.errors import DataError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "f.bin"
    path.write_bytes(bytes(range(200)))
    return str(path)


def test_read_range_returns_exactly_the_requested_bytes(file):
    storage = storage_for(file)
    assert storage.read_range(file, 10, 5) == bytes(range(10, 15))
    assert storage.read_range(file, 0, 200) == bytes(range(200))
    assert storage.read_range(file, 200, 0) == b""
    assert storage.size(file) == 200
    assert storage.read(file) == bytes(range(200))


def test_a_range_beyond_the_end_is_an_error_that_names_the_end_of_the_file(file):
    with pytest.raises(DataError, match="ends at byte 200, but 20 bytes were expected from byte 190"):
        LocalStorage().read_range(file, 190, 20)


def test_open_files_are_opened_once_limited_in_number_and_closed_at_the_end(tmp_path):
    paths = [tmp_path / f"{number}.bin" for number in range(KEPT_OPEN + 3)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 4)
    with OpenFiles() as files:
        for _ in range(3):
            assert files.read_range(str(paths[0]), 1, 2) == bytes(2)
            assert open_below(tmp_path) == [str(paths[0])]
        for number, path in enumerate(paths):
            assert storage_for(str(path), local=files).read_range(str(path), 0, 4) == bytes([number]) * 4
            assert len(open_below(tmp_path)) <= KEPT_OPEN
        with pytest.raises(DataError, match="ends at byte 4, but 9 bytes were expected from byte 0"):
            files.read_range(str(paths[1]), 0, 9)
        with pytest.raises(DataError, match=r"gone\.bin: cannot be read"):
            files.read_range(str(tmp_path / "gone.bin"), 0, 1)
    assert not open_below(tmp_path)


def test_an_opened_stream_can_seek(file):
    with LocalStorage().open(file) as stream:
        stream.seek(150)
        assert stream.read(3) == bytes([150, 151, 152])


def test_the_error_for_a_missing_file_names_it(tmp_path):
    path = str(tmp_path / "nothing")
    for act in (
        LocalStorage().open,
        LocalStorage().size,
        LocalStorage().list,
        LocalStorage().read,
        lambda p: LocalStorage().read_range(p, 0, 1),
    ):
        with pytest.raises(DataError, match="nothing: cannot be read"):
            act(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_an_error_without_blocking(tmp_path, kind):
    path = "/dev/zero"
    if kind == "pipe":
        path = str(tmp_path / "pipe")
        os.mkfifo(path)
    for act in (LocalStorage().open, LocalStorage().size, LocalStorage().read):
        with pytest.raises(DataError, match=rf"{path}: cannot be read \(is not a regular file\)"):
            act(path)
    assert open_below(path) == []


def test_a_symbolic_link_to_a_file_can_be_read(file, tmp_path):
    (tmp_path / "link").symlink_to(file)
    assert LocalStorage().read(str(tmp_path / "link")) == bytes(range(200))


def test_a_listing_is_sorted_and_holds_files_only(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert LocalStorage().list(str(tmp_path)) == [str(tmp_path / name) for name in "abc"]


def test_a_listing_makes_no_stat_call_per_file(file, tmp_path, monkeypatch):
    """On a shared file system, 40,000 stat calls take half a minute."""
    asked, stat = [], os.stat
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda *args, **kwargs: asked.append(args) or stat(*args, **kwargs))
        assert LocalStorage().list(str(tmp_path)) == [str(file)]
    assert not asked


def test_exists_is_true_for_files_and_folders_only(file, tmp_path):
    assert LocalStorage().exists(file)
    assert LocalStorage().exists(str(tmp_path))
    assert not LocalStorage().exists(str(tmp_path / "nothing"))


def test_settings_come_from_the_run_file_and_survive_json(tmp_path):
    data = DataConfig(
        sources=[{"path": "s3://b/p"}],
        s3={"endpoint_url": "http://x", "profile": "p", "region": "r", "idle_timeout_s": 3, "give_up_s": 4},
        cache={"folder": "~/cache", "limit_gb": 7},
    )
    settings = StorageSettings.of(data)
    assert settings == StorageSettings("http://x", "p", "r", 3, 4, 1, settings.cache_folder, 7)
    assert settings.cache_folder.startswith("/")
    assert settings.cache_folder.endswith("/cache")
    assert StorageSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    shared = settings.shared()
    assert shared.session == settings.shared().session != settings.session
    assert shared.shared() is shared


def test_the_error_for_an_unknown_scheme_names_the_supported_ones():
    with pytest.raises(
        DataError, match=r"gopher://x/y: cannot read from gopher://; a source must be a local path or an s3:// address"
    ):
        storage_for("gopher://x/y")
