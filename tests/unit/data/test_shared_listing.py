"""Shards that rank 0 lists are the same on other ranks, and a rank that cannot read them raises an error."""

import json

import pytest

from tests.support.shards import write_tar
from univitar_ds.config.data import SourceConfig
from univitar_ds.data.shards.sources import find_shards, fingerprint
from univitar_ds.data.shared_listing import check_reachable, listing_of, shards_of
from univitar_ds.data.storage.base import LOCAL
from univitar_ds.data.storage.local import LocalStorage
from univitar_ds.errors import DataError

TEXT = {"txt": b"a cat"}


@pytest.fixture
def sources(tmp_path):
    for folder, count in (("a", 3), ("b", 1)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            write_tar(tmp_path / folder / f"{number}.tar", [(f"s{number}", TEXT)])
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    first = SourceConfig(path=str(tmp_path / "a"), captions="lines", where="width > 3", templates=["a {}"])
    return [first, SourceConfig(path=str(tmp_path / "b"), class_names=str(tmp_path / "names.txt"))]


def test_shards_are_the_same_without_a_request(sources, tmp_path, monkeypatch):
    listed = find_shards(sources)
    message = json.loads(json.dumps(listing_of(listed)))
    (tmp_path / "names.txt").unlink()

    def refused(*_):
        raise AssertionError("a request")

    for request in ("list", "size", "exists", "read", "read_range", "open"):
        monkeypatch.setattr(LocalStorage, request, refused)
    found = shards_of(message, sources, LOCAL)
    monkeypatch.undo()
    assert [(s.name, s.path, s.size, s.source, s.templates, s.class_names) for s in found] == [
        (s.name, s.path, s.size, s.source, s.templates, s.class_names) for s in listed
    ]
    assert found[3].class_names == ("cat", "dog")
    assert [shard.caption_lines for shard in found] == [True, True, True, False]
    assert [shard.where is None for shard in found] == [False, False, False, True]
    assert len({id(shard.watch) for shard in found}) == 2
    assert fingerprint(found) == fingerprint(listed)


def test_a_rank_checks_one_shard_of_each_source_and_ranks_check_different_ones(sources, monkeypatch):
    shards, asked, size = find_shards(sources), [], LocalStorage.size
    monkeypatch.setattr(LocalStorage, "size", lambda self, path: asked.append(path[-7:]) or size(self, path))
    for rank in range(4):
        check_reachable(shards, rank)
    assert sorted(asked) == sorted(["a/0.tar", "a/1.tar", "a/2.tar", "a/0.tar", *["b/0.tar"] * 4])


def test_a_shard_that_is_missing_or_has_another_size_is_named_with_the_machine(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "node17")
    shards = find_shards(sources)
    (tmp_path / "a" / "2.tar").unlink()
    check_reachable(shards, 1)
    with pytest.raises(DataError, match=r"rank 5: .*2\.tar.*rank 0 has listed it.*mount the source on node17"):
        check_reachable(shards, 5)
    (tmp_path / "b" / "0.tar").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"rank 1: .*b/0\.tar has 4 bytes here and \d+ on rank 0; .* on node17"):
        check_reachable(shards, 1)
