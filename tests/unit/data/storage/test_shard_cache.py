"""Local copies of remote shards, with a fake download that needs no network."""

import io
import logging
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fetches import fetches_ended
from tests.support.progress import wait_until
from univitar_ds.data.storage import cache_dir
from univitar_ds.data.storage.cache_dir import CacheDir, Version
from univitar_ds.data.storage.shard_cache import AHEAD, NEAR, ShardCache
from univitar_ds.errors import DataError

FORK = multiprocessing.get_context("fork")


def content(version: Version) -> bytes:
    return random.Random(version.url).randbytes(version.size)


class Source:
    """Yields an object in pieces of 1000 bytes, records the calls, and stops at byte `gate` until `opened` is set."""

    def __init__(self, gate: int | None = None) -> None:
        self.asked: list[tuple[str, int]] = []
        self.gate = gate
        self.opened = threading.Event()

    def __call__(self, version, start, end):
        self.asked.append((version.url, start))
        data = content(version)
        for at in range(start, end, 1000):
            if self.gate is not None and at >= self.gate:
                self.opened.wait()
            yield memoryview(data[at : min(at + 1000, end)])


def version(name: str = "a", size: int = 10_000, etag: str = "1") -> Version:
    return Version(f"s3://b/{name}.tar", etag, size)


def shard_cache(folder, source, limit=1 << 30, patience_s=600.0) -> ShardCache:
    return ShardCache(Path(folder), limit, source, patience_s)


def kept(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir() if path.suffix == ".tar"}


def test_concurrent_readers_of_a_shard_share_one_download(tmp_path):
    source = Source()
    one = shard_cache(tmp_path, source)
    found = []

    def read():
        with one.open(version()) as stream:
            found.append(stream.read())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content(version())] * 8
    fetches_ended()
    assert one.read(version(), 3, 5) == content(version())[3:8]
    assert shard_cache(tmp_path, source).open(version()).read() == content(version())
    assert source.asked == [("s3://b/a.tar", 0)]


def test_a_reader_waits_only_for_the_bytes_it_reads(tmp_path):
    source = Source(gate=50_000)
    one = shard_cache(tmp_path, source)
    shard = version(size=100_000)
    with one.open(shard) as stream:
        stream.seek(20_000)
        assert stream.read(10_000) == content(shard)[20_000:30_000]
        assert not source.opened.is_set()
        assert one.read(shard, 40_000, 100) == content(shard)[40_000:40_100]
        source.opened.set()
        stream.seek(-10, os.SEEK_END)
        assert stream.read() == content(shard)[-10:]


@settings(max_examples=60)
@given(
    steps=st.lists(st.tuples(st.integers(0, 130_000), st.integers(0, 60_000)), max_size=8), size=st.integers(0, 90_000)
)
def test_a_stream_reads_like_a_file(tmp_path_factory, steps, size):
    shard = version(size=size)
    truth = io.BytesIO(content(shard))
    with shard_cache(tmp_path_factory.mktemp("s"), Source()).open(shard) as stream:
        for position, n in steps:
            assert stream.seek(position) == truth.seek(position)
            assert stream.read(n) == truth.read(n)


def test_read_returns_none_for_a_missing_range_and_waits_for_one_near_the_download(tmp_path):
    source = Source(gate=10_000)
    one = shard_cache(tmp_path, source)
    shard = version(size=NEAR + 100_000)
    assert one.read(shard, 0, 10) is None
    assert source.asked == []
    with one.open(shard) as stream:
        assert stream.read(1) == content(shard)[:1]
        assert one.read(shard, shard.size - 10, 10) is None
        threading.Timer(0.05, source.opened.set).start()
        assert one.read(shard, 20_000, 10) == content(shard)[20_000:20_010]


def test_each_version_has_its_own_copy(tmp_path):
    one = shard_cache(tmp_path, Source())
    for etag in "12":
        one.open(version(etag=etag)).read()
    fetches_ended()
    assert len(kept(tmp_path)) == 2


def test_prefetch_downloads_in_order_and_a_few_at_a_time(tmp_path):
    source = Source(gate=0)
    one = shard_cache(tmp_path, source)
    shards = [version(str(number)) for number in range(AHEAD + 3)]
    one.prefetch(shards)
    one.prefetch(shards)
    assert len(list(tmp_path.glob("*.part"))) == AHEAD
    late = threading.Thread(target=lambda: one.open(shards[-1]).read())
    late.start()  # a reader's download starts at once
    wait_until(lambda: (shards[-1].url, 0) in source.asked, "the request of the reader")
    source.opened.set()
    late.join()
    fetches_ended()
    assert sorted(url for url, _ in source.asked) == [shard.url for shard in shards]
    first = {url for url, _ in source.asked[: AHEAD + 1]}
    assert first == {shard.url for shard in [*shards[:AHEAD], shards[-1]]}


def test_later_hints_follow_earlier_ones_without_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr("univitar_ds.data.storage.shard_cache.AHEAD", 1)
    source = Source(gate=0)
    one = shard_cache(tmp_path, source)
    d, a, c, b = (version(name) for name in "dacb")
    one.prefetch([d, a, version("nothing", size=0), c])
    one.prefetch([c, b, a])
    source.opened.set()
    fetches_ended()
    assert [url for url, _ in source.asked] == [shard.url for shard in (d, a, c, b)]


def test_readers_get_the_error_of_a_download_and_the_next_download_continues_it(tmp_path):
    left = [1]

    def failing(shard, start, end):
        for piece in Source()(shard, start, end):
            if start == 0 and left[0] == 0:
                raise DataError("the store is gone")
            left[0] -= 1
            yield piece

    one = shard_cache(tmp_path, failing)
    with one.open(version()) as stream, pytest.raises(DataError, match="the store is gone"):
        stream.read()
    fetches_ended()
    source = Source()
    assert shard_cache(tmp_path, source).open(version()).read() == content(version())
    assert source.asked == [("s3://b/a.tar", 1000)]


def test_the_least_recently_used_copies_are_evicted_but_not_those_being_read(tmp_path):
    source = Source()
    one = shard_cache(tmp_path, source, limit=35_000)
    shards = [version(str(number)) for number in range(5)]
    reading = one.open(shards[0])
    for shard in shards[1:3]:
        one.open(shard).read()
    fetches_ended()
    one.open(shards[1]).read()
    one.open(shards[3]).read()
    fetches_ended()
    assert kept(tmp_path) == {shards[number].name for number in (0, 1, 3)}
    assert one.read(shards[2], 0, 10) is None
    assert reading.read() == content(shards[0])
    reading.close()
    for number in (1, 3):
        one.open(shards[number]).close()
    assert one.open(shards[2]).read() == content(shards[2])
    fetches_ended()
    assert kept(tmp_path) == {shards[number].name for number in (1, 2, 3)}


def test_a_limit_below_the_size_of_the_copies_in_use_is_only_a_warning(tmp_path, caplog):
    one = shard_cache(tmp_path, Source(), limit=15_000)
    streams = [one.open(version(str(number))) for number in range(3)]
    assert [stream.read() for stream in streams] == [content(version(str(number))) for number in range(3)]
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "above the limit of 0.00 GB" in warning
    assert "raise data.cache.limit_gb" in warning


def test_prefetch_does_not_exceed_the_limit(tmp_path, caplog):
    source = Source()
    one = shard_cache(tmp_path, source, limit=25_000)
    with one.open(version("a")) as first, one.open(version("b")) as second:
        first.read(), second.read()
        one.prefetch([version("c")])
        fetches_ended()
        assert [name for name, _ in source.asked] == ["s3://b/a.tar", "s3://b/b.tar"]
    one.prefetch([version("c")])  # now another copy can be evicted
    fetches_ended()
    assert len(kept(tmp_path)) == 2
    assert version("c").name in kept(tmp_path)
    assert not caplog.records


def test_a_copy_that_becomes_complete_while_room_is_made_is_counted(tmp_path, monkeypatch):
    one = CacheDir(tmp_path, 25_000)
    parts = {}
    for name in "ab":
        parts[name], lock = one.begin(version(name))
        os.write(parts[name], content(version(name)))
        os.close(lock)
    one.finish(version("a"))
    held = [one.open(version(name)) for name in "ab"]  # open copies are not evicted
    truth = os.listdir

    def then_whole(folder):
        names = truth(folder)
        one.finish(version("b"))
        return names

    monkeypatch.setattr(cache_dir.os, "listdir", then_whole)
    assert one.begin(version("c"), needed=False) is None
    monkeypatch.undo()
    assert kept(tmp_path) == {version(name).name for name in "ab"}
    for descriptor in (*held, *parts.values()):
        os.close(descriptor)


def test_some_free_disk_space_is_never_used(tmp_path, monkeypatch):
    one = shard_cache(tmp_path, Source())
    one.open(version("0")).read()
    fetches_ended()
    usage = os.statvfs(tmp_path).f_frsize
    monkeypatch.setattr(cache_dir.shutil, "disk_usage", lambda _: type("Usage", (), {"free": usage})())
    one.open(version("1")).read()
    fetches_ended()
    assert kept(tmp_path) == {version("1").name}


@pytest.mark.parametrize(("written_at", "asked_from"), [(None, 4000), ((0.0, 0.0), 0)], ids=["now", "in 1970"])
def test_a_part_is_continued_unless_it_was_written_before_the_last_boot(tmp_path, written_at, asked_from):
    part = tmp_path / f"{version().name}.part"
    part.write_bytes(content(version())[:asked_from] or bytes(4000))
    os.utime(part, written_at)
    source = Source()
    assert shard_cache(tmp_path, source).open(version()).read() == content(version())
    assert source.asked == [("s3://b/a.tar", asked_from)]


def test_a_copy_of_a_wrong_size_is_downloaded_again(tmp_path):
    (tmp_path / version().name).write_bytes(b"cut")
    assert shard_cache(tmp_path, Source()).open(version()).read() == content(version())


def test_a_copy_that_becomes_complete_during_the_lookup_is_found(tmp_path, monkeypatch):
    one = shard_cache(tmp_path, Source())
    one.open(version()).read()
    fetches_ended()
    whole, part = tmp_path / version().name, tmp_path / f"{version().name}.part"
    whole.rename(part)

    def renamed_after_the_first_look(path, *flags):
        try:
            return opened(path, *flags)
        finally:
            if part.exists():
                part.rename(whole)

    opened = os.open
    monkeypatch.setattr(cache_dir.os, "open", renamed_after_the_first_look)
    assert one.read(version(), 0, 10) == content(version())[:10]


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"/file: .*set data\.cache\.folder to another folder"):
        shard_cache(tmp_path / "file", Source()).open(version())


def _stuck_at(folder, gate, ready):
    """The main function of a process whose download stops at byte `gate`."""
    one = shard_cache(folder, Source(gate=gate))
    with one.open(version()) as stream:
        stream.read(gate)
        ready.set()
        stream.read()


@pytest.fixture
def stuck(tmp_path):
    ready = FORK.Event()
    process = FORK.Process(target=_stuck_at, args=(tmp_path, 5000, ready), daemon=True)
    process.start()
    ready.wait()
    yield process
    process.kill()
    process.join()


def test_a_reader_continues_the_download_of_a_process_that_was_killed(tmp_path, stuck):
    source = Source()
    one = shard_cache(tmp_path, source)
    with one.open(version()) as stream:
        assert stream.read(5000) == content(version())[:5000]
        assert source.asked == []  # the other process downloads it
        threading.Timer(0.05, os.kill, (stuck.pid, signal.SIGKILL)).start()
        assert stream.read() == content(version())[5000:]
    assert source.asked == [("s3://b/a.tar", 5000)]


def test_a_download_of_another_process_without_progress_is_an_error(tmp_path, stuck):
    one = shard_cache(tmp_path, Source(), patience_s=0.2)
    with one.open(version()) as stream, pytest.raises(DataError, match=r"a\.tar: .* for 0 s; stop that process"):
        stream.read()


def test_a_copy_that_another_process_downloads_is_not_evicted(tmp_path, stuck):
    one = shard_cache(tmp_path, Source(), limit=1)
    one.open(version("other")).read()
    assert (tmp_path / f"{version().name}.part").exists()


def _read_all(folder, seed, failures):
    try:
        one = shard_cache(folder, Source(), limit=45_000)
        for number in random.Random(seed).sample(range(8), 8) * 2:
            shard = version(str(number), 10_000 + number)
            with one.open(shard) as stream:
                assert stream.read() == content(shard)
            piece = one.read(shard, 100, 50)
            assert piece in (None, content(shard)[100:150])
    except BaseException as error:
        failures.put(repr(error))
        raise


def test_processes_can_share_a_folder_with_a_limit_below_the_total_size(tmp_path):
    failures = FORK.SimpleQueue()
    processes = [FORK.Process(target=_read_all, args=(tmp_path, seed, failures)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4, failures.get()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar*")) < 45_000 + 4 * 10_010
