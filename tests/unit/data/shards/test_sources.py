"""Finding the shards of local sources, and the errors for sources without usable shards."""

import json
import os
import re
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.support.progress import WHOLE_S
from tests.support.shards import image, write_demo_shards, write_tar
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.loader import LaneSet, PackLoader
from univitar_ds.data.shards import sources
from univitar_ds.data.shards.class_names import read_class_names
from univitar_ds.data.shards.listing import Shard, expand_braces
from univitar_ds.data.shards.manifest import PROGRESS_FILE
from univitar_ds.data.shards.sources import (
    ShardGroup,
    find_shards,
    fingerprint,
    groups_of,
    of_modality,
    validate_sources,
)
from univitar_ds.data.storage.base import LOCAL, StorageSettings
from univitar_ds.data.tools.verify import verify
from univitar_ds.errors import DataError


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_demo_shards(tmp_path_factory.mktemp("packed"), images=9, videos=3, shards=2)


def source(path, split="train", **options):
    return SourceConfig(path=str(path), split=split, **options)


def stage(video_ratio=0.0, **options):
    return StageConfig(name="s", samples=10, lr=1e-3, video_ratio=video_ratio, **options)


def bare(folder, n):
    for index in range(n):
        content = {"png": image(14, 14, form="PNG"), "txt": f"caption {index}".encode()}
        write_tar(folder / f"a-{index:03d}.tar", [(f"k{index}", content)])
    return folder


def test_a_packed_folder_lists_the_shards_of_its_split_with_modality_and_size(packed):
    shards = find_shards([source(packed)])
    assert [(shard.name, shard.modality) for shard in shards] == [
        ("train-image-000000", "image"),
        ("train-image-000001", "image"),
        ("train-video-000000", "video"),
        ("train-video-000001", "video"),
    ]
    assert all(shard.size == os.path.getsize(shard.path) and shard.sha256 for shard in shards)
    assert of_modality(shards, "video") == [2, 3]
    assert len(find_shards([source(packed, None)])) == 6


def test_tars_without_a_manifest_may_hold_either_modality(tmp_path):
    bare(tmp_path, 3)
    for path in (tmp_path, tmp_path / "a-{000..002}.tar"):
        shards = find_shards([source(path)])
        assert [shard.name for shard in shards] == ["a-000", "a-001", "a-002"]
        assert of_modality(shards, "image") == of_modality(shards, "video") == [0, 1, 2]
    assert [shard.name for shard in find_shards([source(tmp_path / "a-001.tar")])] == ["a-001"]


def test_shards_of_several_sources_have_different_names(packed):
    shards = find_shards([source(packed), source(packed)])
    assert len({shard.name for shard in shards}) == 8
    assert shards[4].name == "1:train-image-000000"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar"]),
        ("{x,y}-{0..1}", ["x-0", "x-1", "y-0", "y-1"]),
    ],
)
def test_brace_ranges_expand_with_leading_zeros(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "message"), [("a-{3..1}", r"runs backwards; write \{1..3\}"), ("{0..999}{0..9999}", "narrow the range")]
)
def test_a_descending_or_too_large_range_is_an_error(pattern, message):
    with pytest.raises(DataError, match=message):
        expand_braces(pattern)


@pytest.mark.parametrize("typo", ["{000...001}", "{0..}", "{a..c}", "{000..010..2}", "{0}"])
def test_the_error_for_invalid_braces_shows_valid_ones(typo):
    with pytest.raises(DataError, match=r"is neither a range nor a list; write \{000\.\.127\}"):
        expand_braces(f"s3://b/{typo}.tar")


def test_shards_with_the_same_file_name_in_several_folders_get_different_names(tmp_path):
    for folder, count in (("a", 30), ("b", 50)):
        samples = [(f"k{n}", {"png": image(30, 30, n, "PNG"), "txt": folder.encode()}) for n in range(count)]
        write_tar(tmp_path / folder / "000.tar", samples)
    given = SourceConfig(path=f"{tmp_path}/{{a,b}}/000.tar")
    assert [shard.name for shard in find_shards([given])] == ["a/000", "b/000"]
    data = DataConfig(sources=[given], workers=0, pool_samples=8, lanes=4)
    sizes = {"min_tokens": 4, "max_tokens": 16, "divisor_px": 28}
    stage = StageConfig(name="s", samples=10**6, lr=1e-3, token_budget=64, image=sizes)
    seen = Counter()
    with PackLoader(
        data, stage, LaneSet(range(4), 4, 0), modality_of=lambda step: "image", tokenizer=None, context_length=8
    ) as packs:  # fmt: skip
        for _ in range(30):
            seen.update(key for pack in next(packs) for key in pack.keys)
    assert set(seen) == {f"a/000/k{n}" for n in range(30)} | {f"b/000/k{n}" for n in range(50)}


def test_a_shard_twice_in_a_source_is_an_error_and_one_in_two_sources_a_warning(tmp_path, caplog):
    write_tar(tmp_path / "000.tar", [("k", {"txt": b"x"})])
    with pytest.raises(DataError, match=r"names shard .*000\.tar more than once"):
        find_shards([SourceConfig(path=f"{tmp_path}/{{000,000}}.tar")])
    find_shards([SourceConfig(path=str(tmp_path / "000.tar")), SourceConfig(path=str(tmp_path))])
    assert "1 shards are in several sources" in caplog.text


def test_the_error_for_a_missing_shard_of_a_range_names_it(tmp_path):
    bare(tmp_path, 3)
    with pytest.raises(DataError, match=r"shard .*a-003.tar is missing \(2 of 5 are\)"):
        find_shards([source(tmp_path / "a-{000..004}.tar")])


def test_the_error_for_an_absent_split_lists_the_existing_ones(packed):
    with pytest.raises(DataError, match="has no split 'val'; it has test, train"):
        find_shards([source(packed, "val")])


def test_the_error_for_an_empty_folder_mentions_data_pack(tmp_path):
    with pytest.raises(DataError, match=r"no shard .*univitar-ds data pack"):
        find_shards([source(tmp_path)])


def test_files_that_look_like_shards_but_are_left_out_cause_warnings(tmp_path, caplog, packed):
    bare(tmp_path, 2)
    for name in ("b.TAR", "c.tar.part", "notes.txt", "a.tar.json"):
        (tmp_path / name).write_bytes(b"")
    assert len(find_shards([source(tmp_path)])) == 2
    assert "b.TAR (2 in all) do not end in .tar and are left out" in caplog.text
    other = write_demo_shards(tmp_path / "packed", images=4, videos=0, shards=1)
    (other / "stray.tar").write_bytes(b"")
    find_shards([source(other)])
    assert "its manifest does not list stray.tar (1 in all), which are left out" in caplog.text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("a/*.tar", "cannot be used as a pattern; name the folder"),
    ],
)
def test_addresses_without_a_bucket_and_wildcards_are_errors(path, message):
    with pytest.raises(DataError, match=message):
        find_shards([source(path)])


def test_additional_slashes_at_the_end_of_a_path_are_ignored(packed):
    assert len(find_shards([source(f"{packed}//")])) == len(find_shards([source(packed)]))


def test_compressed_tars_are_an_error_or_a_warning_if_there_are_others(tmp_path, caplog):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 tars are compressed, such as a\.tar\.gz; .*: decompress first"):
        find_shards([source(tmp_path)])
    with pytest.raises(DataError, match=r"a\.tar\.gz: is a compressed tar; .*: decompress first"):
        find_shards([source(tmp_path / "a.tar.gz")])
    bare(tmp_path, 2)
    assert len(find_shards([source(tmp_path)])) == 2
    assert "a.tar.gz; samples are read from the middle of shards: decompress first; they are left out" in caplog.text


def test_a_folder_whose_packing_was_not_completed_is_an_error(tmp_path):
    bare(tmp_path, 2)
    (tmp_path / PROGRESS_FILE).write_text("")
    with pytest.raises(DataError, match="its packing did not end"):
        find_shards([source(tmp_path)])


def test_the_error_for_a_missing_path_or_another_file_names_it(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(DataError, match="nowhere: there is no such file or folder"):
        find_shards([source(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"neither a folder nor a \.tar file"):
        find_shards([source(tmp_path / "x.zip")])
    with pytest.raises(DataError, match="a brace range must name tars"):
        find_shards([source(tmp_path / "a-{0..1}")])


def test_a_missing_or_truncated_shard_is_an_error_of_the_listing(tmp_path):
    folder = write_demo_shards(tmp_path, images=4, videos=0, shards=1)
    path = folder / "train-image-000000.tar"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 1024)
    with pytest.raises(DataError, match=rf"has {size - 1024} bytes, its manifest says {size}"):
        find_shards([source(folder)])
    path.unlink()
    with pytest.raises(DataError, match=r"shard train-image-000000.tar of its manifest is missing"):
        find_shards([source(folder)])


def test_a_run_with_videos_needs_a_source_with_videos(tmp_path):
    folder = write_demo_shards(tmp_path, images=4, videos=0, shards=1)
    assert len(validate_sources([source(folder)], [stage()])) == 1
    with pytest.raises(
        DataError, match=r"needs video samples, but the sources .* hold only image samples; .*video_ratio"
    ):
        validate_sources([source(folder)], [stage(), stage(0.5)])


def test_the_sources_with_a_weight_must_hold_every_modality_of_the_stage(tmp_path, packed):
    images = write_demo_shards(tmp_path / "images", images=4, videos=0, shards=1)
    sources = [source(images, name="images"), source(packed, name="packed")]
    validate_sources(sources, [stage(0.5), stage(0.5, weights={"images": 1, "packed": 1})])
    with pytest.raises(
        DataError, match=r"stage s needs video samples, but the sources that its weights name \(images\) hold none"
    ):
        validate_sources(sources, [stage(weights={"images": 1}), stage(0.5, weights={"images": 1, "packed": 0})])


def test_shards_have_the_name_and_templates_of_their_source(packed):
    shards = find_shards([source(packed), source(packed, name="again", templates=["a {}", "the {}"])])
    found = {(shard.source, shard.templates) for shard in shards}
    assert found == {(packed.name, ()), ("again", ("a {}", "the {}"))}
    images, videos = (groups_of(shards, modality, {"again": 3}) for modality in ("image", "video"))
    assert [(group.name, group.shards) for group in images + videos] == [("again", (4, 5)), ("again", (6, 7))]
    assert groups_of(shards, "video", {}) == [ShardGroup("", 1, (2, 3, 6, 7))]


def test_remote_sources_are_listed_concurrently(monkeypatch):
    together = threading.Barrier(4)

    def listed(source, prefix, settings):
        together.wait(timeout=WHOLE_S)
        return [Shard(f"{prefix}a", f"{source.path}/a.tar", None, 512, "image")]

    monkeypatch.setattr(sources, "list_shards", listed)
    found = find_shards([SourceConfig(path=f"s3://bucket/{name}") for name in "dbca"], StorageSettings())
    assert [(shard.name, shard.path) for shard in found] == [
        (f"{number}:a", f"s3://bucket/{name}/a.tar") for number, name in enumerate("dbca")
    ]


def test_the_fingerprint_depends_on_names_sizes_and_hashes_but_not_on_the_location(tmp_path, packed):
    here = fingerprint(find_shards([source(packed)]))
    moved = tmp_path / "moved"
    moved.symlink_to(packed)
    assert fingerprint(find_shards([source(moved)])) == here
    assert fingerprint(find_shards([source(packed, "test")])) != here
    other = write_demo_shards(tmp_path / "other", images=9, videos=3, shards=2)
    assert fingerprint(find_shards([source(other)])) == here
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert fingerprint(find_shards([source(other)])) != here


def test_the_fingerprint_of_tars_without_a_manifest_depends_on_their_first_bytes(tmp_path, monkeypatch):
    folder = bare(tmp_path, 5)
    here = fingerprint(find_shards([source(folder)]))
    shard = folder / "a-003.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b"caption 3", b"another 3"))
    shards = find_shards([source(folder)])
    assert fingerprint(shards) != here
    monkeypatch.setattr(sources, "SPOT_CHECKS", 2)  # of numbers 0 and 2
    before = fingerprint(shards)
    shard.write_bytes(whole)
    assert fingerprint(find_shards([source(folder)])) == before
    monkeypatch.undo()
    assert fingerprint(find_shards([source(folder)])) == here
    for path in folder.iterdir():
        path.unlink() if path != shard else path.write_bytes(b"")
    fingerprint(find_shards([source(folder)]))  # an empty shard is no error


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a.tar::b.tar", "a.tar::b.tar: WebDataset's :: between shards cannot be used; .*separate source"),
        ("s3://b/a.tar::s3://b/c.tar", "WebDataset's :: between shards cannot be used"),
        ("pipe:curl -s https://h/a.tar", "WebDataset's pipe: cannot be used.*copy the shards to a disk or an S3 store"),
        ("pipe:aws s3 cp s3://b/a.tar -", "WebDataset's pipe: cannot be used.*; give s3://b/a.tar"),
        ("pipe:gunzip < a.tar.gz", "WebDataset's pipe: cannot be used"),
        ("gs://bucket/a.tar", "cannot read from gs://.*S3-compatible store"),
        ("hf://datasets/a/b/{000..003}.tar", "cannot read from hf://.*hf download"),
        ("https://host/a.tar", "cannot read from https://.*download the shards first"),
        ("file:///data/a.tar", "cannot read from file://.*leave file:// out"),
    ],
)
def test_addresses_that_only_other_loaders_support_are_errors_with_a_remedy(path, message):
    with pytest.raises(DataError, match=message):
        find_shards([SourceConfig(path=path)])
    report = verify([SourceConfig(path=path)], progress=False)
    assert re.search(message, report["sources"][0]["error"])
    assert not report["sound"]
    if "::" not in path:
        with pytest.raises(DataError, match=message):
            read_class_names(path, LOCAL)


def test_names_of_existing_files_may_contain_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a::b.tar", "pipe:c.tar"):
        write_tar(Path(name), [("k", {"txt": b"t"})])
        assert [shard.path for shard in find_shards([SourceConfig(path=name)])] == [name]
