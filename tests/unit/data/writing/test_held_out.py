"""Samples that are held out while data are packed: by their content, at least one, and never all."""

from pathlib import Path

import pytest

from tests.support import datasets
from tests.support.datasets import write
from tests.support.packing import pack, samples_of
from tests.support.runs import small_config
from tests.unit.drafting import made
from univitar_ds.data.shards.hold_out import number_of
from univitar_ds.data.shards.sources import find_shards
from univitar_ds.data.writing.held_out import held_out
from univitar_ds.data.writing.packed_sources import with_packed_sources
from univitar_ds.errors import DataError

NAMES = [str(number) for number in range(400)]


def splits_of(out, manifest):
    found: dict[str, set[str]] = {}
    for file, members in samples_of(Path(out), manifest).items():
        found.setdefault(members["shard"].partition("-")[0], set()).add(file)
    return found


def test_a_share_is_held_out_and_more_files_change_none():
    some, all_of_them = (held_out(dict.fromkeys(names, ()), 0.1) for names in (NAMES[:200], NAMES))
    assert some == all_of_them & set(NAMES[:200])
    assert 20 <= len(all_of_them) <= 60


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_at_least_one_is_held_out_and_at_least_one_is_not(share, count):
    assert 1 <= len(held_out(dict.fromkeys(NAMES[:count], ()), share)) < count


def test_a_single_sample_is_trained_on():
    assert held_out({"0": ()}, 0.999) == set()


@pytest.mark.parametrize("share", [1e-9, 0.2, 0.9])
def test_a_class_of_two_keeps_one_to_train_on(share):
    classes = {name: {(None, f"class {int(name) // 2}")} for name in NAMES}
    chosen = held_out(classes, share)
    for first, second in zip(NAMES[::2], NAMES[1::2], strict=True):
        assert {first, second} - chosen
    assert chosen


def test_the_only_one_held_out_of_small_data_leaves_its_class_in_training():
    lowest = min(NAMES[:9], key=number_of)
    classes = {name: {("set", "alone" if name == lowest else "many")} for name in NAMES[:9]}
    (chosen,) = held_out(classes, 1e-9)
    assert chosen != lowest


@pytest.mark.parametrize("form", ["folder", "classes", "imagefolder", "csv", "parquet", "webdataset"])
def test_packing_divides_each_form_without_splits(form, tmp_path):
    source = tmp_path / "source"
    if form == "folder":
        made.sidecars(source, 12)
    elif form == "classes":
        write(source, {f"{made.COLOURS[i % 3]}/{i}.jpg": made.image(i) for i in range(12)})
    elif form == "webdataset":
        datasets.webdataset(source)
    else:
        rows = [{"file_name": f"{i}.jpg", "text": f"a thing {i}"} for i in range(12)]
        write(source, {f"{i}.jpg": made.image(i) for i in range(12)})
        if form == "parquet":
            source = datasets.parquet(source / "t.parquet", rows)
        elif form == "imagefolder":
            write(source, {"metadata.jsonl": datasets.lines(*rows)})
        else:
            text = "".join(f"{row['file_name']},{row['text']}\n" for row in rows)
            source = write(source, {"t.csv": f"file_name,text\n{text}"}) / "t.csv"
    whole = pack(source, tmp_path / "whole")
    (files,) = splits_of(tmp_path / "whole", whole).values()
    parts = splits_of(tmp_path / "parts", pack(source, tmp_path / "parts", hold_out=0.25))
    assert parts.keys() == {"train", "test"}
    assert parts["train"].isdisjoint(parts["test"])
    assert parts["train"] | parts["test"] == files
    again = splits_of(tmp_path / "parts", pack(source, tmp_path / "parts", hold_out=0.25))
    assert again == parts


def test_rows_with_the_same_image_are_on_one_side(tmp_path):
    """As in a table of the hub with one row for each caption."""
    rows = [
        {"image": {"bytes": datasets.image(i // 2), "path": None}, "label": 0, "caption": f"caption {i}"}
        for i in range(24)
    ]
    table = datasets.embedded(tmp_path / "t.parquet", rows, ["thing"])
    parts = splits_of(tmp_path / "out", pack(table, tmp_path / "out", hold_out=0.3))
    sides = [{int(Path(name).name) // 2 for name in files} for files in parts.values()]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == set(range(12))


@pytest.mark.parametrize(
    ("source", "share", "message"),
    [
        (datasets.class_folders, 0.1, r"is divided already, into train, val, .*leave it out"),
        (made.sidecars, 1.0, r"--hold-out 1\.0: give a share .* such as 0\.05"),
        (made.sidecars, float("nan"), r"--hold-out nan: "),
    ],
)
def test_data_with_splits_and_other_shares_are_refused(source, share, message, tmp_path):
    with pytest.raises(DataError, match=message):
        pack(source(tmp_path / "source"), tmp_path / "out", hold_out=share)
    assert not (tmp_path / "out/manifest.json").exists()


def run_of(source, tmp_path, share):
    about = {"path": str(source), **({} if share is None else {"hold_out": share})}
    sources = {"data": {"sources": [about], "lanes": 1}, "evaluation": {"sources": [{**about, "split": "test"}]}}
    return small_config(tmp_path, tmp_path / "runs", **sources)


def test_a_run_packs_both_parts_once_and_another_share_apart(tmp_path):
    source = made.sidecars(tmp_path / "source", 20)
    found = {}
    for share in (0.2, 0.5):
        packed = with_packed_sources(run_of(source, tmp_path, share))
        (train,), (test,) = packed.data.sources, packed.evaluation.sources
        assert train.path == test.path
        assert train.hold_out is None
        assert with_packed_sources(packed) == packed
        counts = [sum(shard.samples for shard in find_shards([one])) for one in (train, test)]
        assert sum(counts) == 20
        found[train.path] = counts[1]
    assert len(found) == 2
    assert min(found.values()) < max(found.values())


def test_a_run_on_data_with_splits_is_refused_with_the_place(tmp_path):
    source = datasets.class_folders(tmp_path / "source")
    with pytest.raises(DataError, match=r"data\.sources\.0: .* is divided already"):
        with_packed_sources(run_of(source, tmp_path, 0.2))
    assert not (tmp_path / "runs").exists()
