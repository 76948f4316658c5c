"""Before the first step, the sources are checked for the modalities that a run reads, at a bounded cost."""

import io
import tarfile

import pytest

from tests.support.finished import run_config
from tests.support.shards import write_demo_shards
from univitar_ds.config.data import SourceConfig
from univitar_ds.data import contents
from univitar_ds.data.contents import check_contents, contents_of, faults_of_stages
from univitar_ds.data.shards.sources import find_shards
from univitar_ds.data.storage import streams
from univitar_ds.errors import DataError

NOT_THERE = r"stage both needs {} samples, but its sources hold none \({}, all of them scanned\)"


def write(path, *kinds):
    """Writes a tar with a sample for each of `kinds`: a caption, and a member with that extension unless it is "".

    All content is zeros, since scans skip it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, kind in enumerate(kinds):
            for extension in filter(None, (kind, "txt")):
                info = tarfile.TarInfo(f"{index:06d}.{extension}")
                info.size = 700
                tar.addfile(info, io.BytesIO(bytes(700)))
    return path


def shards_of(*paths):
    return find_shards([SourceConfig(path=str(path), name=f"s{place}") for place, path in enumerate(paths)])


def config_of(*paths, video_ratio=0.5, weights=None, evaluation=()):
    stage = run_config().stages[0].model_dump() | {"video_ratio": video_ratio, "weights": weights or {}}
    sources = [{"path": str(path), "name": f"s{place}"} for place, path in enumerate(paths)]
    return run_config(
        data={"sources": sources, "workers": 0},
        stages=[stage],
        evaluation={"sources": [{"path": str(path)} for path in evaluation]},
    )


def check(config):
    check_contents(config, find_shards(config.data.sources), find_shards(config.evaluation.sources))


@pytest.mark.parametrize(
    ("kinds", "video_ratio", "lacks", "found"),
    [
        (["jpg"] * 40, 0.5, "video", "40 images in 1 shard"),
        (["mp4"] * 40, 0.5, "image", "40 videos in 1 shard"),
        (["mp4"] * 40, 0.0, "image", "40 videos in 1 shard"),
        (["jpg"] * 3 + [""], 1.0, "video", "3 images, 1 without media in 1 shard"),
        ([""] * 2, 0.0, "image", "2 without media in 1 shard"),
        ([], 0.0, "image", "no sample in 1 shard"),
    ],
)
def test_tars_without_a_modality_that_a_stage_reads_are_refused(tmp_path, kinds, video_ratio, lacks, found):
    path = write(tmp_path / "a.tar", *kinds)
    with pytest.raises(DataError, match=NOT_THERE.format(lacks, found)):
        check(config_of(path, video_ratio=video_ratio))


@pytest.mark.parametrize(
    ("kinds", "video_ratio"),
    [
        (["jpg"], 0.0),
        (["mp4"], 1.0),
        (["jpg"] * 100 + ["webm"], 0.5),
        (["", "gifv", "png"], 0.01),
    ],
)
def test_one_sample_of_each_modality_is_enough(tmp_path, kinds, video_ratio):
    check(config_of(write(tmp_path / "a.tar", *kinds), video_ratio=video_ratio))


def test_all_tars_of_all_sources_are_scanned_before_a_run_is_refused(tmp_path):
    many = [write(tmp_path / "many" / f"{number:03d}.tar", *["jpg"] * 40) for number in range(70)]
    with pytest.raises(DataError, match=NOT_THERE.format("video", "2800 images in 70 shards")):
        check(config_of(tmp_path / "many"))
    write(many[33], *["jpg"] * 39, "mp4")
    check(config_of(tmp_path / "many"))
    check(config_of(many[0], many[33]))


def test_sources_without_a_weight_do_not_count(tmp_path):
    images, videos = write(tmp_path / "p.tar", "jpg"), write(tmp_path / "c.tar", "mp4")
    check(config_of(images, videos, weights={"s0": 1, "s1": 1}))
    check(config_of(images, videos, video_ratio=0.0, weights={"s0": 1}))
    with pytest.raises(DataError, match=NOT_THERE.format("video", "1 image in 1 shard")):
        check(config_of(images, videos, weights={"s0": 1, "s1": 0}))


def test_a_packed_folder_is_not_scanned(tmp_path):
    folder = write_demo_shards(tmp_path / "packed", images=8, videos=4, shards=1)
    for path in folder.glob("*.tar"):
        path.write_bytes(b"\xff" * path.stat().st_size)  # not a tar, so a scan would fail
    check(config_of(folder))
    found = contents_of(shards_of(folder), ["image", "video"])
    assert (found.counts, found.whole) == ({"image": 8, "video": 4}, True)


def test_a_scan_that_reaches_its_limit_only_warns(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "a.tar", *["jpg"] * 60, "mp4")
    monkeypatch.setattr(contents, "MAX_SAMPLES", 50)
    check(config_of(path))
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("stage both needs video samples, and none was found yet (found: 50 images in 1 shard")
    assert "video_ratio to 0" in message


def test_a_sample_after_the_beginning_of_a_shard_is_found_without_a_warning(tmp_path, caplog):
    assert contents.FIRST_SAMPLES < 60
    check(config_of(write(tmp_path / "a.tar", *["jpg"] * 60, "mp4")))
    assert not caplog.records


@pytest.mark.parametrize(
    ("kinds", "video_ratio", "refused"),
    [
        (["mp4"], 0.0, "the stages read images, and they hold 1 video in 1 shard"),
        (["jpg"], 1.0, "the stages read videos, and they hold 1 image in 1 shard"),
        ([], 0.5, "the stages read images and videos, and they hold no sample in 1 shard"),
        (["jpg"], 0.5, None),
        (["mp4"], 0.5, None),
    ],
)
def test_an_evaluation_without_usable_samples_is_refused_before_training(tmp_path, kinds, video_ratio, refused):
    train, held_out = write(tmp_path / "a.tar", "jpg", "mp4"), write(tmp_path / "b.tar", *kinds)
    config = config_of(train, video_ratio=video_ratio, evaluation=[held_out])
    if refused is None:
        check(config)
        return
    with pytest.raises(DataError, match=f"evaluation.sources hold nothing to measure: {refused}"):
        check(config)


class Remote:
    """A store with one shard. Counts the requests and the bytes fetched; `open` fails, as it would fetch the shard."""

    def __init__(self, content):
        self.content, self.fetched, self.requests = content, 0, 0

    def read_range(self, path, offset, length):
        self.requests += 1
        self.fetched += length
        return self.content[offset : offset + length]

    def open(self, path):
        raise AssertionError("the whole shard would be fetched")


def remote(tmp_path, monkeypatch, *kinds, shards=1):
    content = write(tmp_path / "r.tar", *kinds).read_bytes()
    store = Remote(content)
    (local,) = shards_of(tmp_path / "r.tar")
    made = [
        local.__class__(**{**vars(local), "path": f"s3://b/{number}.tar", "storage": store}) for number in range(shards)
    ]
    monkeypatch.setattr(streams, "PIECE", 4096)
    return made, store


def test_thousands_of_remote_tars_need_few_requests(tmp_path, monkeypatch):
    shards, store = remote(tmp_path, monkeypatch, "jpg", "mp4", *["jpg"] * 200, shards=5000)
    assert faults_of_stages(shards, [run_config().stages[0]]) == []
    assert store.requests <= 3 * contents.AT_ONCE


def test_scans_of_remote_tars_fetch_a_bounded_number_of_bytes(tmp_path, monkeypatch, caplog):
    shards, store = remote(tmp_path, monkeypatch, *["jpg"] * 400, shards=50)
    monkeypatch.setattr(contents, "MAX_REMOTE_BYTES", 3 * shards[0].size)
    assert faults_of_stages(shards, [run_config().stages[0]]) == []
    assert "none was found yet" in caplog.text
    # There are two rounds of scans, and each scan may fetch one piece more than its limit.
    assert store.fetched <= 2 * contents.MAX_REMOTE_BYTES + 66 * 4096
    shards, store = remote(tmp_path, monkeypatch, *["jpg"] * 4, shards=3)
    (fault,) = faults_of_stages(shards, [run_config().stages[0]])
    assert "12 images in 3 shards, all of them scanned" in fault
