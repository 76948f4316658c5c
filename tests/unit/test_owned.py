"""Files that the program may remove: only those with its own names, and nothing behind a link."""

import os
from pathlib import Path

import pytest

from univitar_ds import owned
from univitar_ds.errors import ConfigError
from univitar_ds.owned import check_result, write_result

NAMES = {r"a\.txt": None, r"log-\d+": None, "inner": {r"b\.txt": None}}


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.parametrize(
    "name",
    ["a.txt.old", "xa.txt", "log-", "log-1\n", "b.txt", "inner/a.txt", "inner/c/b.txt", "a.txt/b.txt",
     "log-2/photo.jpg", ".notes.partial"],
)  # fmt: skip
def test_a_file_that_the_program_does_not_write_is_kept(tmp_path, name):
    fill(tmp_path, "log-1", "inner/b.txt", name)
    assert name.startswith(owned.foreign(tmp_path, NAMES))
    owned.clear(tmp_path, NAMES)
    assert left(tmp_path) == [name]


def test_own_files_are_removed_and_so_is_a_folder_that_is_then_empty(tmp_path):
    fill(tmp_path / "run", "a.txt", "log-7", "inner/b.txt", ".a.txt.partial")
    assert owned.foreign(tmp_path / "run", NAMES) is None
    assert owned.remove(tmp_path / "run", NAMES)
    assert not (tmp_path / "run").exists()
    assert owned.remove(tmp_path / "run", NAMES)


def test_a_folder_with_other_files_is_kept(tmp_path):
    fill(tmp_path, "a.txt", "inner/b.txt", "inner/photo.jpg")
    assert not owned.remove(tmp_path, NAMES)
    assert left(tmp_path) == ["inner/photo.jpg"]


@pytest.mark.parametrize("kind", ["file", "folder", "pipe"])
def test_links_and_pipes_are_foreign_and_never_followed(tmp_path, kind):
    fill(tmp_path / "mine", "b.txt")
    (tmp_path / "run").mkdir()
    name = {"file": "a.txt", "folder": "inner", "pipe": "log-1"}[kind]
    if kind == "pipe":
        os.mkfifo(tmp_path / "run" / name)
    else:
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine" / ("b.txt" if kind == "file" else ""))
    assert owned.foreign(tmp_path / "run", NAMES) == name
    assert not owned.remove(tmp_path / "run", NAMES)
    assert left(tmp_path / "mine") == ["b.txt"]
    assert os.path.lexists(tmp_path / "run" / name)


def test_a_linked_folder_is_not_cleared_through_its_link(tmp_path):
    fill(tmp_path / "mine", "a.txt")
    (tmp_path / "run").symlink_to(tmp_path / "mine")
    assert not owned.remove(tmp_path / "run", NAMES)
    with pytest.raises(ConfigError, match="nothing is replaced through a link; name the folder itself"):
        owned.refuse_link(tmp_path / "run")
    assert left(tmp_path / "mine") == ["a.txt"]


def test_a_mark_has_its_content_and_is_a_regular_file(tmp_path):
    assert not owned.is_marked(tmp_path, "run")
    owned.mark(tmp_path, "run")
    assert owned.is_marked(tmp_path, "run")
    assert not owned.is_marked(tmp_path, "demo")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / owned.MARK).symlink_to(tmp_path / owned.MARK)
    assert not owned.is_marked(tmp_path / "other", "run")
    for content in ("", "mine", '{"program": "other", "kind": "run"}', "[]"):
        (tmp_path / owned.MARK).write_text(content)
        assert not owned.is_marked(tmp_path, "run")


def test_a_result_goes_into_a_pipe_and_the_pipe_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_result(pipe, lambda path: pytest.fail("a pipe holds nothing that could be looked at"))
        write_result(pipe, "found\n")
        assert os.read(reader, 100) == b"found\n"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
