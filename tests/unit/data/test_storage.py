"""Files by address."""

import pytest

from univitar_ds.data.storage import LocalStorage, storage_for
from univitar_ds.errors import DataError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "f.bin"
    path.write_bytes(bytes(range(200)))
    return str(path)


def test_a_range_is_exactly_the_bytes_asked_for(file):
    storage = storage_for(file)
    assert storage.read_range(file, 10, 5) == bytes(range(10, 15))
    assert storage.read_range(file, 0, 200) == bytes(range(200))
    assert storage.read_range(file, 200, 0) == b""
    assert storage.size(file) == 200


def test_a_range_beyond_the_end_is_an_error_with_the_byte_where_the_file_ends(file):
    with pytest.raises(DataError, match="ends at byte 200, but 20 bytes were expected from byte 190"):
        LocalStorage().read_range(file, 190, 20)


def test_an_opened_stream_can_seek(file):
    with LocalStorage().open(file) as stream:
        stream.seek(150)
        assert stream.read(3) == bytes([150, 151, 152])


def test_a_missing_file_is_named(tmp_path):
    path = str(tmp_path / "nothing")
    for act in (
        LocalStorage().open,
        LocalStorage().size,
        LocalStorage().list,
        lambda p: LocalStorage().read_range(p, 0, 1),
    ):
        with pytest.raises(DataError, match="nothing: cannot be read"):
            act(path)


def test_a_listing_is_sorted_and_holds_files_only(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert LocalStorage().list(str(tmp_path)) == [str(tmp_path / name) for name in "abc"]


def test_an_unknown_scheme_is_refused_with_what_is_supported():
    with pytest.raises(DataError, match=r"gopher://x/y: cannot read from gopher://; a source must be a local path"):
        storage_for("gopher://x/y")
