"""Reading captions of sources for a tokenizer."""

import itertools
import os

from tests.support.s3 import faulty, s3_server
from tests.support.shards import image, video, write_tar
from univitar_ds.config.data import SourceConfig
from univitar_ds.data import caption_texts
from univitar_ds.data.caption_texts import CAPTION_SHARDS, iterate_captions
from univitar_ds.data.storage import streams
from univitar_ds.data.storage.base import StorageSettings


def source(path, **options):
    return SourceConfig(path=str(path), **options)


def test_captions_are_read_from_damaged_shards_and_labels_are_put_into_templates(tmp_path):
    samples = [(f"k{n}", {"png": b"", "cls": f"thing{n}".encode()}) for n in range(6)]
    path = write_tar(tmp_path / "a.tar", [*samples, ("own", {"png": b"", "txt": b"own words", "cls": b"x"})])
    content = path.read_bytes()
    at = content.index(b"k2.cls")
    path.write_bytes(content[:at] + bytes(512) + content[at + 512 :])
    captions = list(iterate_captions([source(tmp_path, templates=["a {}", "one {} here"])], limit=100))
    expected = [text for n in (0, 1, 3, 4, 5) for text in (f"a thing{n}", f"one thing{n} here")]
    assert captions == [*expected, "own words"]
    assert list(iterate_captions([source(tmp_path)], limit=100)) == ["own words"]


def test_captions_are_read_evenly_from_all_shards_and_unusable_texts_are_skipped(tmp_path):
    def texts(prefix, n):
        return [(f"{prefix}{i}", {"png": b"", "txt": f"{prefix} {i}".encode()}) for i in range(n)]

    write_tar(tmp_path / "a.tar", [("x", {"txt": b"\xff\xfe"}), *texts("a", 50)])
    write_tar(tmp_path / "b.tar", [("v", {"mp4": video(16, 16), "json": b'{"captions": ["b one", "b two"]}'})])
    found = list(iterate_captions([source(tmp_path)], limit=8))
    assert found == ["a 0", "a 1", "a 2", "a 3", "b one", "b two"]


def test_captions_are_read_from_a_limited_number_of_evenly_spaced_shards(tmp_path):
    for index in range(2 * CAPTION_SHARDS + 50):
        content = {"png": image(14, 14, form="PNG"), "txt": f"caption {index}".encode()}
        write_tar(tmp_path / f"a-{index:03d}.tar", [(f"k{index}", content)])
    found = list(iterate_captions([source(tmp_path)], limit=1_000_000))
    numbers = [int(caption.removeprefix("caption ")) for caption in found]
    assert len(numbers) == CAPTION_SHARDS
    assert {later - earlier for earlier, later in itertools.pairwise(numbers)} == {2, 3}
    assert (numbers[0], numbers[-1]) == (0, 447)
    assert list(iterate_captions([source(tmp_path)], limit=1_000_000)) == found


def test_captions_are_read_from_a_limited_number_of_bytes_of_each_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 4096)
    monkeypatch.setattr(caption_texts, "CAPTION_BYTES", 2 * 20 * 4096)
    for name in ("a", "b"):
        samples = [(f"{name}{n}", {"jpg": bytes(50_000), "txt": f"{name} {n}".encode()}) for n in range(50)]
        write_tar(tmp_path / f"{name}.tar", samples)
    found = list(iterate_captions([source(tmp_path)], limit=1000))
    assert found == [
        f"{name} {n}" for name in ("a", "b") for n in range(19)
    ]  # 20 pieces per shard: one per sample, and one before the first


def test_captions_of_remote_shards_are_read_without_downloading_whole_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 4096)
    for name in ("a", "b"):
        media = [os.urandom(50_000) for _ in range(12)]
        samples = [(f"{name}{n}", {"jpg": jpg, "txt": f"{name} {n}".encode()}) for n, jpg in enumerate(media)]
        write_tar(tmp_path / "local" / f"{name}.tar", samples)
    with s3_server() as server, faulty(server, lambda request: None) as proxy:
        url = server.upload(tmp_path / "local", "captions")
        settings = StorageSettings(endpoint_url=proxy.url, session=str(tmp_path / "session"))
        twice = [source(url), source(url, name="again")]
        found = list(iterate_captions(twice, limit=16, settings=settings))
        assert sorted(found) == sorted(iterate_captions([source(tmp_path / "local")] * 2, limit=16))
        assert sorted(found) == sorted(2 * [f"{name} {n}" for name in ("a", "b") for n in range(4)])
        asked = [request.range.removeprefix("bytes=").split("-") for request in proxy.requests if request.range]
        read = sum(int(last) + 1 - int(first) for first, last in asked)
        assert read < 2 * 2 * 12 * 4096  # of 2.4 MB
        assert not (tmp_path / "session" / "shards").exists()
