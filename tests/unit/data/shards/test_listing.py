"""Listing the shards of sources on S3; tests of local sources are in test_sources."""

import pytest

from tests.support.s3 import BUCKET, faulty, s3_server
from tests.support.shards import write_demo_shards, write_tar
from univitar_ds.config.data import SourceConfig
from univitar_ds.data.shards.listing import list_shards
from univitar_ds.data.shards.manifest import PROGRESS_FILE
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import DataError


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server() as started:
        folder = tmp_path_factory.mktemp("shards")
        started.upload(write_demo_shards(folder / "packed", images=9, videos=3, shards=2), "deep/packed")
        for index in range(12):
            write_tar(folder / "bare" / f"a-{index:06d}.tar", [(f"k{index}", {"txt": b"x"})])
        started.upload(folder / "bare", "bare")
        yield started


@pytest.fixture
def settings(server, tmp_path):
    return StorageSettings(server.url, session=str(tmp_path))


def listed(path, settings, split="train"):
    return list_shards(SourceConfig(path=f"s3://{BUCKET}/{path}", split=split), "1:", settings)


@pytest.mark.parametrize("path", ["deep/packed", "deep/packed/", "deep/packed/manifest.json"])
def test_the_shards_of_a_packed_prefix_are_those_of_its_manifest(settings, path):
    shards = listed(path, settings)
    assert [(shard.name, shard.modality) for shard in shards] == [
        ("1:train-image-000000", "image"),
        ("1:train-image-000001", "image"),
        ("1:train-video-000000", "video"),
        ("1:train-video-000001", "video"),
    ]
    assert shards[0].path == f"s3://{BUCKET}/deep/packed/train-image-000000.tar"
    assert all(shard.sha256 and len(shard.storage.read(shard.path)) == shard.size for shard in shards)


def test_prefixes_brace_ranges_and_single_tars_are_listed(settings):
    everything = [f"1:a-{index:06d}" for index in range(12)]
    assert [shard.name for shard in listed("bare", settings)] == everything
    assert [shard.name for shard in listed("bare/a-{000000..000011}.tar", settings)] == everything
    assert [shard.name for shard in listed("bare/a-{000003,000007}.tar", settings)] == [everything[3], everything[7]]
    assert [shard.name for shard in listed("bare/a-000005.tar", settings)] == [everything[5]]


def test_a_brace_range_needs_one_listing_and_no_request_per_shard(server, tmp_path):
    with faulty(server, lambda request: None) as proxy:
        assert len(listed("bare/a-{000000..000011}.tar", StorageSettings(proxy.url, session=str(tmp_path)))) == 12
        assert len(proxy.requests) <= 3


def test_errors_name_missing_shards_folders_and_splits(server, settings):
    with pytest.raises(DataError, match=r"shard s3://shards/bare/a-000012\.tar is missing \(1 of 3 are\)"):
        listed("bare/a-{000010..000012}.tar", settings)
    with pytest.raises(DataError, match=r"shard s3://shards/bare/b\.tar is missing \(1 of 1 are\)"):
        listed("bare/b.tar", settings)
    with pytest.raises(DataError, match=r"shard s3://shards/nowhere/0\.tar is missing \(2 of 2 are\)"):
        listed("nowhere/{0..1}.tar", settings)
    with pytest.raises(DataError, match=r"s3://shards/nowhere: there is no such file or folder"):
        listed("nowhere", settings)
    with pytest.raises(DataError, match="has no split 'val'; it has test, train"):
        listed("deep/packed", settings, "val")
    server.put("unfinished/" + PROGRESS_FILE, b"{}")
    server.put("unfinished/train-image-000000.tar", b"")
    with pytest.raises(DataError, match="its packing did not end"):
        listed("unfinished", settings)


def test_a_truncated_or_missing_shard_is_an_error_of_the_listing(server, settings, tmp_path):
    folder = write_demo_shards(tmp_path / "cut", images=4, videos=0, shards=1)
    size = (folder / "train-image-000000.tar").stat().st_size
    server.upload(folder, "cut")
    server.put("cut/train-image-000000.tar", b"x" * 1000)
    with pytest.raises(DataError, match=rf"has 1000 bytes, its manifest says {size}"):
        listed("cut", settings)
    server.delete("cut/train-image-000000.tar")
    with pytest.raises(DataError, match=r"shard train-image-000000.tar of its manifest is missing"):
        listed("cut", settings)
