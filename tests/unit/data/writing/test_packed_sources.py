"""Sources of a run that are not shards are packed once, and read from there."""

import fcntl
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.support import datasets
from tests.support.datasets import write
from tests.support.packing import contents, spoil
from tests.support.runs import small_config
from univitar_ds.config.keys.unused import unused_parts
from univitar_ds.config.load import changed_result
from univitar_ds.data.caption_texts import iterate_captions
from univitar_ds.data.shards.sources import find_shards
from univitar_ds.data.writing import packed_sources
from univitar_ds.data.writing.packed_sources import with_packed_sources
from univitar_ds.data.writing.progress_log import LOCK
from univitar_ds.data.writing.writer import read_manifest
from univitar_ds.errors import DataError


def run_of(source, tmp_path, cache=None, **more):
    data = {"sources": [{"path": str(source), **more}], "cache": {"folder": cache and str(cache)}, "lanes": 1}
    return small_config(tmp_path, tmp_path / "runs", data=data)


def source_of(config):
    return config.data.sources[0]


def test_a_table_is_packed_once_and_keeps_its_name(tmp_path, caplog, monkeypatch):
    source = datasets.table(tmp_path / "source", "csv")
    caplog.set_level("INFO")
    config = run_of(source, tmp_path)
    packed = with_packed_sources(config)
    folder = source_of(packed).path
    assert os.path.dirname(folder) == str(tmp_path / "runs/packed-sources")
    assert read_manifest(folder)["counts"] == {"train": {"image": 2, "video": 1}}
    assert (source_of(packed).label, source_of(packed).split) == ("table.csv", "train")
    assert sorted(iterate_captions(packed.data.sources, limit=9)) == ["caption 0", "caption 1"]
    assert changed_result(config, packed) == []
    said = [record.getMessage() for record in caplog.records if "source " in record.getMessage()]
    assert said == [f"source {source} is a table; it is packed once, and then read from {folder}"]

    monkeypatch.setattr(packed_sources, "pack_folder", None)
    assert with_packed_sources(config) == packed
    assert with_packed_sources(packed) == packed
    assert "was packed before" in caplog.records[-1].getMessage()


def test_a_source_that_changes_is_packed_beside_the_earlier_one(tmp_path):
    source = datasets.class_folders(tmp_path / "source")
    before = source_of(with_packed_sources(run_of(source, tmp_path)))
    content = {path.name: path.read_bytes() for path in sorted(tmp_path.glob("runs/packed-sources/*/*"))}
    write(source, {"train/cat/0.jpg": datasets.image(9)})
    touched = source / "train/dog/1.jpg"
    after = source_of(with_packed_sources(run_of(source, tmp_path)))
    assert after.path != before.path
    os.utime(touched, ns=(0, 0))
    assert source_of(with_packed_sources(run_of(source, tmp_path))).path not in (before.path, after.path)
    old = {name: (tmp_path / before.path / name).read_bytes() for name in content}
    assert old == content
    assert read_manifest(after.path)["shards"] != read_manifest(before.path)["shards"]


def test_a_packing_that_was_interrupted_is_continued(tmp_path):
    source = datasets.class_folders(tmp_path / "source")
    config = run_of(source, tmp_path, cache=tmp_path / "cache")
    whole = source_of(with_packed_sources(config)).path
    manifest = read_manifest(whole)
    os.unlink(f"{whole}/manifest.json")
    spoil(source)  # files that were examined are not opened again
    assert source_of(with_packed_sources(config)).path == whole
    assert read_manifest(whole) == manifest


@pytest.mark.parametrize("harm", ["shard", "cut shard", "manifest"])
def test_a_packed_folder_that_lost_a_part_is_repaired_from_its_source(tmp_path, harm):
    config = run_of(datasets.class_folders(tmp_path / "source"), tmp_path)
    folder = Path(source_of(with_packed_sources(config)).path)
    before = contents(folder)
    damaged = next(folder.glob("train-*.tar")) if "shard" in harm else folder / "manifest.json"
    damaged.unlink() if harm == "shard" else os.truncate(damaged, 100)
    assert with_packed_sources(config, pack=False) == config
    assert source_of(with_packed_sources(config)).path == str(folder)
    assert contents(folder) == before


def test_two_runs_that_start_at_once_pack_a_source_once(tmp_path, caplog, monkeypatch):
    """The second one waits until the first one has packed, or has ended without."""
    config = run_of(datasets.class_folders(tmp_path / "source"), tmp_path)
    folder = Path(source_of(with_packed_sources(config)).path)
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    waited = packed_sources.wait_until_free
    caplog.set_level("INFO")
    endings = [lambda: None, lambda: manifest.write_bytes(content)]
    for written in endings:
        manifest.unlink()
        caplog.clear()
        lock = (folder / LOCK).open("a")
        fcntl.flock(lock, fcntl.LOCK_EX)

        def end_and_wait(out, written=written, lock=lock):
            with pytest.raises(BlockingIOError), (out / LOCK).open("a") as other:
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
            written()
            lock.close()
            waited(out)

        monkeypatch.setattr(packed_sources, "wait_until_free", end_and_wait)
        assert source_of(with_packed_sources(config)).path == str(folder)
        assert manifest.read_bytes() == content
        (level,) = [
            one.levelname for one in caplog.records if f"is packing it into {folder}; waiting" in one.getMessage()
        ]
        assert level == "INFO"


def test_a_packing_is_waited_for_as_long_as_it_lasts(tmp_path):
    with (tmp_path / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=packed_sources.wait_until_free, args=(tmp_path,))
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive()
    waiting.join()


def test_a_packing_that_has_just_begun_is_not_taken_for_other_content(tmp_path):
    config = run_of(datasets.class_folders(tmp_path / "source"), tmp_path)
    folder = Path(source_of(with_packed_sources(config)).path)
    shutil.rmtree(folder)
    write(folder, {".pack.jsonl.partial": ""})
    assert source_of(with_packed_sources(config)).path == str(folder)


def test_the_error_for_a_missing_packed_folder_has_a_remedy(tmp_path):
    packed = with_packed_sources(run_of(datasets.class_folders(tmp_path / "source"), tmp_path))
    shutil.rmtree(source_of(packed).path)
    with pytest.raises(DataError, match=r"no such file or folder; .*data\.sources\.N\.path=ORIGINAL"):
        find_shards(with_packed_sources(packed).data.sources)


def test_class_folders_take_the_class_names_of_their_source(tmp_path):
    source = datasets.class_folders(tmp_path / "source")
    write(tmp_path, {"names": "cat\ttabby\ndog\tterrier\n"})
    config = with_packed_sources(run_of(source, tmp_path, class_names=str(tmp_path / "names")))
    assert source_of(config).class_names is None
    assert read_manifest(source_of(config).path)["labels"]["train"] == {"tabby": 1, "terrier": 1}


def test_a_table_has_the_columns_of_its_source(tmp_path):
    write(tmp_path, datasets.images(1, "media/") | {"t.tsv": "where\ta\tb\tc\n0.jpg\tone\ttwo\tdev\n"})
    keys = {"image_key": "where", "caption_keys": ["a", "b"], "split_key": "c", "images": str(tmp_path / "media")}
    given = run_of(tmp_path / "t.tsv", tmp_path, table=keys, split="dev")
    config = with_packed_sources(given)
    assert changed_result(given, config) == []
    assert set(iterate_captions(config.data.sources, limit=9)) == {"one", "two"}
    assert source_of(config).table is None


def test_shards_are_read_as_they_are(tmp_path):
    tars = datasets.webdataset(tmp_path / "tars")
    write(tars, {"extracted/a/0.jpg": datasets.image(), "extracted/b/0.jpg": datasets.image()})
    for path in (tars, tars / "000.tar", f"{tars}/{{000..001}}.tar", tmp_path / "missing", "s3://bucket/x"):
        config = run_of(path, tmp_path)
        assert with_packed_sources(config) == config
    assert not (tmp_path / "runs").exists()


def test_errors_name_the_source(tmp_path):
    write(tmp_path, {"t.csv": "a,b\n"})
    with pytest.raises(
        DataError, match=r"data\.sources\.0: .*t\.csv has the columns a, b; .*data\.sources\.0\.table\.image_key"
    ):
        with_packed_sources(run_of(tmp_path / "t.csv", tmp_path))
    with pytest.raises(DataError, match=r"data\.sources\.0: pipe:.*cannot be used"):
        with_packed_sources(run_of("pipe:cat x.tar", tmp_path))
    with pytest.raises(DataError, match=r"not a table on this machine; .* remove data\.sources\.0\.table"):
        with_packed_sources(run_of(tmp_path / "x.tar", tmp_path, table={"image_key": "x"}))


def test_a_cache_folder_with_packed_sources_is_in_use(tmp_path):
    config = run_of(datasets.class_folders(tmp_path / "source"), tmp_path, cache=tmp_path / "cache")
    assert any("data.cache.folder" in line for line in unused_parts(config))
    packed = with_packed_sources(config)
    assert source_of(packed).path.startswith(f"{tmp_path}/cache/")
    assert not any("data.cache.folder" in line for line in unused_parts(packed))
    shutil.rmtree(tmp_path / "source")
    assert sum(shard.samples for shard in find_shards(packed.data.sources)) == 2


def test_splits_of_one_source_are_listed_packed_and_reported_once(tmp_path, caplog):
    source = datasets.class_folders(tmp_path / "source")
    caplog.set_level("INFO")
    listed = []

    def noted(path, options):
        listed.append(path)
        return packed_sources.read_source(path, options)

    both = [{"path": str(source), "split": split} for split in ("train", "val")]
    config = small_config(tmp_path, tmp_path / "runs", data={"sources": both[:1]}, evaluation={"sources": both[1:]})
    packed = with_packed_sources(config, read=noted)
    assert packed.data.sources[0].path == packed.evaluation.sources[0].path
    assert [packed.data.sources[0].split, packed.evaluation.sources[0].split] == ["train", "val"]
    assert listed == [str(source)]
    assert len([one for one in caplog.messages if one.startswith(f"source {source} ")]) == 1
