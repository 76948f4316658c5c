"""The whole loader with a faulty store: the same samples in the same order, or an error message."""

import os

import pytest
import torch

from tests.support.loading import STAGE
from tests.support.s3 import BUCKET, faulty, s3_server, some_of
from tests.support.shards import image, write_demo_shards, write_tar
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.data.loader import LaneSet, PackLoader, eval_packs
from univitar_ds.data.storage import retry
from univitar_ds.errors import DataError

FAULTS = ["throttle", "refuse", "error", "drop", "cut", "stall", "short", "reset", "hang"]
IMAGES, VIDEOS, SHARDS, STEPS = 80, 12, 10, 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_demo_shards(tmp_path_factory.mktemp("demo"), images=IMAGES, videos=VIDEOS, shards=SHARDS)


@pytest.fixture(scope="module")
def server(folder):
    with s3_server() as started:
        started.upload(folder, "demo")
        yield started


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(retry, "FIRST_GAP_S", 0.001)


def config(path, endpoint=None, *, workers=0, cache=None, give_up_s=300.0) -> DataConfig:
    return DataConfig(
        sources=[SourceConfig(path=str(path))],
        workers=workers,
        pool_samples=24,
        s3={"endpoint_url": endpoint, "idle_timeout_s": 1.0, "give_up_s": give_up_s},
        cache=cache or {},
    )


def packs_of(data, steps=STEPS):
    given = {"tokenizer": None, "context_length": 16}
    modality_of = lambda step: "video" if step % 4 == 3 else "image"  # noqa: E731
    with PackLoader(data, STAGE, LaneSet((0, 1), 2, 3), modality_of=modality_of, **given) as packs:
        return [pack for _ in range(steps) for pack in next(packs)]


def swept(data, modality="image"):
    given = {"modality": modality, "resolution": STAGE.resolution(modality), "video_frames": 4, "token_budget": 300}
    return list(eval_packs(data.sources, data=data, tokenizer=None, context_length=16, **given))


def assert_same(ours, truth):
    for one, other in zip(ours, truth, strict=True):
        assert (one.keys, one.captions, one.bad, one.cursor) == (other.keys, other.captions, other.bad, other.cursor)
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize(("workers", "limit_gb"), [(0, 1.0), (2, 1.0), (1, 5e-5)])
def test_the_samples_have_the_same_order_despite_all_faults(server, folder, tmp_path, workers, limit_gb):
    """With a cache too small for all shards, decoding processes download evicted shards again."""
    cache = {"folder": str(tmp_path / "cache"), "limit_gb": limit_gb}
    steps = STEPS if limit_gb == 1.0 else STEPS // 2
    with faulty(server, some_of(FAULTS, 0.25, seed=workers)) as proxy:
        ours = packs_of(config(f"s3://{BUCKET}/demo", proxy.url, workers=workers, cache=cache), steps)
        assert sum(proxy.faults.values()) >= 0.1 * len(proxy.requests)
        assert len(proxy.faults) >= 4
        by_worker = [
            request for request in proxy.requests if request.range and not request.range.startswith("bytes=0-")
        ]
        assert limit_gb == 1.0 or len(by_worker) > 10
    assert_same(ours, packs_of(config(folder), steps))
    assert steps < STEPS or len({key for pack in ours for key in pack.keys}) > 0.9 * (IMAGES + VIDEOS)


def test_every_sample_is_read_exactly_once_despite_all_faults(server, folder):
    with faulty(server, some_of(FAULTS, 0.25, seed=9)) as proxy:
        data = config(f"s3://{BUCKET}/demo", proxy.url)
        ours = [swept(data, modality) for modality in ("image", "video")]
        assert sum(proxy.faults.values()) >= 0.1 * len(proxy.requests)
    for packs, modality, count in zip(ours, ("image", "video"), (IMAGES, VIDEOS), strict=True):
        keys = [key for pack in packs for key in pack.keys]
        assert len(keys) == len(set(keys)) == count
        assert_same(packs, swept(config(folder), modality))


def test_without_faults_each_shard_is_fetched_once_by_one_request(server, folder):
    with faulty(server, lambda request: None) as proxy:
        packs_of(config(f"s3://{BUCKET}/demo", proxy.url, workers=1))
        fetched = sorted(f"{one.method} {one.key} {one.range}" for one in proxy.requests if one.key.endswith(".tar"))
        sizes = {path.name: path.stat().st_size for path in folder.glob("train-*.tar")}
        assert fetched == sorted(f"GET demo/{name} bytes=0-{size - 1}" for name, size in sizes.items())


def test_with_a_kept_cache_the_next_run_requests_no_shards(server, tmp_path):
    cache = {"folder": str(tmp_path / "cache")}
    with faulty(server, lambda request: None) as proxy:
        first = swept(config(f"s3://{BUCKET}/demo", proxy.url, cache=cache))
        fetched = len([request for request in proxy.requests if request.key.endswith(".tar")])
        second = swept(config(f"s3://{BUCKET}/demo", proxy.url, cache=cache, give_up_s=301.0))  # a new storage object
        assert fetched == SHARDS
        assert len([request for request in proxy.requests if request.key.endswith(".tar")]) == fetched
    assert_same(first, second)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_object_that_is_replaced_during_the_run_ends_it_with_an_error(server, tmp_path, workers):
    """Shards too large for one answer in this test: the second half would come from the new object."""
    samples = [(f"k{n:03d}", {"png": image(150, 150, n, "PNG") + os.urandom(9000), "txt": b"x"}) for n in range(40)]
    path = write_tar(tmp_path / "a.tar", samples)
    url = server.put("replaced/a.tar", path.read_bytes())

    def replaced(request):
        if request.method == "GET" and request.key == "replaced/a.tar":
            if len(proxy.bodies(request.key)) == 1:
                return "cut"
            server.put("replaced/a.tar", path.read_bytes()[::-1])
        return None

    with faulty(server, replaced) as proxy:
        data = config(url, proxy.url, workers=workers)
        with pytest.raises(DataError, match=r"replaced/a\.tar: the object was replaced during this run"):
            swept(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_always_answers_503_ends_the_run_within_the_stated_time(server, workers):
    def broken(request):
        late = len([one for one in proxy.requests if one.key.endswith(".tar")]) > 6
        return "throttle" if late and request.key.endswith(".tar") else None

    message = r"nothing received in .*the store answered 503.*data\.s3\.give_up_s is 3"
    with faulty(server, broken) as proxy, pytest.raises(DataError, match=message):
        packs_of(config(f"s3://{BUCKET}/demo", proxy.url, workers=workers, give_up_s=3.0), steps=100)
