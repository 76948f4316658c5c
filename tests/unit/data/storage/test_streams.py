"""A `RangeReader` returns the bytes of the file at any position, and requests only the ranges around them."""

import io
import random

import pytest

from univitar_ds.data.storage import streams
from univitar_ds.data.storage.local import LocalStorage
from univitar_ds.data.storage.streams import RangeReader
from univitar_ds.errors import DataError

CONTENT = random.Random(0).randbytes(10_000)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    return str(tmp_path / "file")


def test_a_range_reader_seeks_and_reads_like_a_file(path, monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 64)
    rng = random.Random(1)
    with RangeReader(LocalStorage(), path, len(CONTENT)).buffered() as stream, io.BytesIO(CONTENT) as truth:
        for _ in range(200):
            offset, whence = rng.randrange(12_000), rng.choice((io.SEEK_SET, io.SEEK_CUR, io.SEEK_END))
            offset = -offset // 2 if whence == io.SEEK_END else offset
            if whence == io.SEEK_END and offset < -len(CONTENT):
                continue
            assert stream.seek(offset, whence) == truth.seek(offset, whence) == stream.tell()
            length = rng.randrange(300)
            assert stream.read(length) == truth.read(length)


def test_skipped_bytes_are_not_requested(path, monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 64)
    ranges = RangeReader(LocalStorage(), path, len(CONTENT))
    with ranges.buffered() as stream:
        for offset in range(0, 10_000, 1000):
            stream.seek(offset)
            assert stream.read(10) == CONTENT[offset : offset + 10]
    assert ranges.fetched == 10 * 64


def test_a_file_that_is_shorter_than_the_given_size_is_an_error(path):
    with RangeReader(LocalStorage(), path, 20_000).buffered() as stream:
        stream.seek(9_990)
        with pytest.raises(DataError, match="ends at byte 10000"):
            stream.read(20)
