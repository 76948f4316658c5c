"""Conditions of sources: which samples they leave out, how these are counted, and that resumed runs repeat it."""

import json

import pytest

from tests.support.loading import STAGE, only_lane
from tests.support.shards import image, write_tar
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.loader import LaneSet, PackLoader, eval_packs
from univitar_ds.data.media.prober import probe_each
from univitar_ds.data.sampler.reader import numbered, read_entries
from univitar_ds.data.shards.index_cache import shard_samples
from univitar_ds.data.shards.samples import Sample, SizeRule
from univitar_ds.data.shards.sources import find_shards
from univitar_ds.data.tools.inspect import inspect, render
from univitar_ds.data.tools.verify import verify
from univitar_ds.errors import DataError

COUNT = 60
SMALL = STAGE.model_copy(update={"video_ratio": 0.0, "token_budget": 60})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of another producer: every sixth sample has no `score`, and some have a label but no caption."""
    path = tmp_path_factory.mktemp("scored")
    for shard in range(3):
        samples = []
        for n in range(shard, COUNT, 3):
            fields = {} if n % 6 == 5 else {"score": n / COUNT}
            texts = {"cls": b"1"} if n % 10 == 0 else {"txt": b"x" * (n + 1)}
            content = {"png": image(30 + n, 50, n, "PNG"), "json": json.dumps(fields).encode(), **texts}
            samples.append((f"{n:03d}", content))
        write_tar(path / f"{shard}.tar", samples)
    return path


def data_of(folder, where, *, templates=("a {}",), **options):
    source = SourceConfig(path=str(folder), name="scored", where=where, templates=list(templates))
    return DataConfig(sources=[source], workers=0, pool_samples=8, **options)


def an_epoch(folder, where, **options):
    """Numbers of the samples of at least an epoch, and the counts of those that were left out."""
    seen, filtered, bad = set(), {}, {}
    with only_lane(data_of(folder, where, **options), SMALL, "image") as packs:
        for _ in range(40):
            (pack,) = next(packs)
            seen |= {int(key.rpartition("/")[2]) for key in pack.keys}
            for rule, count in pack.filtered.items():
                filtered[rule] = filtered.get(rule, 0) + count
            bad.update(pack.bad)
    assert bad == {}
    return seen, filtered


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("json.score > 0.5", {n for n in range(COUNT) if n / COUNT > 0.5 and n % 6 != 5}),
        ("height >= 60 and width == 50", set(range(30, COUNT))),
        ("caption_length > 40", {n for n in range(40, COUNT) if n % 10}),
        ("label == '1'", set(range(0, COUNT, 10))),
        ("frames == 1 and duration_s == 0 and (height < 35 or json.score >= 0.9)", {0, 1, 2, 3, 4, 54, 55, 56, 57, 58}),
    ],
)
def test_only_samples_for_which_the_condition_is_true_are_read(folder, where, kept):
    seen, filtered = an_epoch(folder, where)
    assert seen == kept
    assert filtered
    assert all(rule.startswith(f"by where of scored ({where}") for rule in filtered)


def test_samples_that_lack_a_field_are_counted_under_a_rule_of_their_own(folder):
    _, filtered = an_epoch(folder, "json.score > 0.5")
    rules = {"by where of scored (json.score > 0.5)", "by where of scored (json.score > 0.5: no json.score)"}
    assert filtered.keys() == rules
    (lacking,) = (count for rule, count in filtered.items() if "no json" in rule)
    assert filtered["by where of scored (json.score > 0.5)"] > 2 * lacking > 0


def test_samples_that_are_left_out_do_not_count_as_damage(folder):
    """50 of 60 samples are left out, and `an_epoch` would end at the first bad one."""
    seen, _ = an_epoch(folder, "height >= 80", on_bad="fail", max_bad_per_thousand=0, max_bad_in_a_row=1)
    assert len(seen) == 10


def test_a_condition_that_is_true_for_no_sample_ends_the_run_with_the_rule(folder):
    rule = r"by where of scored \(json\.scoer > 0\.5: no json\.scoer\)"
    with (
        only_lane(data_of(folder, "json.scoer > 0.5"), SMALL, "image") as packs,
        pytest.raises(DataError, match=rf"none of the 3 shards has a readable image sample \(left out: \d+ {rule}\)"),
    ):
        next(packs)


def packs_of(folder, lanes, first, steps, cursors=None, workers=0):
    data = data_of(folder, "json.score > 0.3").model_copy(update={"workers": workers})
    given = {"modality_of": lambda step: "image", "tokenizer": None, "context_length": 8}
    with PackLoader(data, SMALL, LaneSet(lanes, 2, 0, cursors, first), **given) as loader:
        return {(first + n, pack.lane): pack for n in range(steps) for pack in next(loader)}


def test_resumed_runs_on_other_ranks_and_workers_leave_out_the_same_samples(folder):
    whole = packs_of(folder, (0, 1), 0, 12)
    cursors = {lane: whole[4, lane].cursor for lane in (0, 1)}
    for lane, workers in ((0, 1), (1, 0)):
        rest = packs_of(folder, (lane,), 5, 7, {lane: cursors[lane]}, workers)
        for place, pack in rest.items():
            assert (pack.keys, pack.filtered, pack.cursor) == (
                whole[place].keys,
                whole[place].filtered,
                whole[place].cursor,
            )
    assert sum(sum(pack.filtered.values()) for pack in whole.values()) > 20


def test_samples_that_their_texts_leave_out_are_not_probed(folder):
    source = SourceConfig(path=str(folder), name="scored", where="json.score > 0.9 and height > 85", templates=["a {}"])
    probed = []

    def noted(media):
        probed.extend(media)
        return probe_each(media)

    found = []
    for shard in find_shards([source]):
        entries = numbered(shard_samples(shard, "image"))
        rule = SizeRule("image", SMALL.image.rule(), 1, 60, 10**6)
        found += [one for _, _, one in read_entries(shard, entries, rule, noted)]
    assert len(found) == COUNT
    assert [one.key for one in found if isinstance(one, Sample)] == ["057", "058", "056"]
    assert len(probed) == 4


def test_an_evaluation_leaves_them_out_and_counts_them(folder):
    source = SourceConfig(path=str(folder), name="scored", where="json.score > 0.9")
    given = {"modality": "image", "resolution": SMALL.image.rule(), "video_frames": 2, "token_budget": 60}
    packs = list(eval_packs([source], **given, tokenizer=None, context_length=8, data=data_of(folder, None)))
    assert {int(key.rpartition("/")[2]) for pack in packs for key in pack.keys} == {55, 56, 57, 58}
    assert sum(sum(pack.filtered.values()) for pack in packs) == COUNT - 4


def test_inspect_counts_them_by_rule_and_verify_reads_them_all(folder):
    data = data_of(folder, "height >= 60")
    result = inspect(RunConfig(name="r", data=data.model_copy(update={"lanes": 1}), stages=[SMALL]), packs=5)
    (stream,) = result.to_json()["streams"]
    rule = "by where of scored (height >= 60)"
    assert stream["filtered"].keys() == {rule}
    assert f"  filtered       {stream['filtered'][rule]} {rule}\n" in render(result)
    report = verify(data.sources, progress=False)
    assert report["sound"]
    assert report["samples"] == COUNT
