"""Parts of tars and packed folders without splits: apart, complete, and independent of other samples and processes."""

from contextlib import nullcontext

import pytest

from tests.support.finished import run_config
from tests.support.loading import STAGE
from tests.support.packing import pack
from tests.support.shards import image, write_tar
from tests.unit.drafting import made
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.data.caption_texts import iterate_captions
from univitar_ds.data.contents import check_contents
from univitar_ds.data.loader import EvalShare, LaneSet, PackLoader, eval_packs
from univitar_ds.data.shards.hold_out import HoldOut
from univitar_ds.data.shards.sources import check_parts, find_shards, fingerprint
from univitar_ds.data.shared_listing import listing_of, shards_of
from univitar_ds.data.storage.base import LOCAL
from univitar_ds.data.tools.verify import verify
from univitar_ds.errors import ConfigError, DataError

COUNT = 90
SMALL = STAGE.model_copy(update={"video_ratio": 0.0, "token_budget": 60})


@pytest.fixture(scope="module")
def content():
    return image(30, 40)


@pytest.fixture(scope="module")
def tars(tmp_path_factory, content):
    return write_tars(tmp_path_factory.mktemp("tars"), content)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder that was packed without splits."""
    folder = tmp_path_factory.mktemp("packed")
    pack(made.sidecars(tmp_path_factory.mktemp("files"), 40), folder, shard_mb=0.1)
    return folder


def write_tars(folder, content, shards=3):
    for shard in range(shards):
        own = [(f"{n:03d}", {"jpg": content, "txt": b"caption %d" % n}) for n in range(shard * 30, shard * 30 + 30)]
        write_tar(folder / f"{shard}.tar", own)
    return folder


def part(folder, split, share=0.3, **given):
    return SourceConfig(path=str(folder), name="here", split=split, hold_out=share, **given)


def evaluated(folder, split, share=0.3, ranks=1):
    """The keys that an evaluation reads, on one or several ranks."""
    source = part(folder, split, share)
    shards = find_shards([source])
    given = {"modality": "image", "resolution": SMALL.image.rule(), "video_frames": 2, "token_budget": 60}
    given |= {"tokenizer": None, "context_length": 8, "data": DataConfig(sources=[source], workers=0)}
    return [
        key
        for rank in range(ranks)
        for packs in eval_packs([source], **given, share=EvalShare(shards, rank, ranks))
        for key in packs.keys
    ]


def trained(folder, lanes=2, owned=(0, 1), steps=30, first=0, cursors=None, workers=0):
    data = DataConfig(sources=[part(folder, "train")], workers=workers, pool_samples=8)
    given = {"modality_of": lambda step: "image", "tokenizer": None, "context_length": 8}
    with PackLoader(data, SMALL, LaneSet(owned, lanes, 0, cursors, first), **given) as loader:
        return {(first + n, found.lane): found for n in range(steps) for found in next(loader)}


def keys_of(packs):
    return {key for found in packs.values() for key in found.keys}


@pytest.mark.parametrize("source", ["tars", "packed"])
def test_no_sample_is_in_both_parts_and_both_are_all(source, request):
    folder = request.getfixturevalue(source)
    count = COUNT if source == "tars" else 40
    train, test = evaluated(folder, "train"), evaluated(folder, "test")
    assert len({*train, *test}) == len(train) + len(test) == count
    assert 0.1 * count < len(test) < 0.5 * count
    assert sorted(evaluated(folder, "test", ranks=3)) == sorted(test)
    assert keys_of(trained(folder)) == set(train)


def test_a_larger_share_holds_out_the_same_samples_and_more(tars):
    found = [set(evaluated(tars, "test", share)) for share in (0.1, 0.3, 0.6)]
    assert found[0] < found[1] < found[2]


def test_more_samples_move_none(tars, content, tmp_path):
    before = set(evaluated(tars, "test"))
    write_tars(tmp_path / "more", content, shards=4)
    assert {key for key in evaluated(tmp_path / "more", "test") if not key.startswith("3/")} == before


def test_more_files_of_a_packed_folder_move_none_and_equal_files_are_in_one_part(tmp_path):
    """Their numbers in the shards change, and so do their keys."""

    def held_out(count, copies):
        folder = tmp_path / f"{count} {copies}"
        made.sidecars(folder, count)
        for number in range(copies):
            (folder / f"copy {number}.jpg").write_bytes((folder / f"{number}.jpg").read_bytes())
            (folder / f"copy {number}.txt").write_text("another caption")
        pack(folder, tmp_path / f"packed {count} {copies}", shard_mb=0.1)
        return {
            key.rpartition("/")[2].partition("-")[2]
            for key in evaluated(tmp_path / f"packed {count} {copies}", "test", 0.4)
        }

    few, more = held_out(12, 0), held_out(24, 12)
    assert {key for key in more if key.isdigit() and int(key) < 12} == few
    assert {key for key in more if key.startswith("copy")} == {f"copy_{key}" for key in few}
    assert 0 < len(few) < 12


@pytest.mark.parametrize("source", ["tars", "packed"])
def test_a_resumed_lane_reads_the_same_part(source, request):
    """From a cursor within a shard, whose manifest counts the samples of both parts."""
    folder = request.getfixturevalue(source)
    whole = trained(folder, steps=16)
    cursors = {lane: whole[4, lane].cursor for lane in (0, 1)}
    for lane in (0, 1):
        rest = trained(folder, owned=(lane,), steps=11, first=5, cursors={lane: cursors[lane]}, workers=lane)
        for place, found in rest.items():
            assert (found.keys, found.bad, found.cursor) == (whole[place].keys, {}, whole[place].cursor)


def test_another_share_is_other_data_for_a_cursor(tars):
    shards = [find_shards([part(tars, split, share)]) for split, share in (("train", 0.3), ("train", 0.2))]
    plain = find_shards([SourceConfig(path=str(tars), name="here")])
    assert len({fingerprint(found) for found in (*shards, plain)}) == 3
    saved = trained(tars, steps=2)[1, 0].cursor
    data = DataConfig(sources=[part(tars, "train", 0.2)], workers=0, pool_samples=8)
    given = {"modality_of": lambda step: "image", "tokenizer": None, "context_length": 8}
    with pytest.raises(DataError, match="sources have changed since the data cursor"):
        PackLoader(data, SMALL, LaneSet((0,), 2, 0, {0: saved}, 2), **given)


def test_other_ranks_build_the_same_parts_from_the_listing(tars):
    sources = [part(tars, "test")]
    shards = find_shards(sources)
    others = shards_of(listing_of(shards), sources, LOCAL)
    assert [one.hold_out for one in others] == [one.hold_out for one in shards] == [HoldOut(0.3, held_out=True)] * 3


def test_the_tokenizer_learns_no_caption_of_the_part_that_is_held_out(tars):
    held_out = {f"caption {int(key.rpartition('/')[2])}" for key in evaluated(tars, "test")}
    assert set(iterate_captions([part(tars, "train")], limit=1000)).isdisjoint(held_out)
    assert len(held_out) > 9


def test_verify_reads_both_parts_and_the_manifest_agrees(packed):
    report = verify([part(packed, "test")], progress=False)
    assert report["sound"]
    assert report["samples"] == 40


def test_a_share_that_holds_nothing_out_is_an_error_before_the_run(tars, packed):
    for folder in (tars, packed):
        shards = [find_shards([part(folder, split, 1e-6)]) for split in ("train", "test")]
        with pytest.raises(DataError, match=r"evaluation\.sources hold nothing to measure.* no sample"):
            check_contents(run_config(folder), *shards)


def test_data_with_splits_and_other_splits_are_refused(tars, tmp_path):
    made.table(tmp_path / "here")
    pack(tmp_path / "here/t.csv", tmp_path / "packed")
    with pytest.raises(DataError, match=r"is divided already, into test, train, .*leave it out"):
        find_shards([part(tmp_path / "packed", "test")])
    with pytest.raises(DataError, match=r"no split 'val'; hold_out divides it into train, test: name one of these"):
        find_shards([part(tars, "val")])


def test_the_error_for_a_missing_split_names_hold_out(packed):
    with pytest.raises(DataError, match=r"no split 'test'; it has train; .*divide it by hold_out"):
        find_shards([SourceConfig(path=str(packed), split="test")])


def test_parts_of_a_shard_that_overlap_are_found_however_the_paths_are_written(tars, tmp_path):
    (tmp_path / "link").symlink_to(tars)
    learned = part(tars, "train")
    for path, share, fits in (("link", 0.3, True), ("link/{0..1}.tar", 0.3, True), ("link/1.tar", None, False)):
        other = SourceConfig(path=str(tmp_path / path), split="test", hold_out=share)
        shards = [*find_shards([learned]), *find_shards([other])]
        with (
            nullcontext()
            if fits
            else pytest.raises(DataError, match=r"1\.tar is in sources with hold_out 0.3 and null")
        ):
            check_parts(shards)


@pytest.mark.parametrize(
    ("training", "evaluation", "message"),
    [
        ({"hold_out": 0.1}, {"split": "test"}, "have hold_out 0.1 and null"),
        ({"hold_out": 0.1}, {"split": "test", "hold_out": 0.2, "path": "a/"}, "have hold_out 0.1 and 0.2"),
        ({"hold_out": 0.1}, {"hold_out": 0.1}, "has hold_out and split train, .*give it split: test"),
        ({"hold_out": 1.0}, {}, "must be below 1"),
        ({"hold_out": 0.1, "split": None}, {}, "hold_out with split null would read both parts"),
    ],
)
def test_parts_that_would_overlap_are_errors_of_the_run_file(training, evaluation, message, tmp_path):
    from univitar_ds.config.load import check_config

    content = run_config("a").model_dump(mode="json", exclude_unset=True)
    content["data"]["sources"] = [{"path": "a", **training}]
    content["evaluation"] = {"sources": [{"path": "a", **evaluation}] if evaluation else []}
    with pytest.raises(ConfigError, match=message):
        check_config(content, "run.yaml")
