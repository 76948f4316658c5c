"""A file or folder is written completely or not at all, and is synced in the order that survives a power failure."""

import errno
import os
import stat
from pathlib import Path

import pytest

from univitar_ds import atomic_write
from univitar_ds.errors import StorageError


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_a_file_is_replaced_completely_or_not_at_all_with_the_permissions_of_a_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write.replace_text(tmp_path / "a.txt", "first")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    with pytest.raises(TypeError), atomic_write.replacing(tmp_path / "a.txt") as partial:
        partial.write_text(3)
    assert left(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "first"


@pytest.mark.parametrize(
    ("path", "said"),
    [("f" * 300, "File name too long; choose a shorter name"), ("file/x", "Not a directory; a part of this path is"),
     ("folder", "Is a directory; there is a folder of this name")],
)  # fmt: skip
def test_an_error_of_the_storage_is_one_message(tmp_path, path, said):
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder/x"):
        (tmp_path / name).write_text(name)
    with pytest.raises(StorageError, match=said):
        atomic_write.replace_text(tmp_path / path, "x")
    assert left(tmp_path) == ["file", "folder/x"]


@pytest.mark.parametrize("name", ["a.txt", ".a.txt"])
def test_files_left_by_a_kill_are_not_written_to(tmp_path, name):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.txt.partial").symlink_to(tmp_path / "mine")
    atomic_write.replace_text(tmp_path / name, "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert left(tmp_path) == sorted([name, "mine"])


def test_two_writers_of_one_name_do_not_conflict(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write.replacing(path, shared=True) as one, atomic_write.replacing(path, shared=True) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert left(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_content_is_on_the_disk_before_the_name_and_the_name_at_the_end(tmp_path, monkeypatch, kind):
    partial, path = tmp_path / "partial", tmp_path / "path"
    partial.mkdir() if kind == "folder" else partial.write_text("x")
    synced = []

    def fsync(descriptor):
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), path.exists()))

    monkeypatch.setattr(atomic_write.os, "fsync", fsync)
    atomic_write.move_into_place(partial, path, durable=True)
    assert synced == [(partial, False), (tmp_path, True)]


def test_a_file_system_that_syncs_no_folder_is_used_and_a_failing_disk_is_not(tmp_path, monkeypatch):
    def refusing(number, folders_only):
        def fsync(descriptor):
            if not folders_only or stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(atomic_write.os, "fsync", fsync)

    refusing(errno.EINVAL, folders_only=True)
    atomic_write.replace_bytes(tmp_path / "a.txt", b"1", durable=True)
    refusing(errno.EIO, folders_only=True)
    with pytest.raises(StorageError, match="Input/output error; check the disk"):
        atomic_write.replace_bytes(tmp_path / "a.txt", b"2", durable=True)
    refusing(errno.EIO, folders_only=False)
    with pytest.raises(StorageError, match="Input/output error; check the disk"):
        atomic_write.replace_bytes(tmp_path / "b.txt", b"2", durable=True)
    assert left(tmp_path) == ["a.txt"]
