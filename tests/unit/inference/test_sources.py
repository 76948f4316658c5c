"""Units cover every item once in the same order, from any start and with any sizes of parts and units."""

import os
from itertools import takewhile
from pathlib import Path

import pytest

from tests.support.s3 import BUCKET, faulty, s3_server
from tests.support.shards import image, write_demo_shards, write_tar
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import ConfigError, DataError
from univitar_ds.inference.sources import Position, Unit, count_items, find_places, fingerprint_of, units


def scattered_files(folder: Path) -> Path:
    for name in ("b/2.JPG", "b/1.png", "a.mp4", "c.txt", ".hidden.png", ".cache/x.png", "z.webp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def items_of(found: list[Unit]) -> list[tuple]:
    """The files of units, and the bytes of their shards that touch each other as one range."""
    items: list[tuple] = []
    for unit in found:
        items += [(file,) for file in unit.files]
        if unit.shard is not None:
            if items and items[-1][0] == unit.shard.name and items[-1][2] == unit.start:
                items[-1] = (unit.shard.name, items[-1][1], unit.end)
            else:
                items.append((unit.shard.name, unit.start, unit.end))
    return items


def test_a_folder_gives_its_media_and_those_of_its_folders_by_name(tmp_path):
    scattered_files(tmp_path / "f")
    os.symlink(tmp_path / "f", tmp_path / "f" / "b" / "circle")
    (places,) = find_places([str(tmp_path / "f")])
    assert [os.path.relpath(path, tmp_path / "f") for path in places] == ["a.mp4", "z.webp", "b/1.png", "b/2.JPG"]


def test_a_folder_on_s3_gives_the_same_files_in_the_same_order_for_one_listing_each(tmp_path):
    folder = scattered_files(tmp_path / "f")
    with s3_server() as server, faulty(server, lambda request: None) as proxy:
        for path in folder.rglob("*"):
            if path.is_file():
                server.put(f"p/{path.relative_to(folder)}", path.read_bytes())

        def settings(session: str) -> StorageSettings:
            """Those of a process of its own."""
            (tmp_path / session).mkdir(exist_ok=True)
            return StorageSettings(proxy.url, session=str(tmp_path / session))

        place = f"s3://{BUCKET}/p"
        (places,) = find_places([f"{place}/", f"{place}/a.mp4"], settings("one"))
        assert [path.removeprefix(f"{place}/") for path in places] == ["a.mp4", "z.webp", "b/1.png", "b/2.JPG"]
        before = fingerprint_of([places], settings("one"))
        assert [request.query.partition("list-type")[1] for request in proxy.requests] == ["list-type"] * 2
        assert fingerprint_of([places], settings("two")) == before
        server.put("p/b/1.png", b"y")
        assert fingerprint_of([places], settings("three")) != before
        gone = (f"{place}/gone.png",)
        assert fingerprint_of([gone], settings("three")) == fingerprint_of([gone], settings("two"))
        server.put("p/b/x.tar", b"")
        with pytest.raises(ConfigError, match=r"holds shards \(x.tar\) beside images or videos \(1.png\)"):
            find_places([f"{place}/b"], settings("three"))
        server.delete("p/b/1.png")
        server.delete("p/b/2.JPG")
        assert [one.name for one in find_places([f"{place}/b"], settings("three"))] == ["x"]
        with pytest.raises(ConfigError, match="/none holds no image, video or tar; name another folder"):
            find_places([f"{place}/none"], settings("three"))


def test_sources_keep_their_order(tmp_path):
    scattered_files(tmp_path / "f")
    write_demo_shards(tmp_path / "s", images=8, videos=4, shards=1)
    write_tar(tmp_path / "t" / "x.tar", [("k", {"png": image(28, 28)})])
    named = [str(tmp_path / name) for name in ("f/z.webp", "s", "f/b", "t/x.tar")]
    found = find_places(named)
    names = [place if isinstance(place, tuple) else place.name for place in found]
    assert names[0] == (named[0],)
    assert names[1:5] == ["0:train-image-000000", "0:test-image-000000", "0:train-video-000000", "0:test-video-000000"]
    assert names[5:] == [(f"{named[2]}/1.png", f"{named[2]}/2.JPG"), "1:x"]
    assert count_items(found) is None
    assert count_items(find_places(named[:3])) == 1 + 8 + 2 + 4 + 1 + 2
    assert [place.name for place in find_places(named[1:2], split="test")] == [
        "test-image-000000",
        "test-video-000000",
    ]


@pytest.mark.parametrize("names", [["nowhere"], ["nowhere.jpg"], ["empty"]])
def test_a_source_that_is_missing_or_empty_is_refused(tmp_path, names):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no such file or folder|holds no image"):
        find_places([str(tmp_path / name) for name in names])


def test_shards_beside_images_are_refused(tmp_path):
    write_tar(tmp_path / "x.tar", [("k", {"png": image(28, 28)})])
    (tmp_path / "y.png").write_bytes(image(28, 28))
    with pytest.raises(ConfigError, match="beside images"):
        find_places([str(tmp_path)])
    with pytest.raises(DataError, match="missing"):
        find_places([str(tmp_path / "{a,x}.tar")])


@pytest.mark.parametrize(("part_items", "unit_items"), [(100, 100), (5, 100), (7, 3), (3, 3), (1, 2)])
def test_units_cover_every_item_once_and_begin_anywhere(tmp_path, part_items, unit_items):
    scattered_files(tmp_path / "f")
    write_demo_shards(tmp_path / "s", images=9, videos=4, shards=2)
    places = find_places([str(tmp_path / "f"), str(tmp_path / "s"), str(tmp_path / "f" / "b" / "1.png")])
    whole = list(units(places, part_items, unit_items, Position(), 0))
    at_once = list(units(places, 1000, 1000, Position(), 0))
    assert items_of(whole) == items_of(at_once)
    total = count_items(places)
    assert [unit.part for unit in whole][-1] == (total - 1) // part_items
    assert [unit.number for unit in whole] == list(range(len(whole)))
    for part in range(1, whole[-1].part + 1):
        start = [unit.after for unit in whole if unit.part == part - 1][-1]
        rest = list(units(places, part_items, unit_items, start, part))
        assert items_of(rest) == items_of([unit for unit in whole if unit.part >= part])
        assert [unit.part for unit in rest] == [unit.part for unit in whole if unit.part >= part]
    assert list(units(places, part_items, unit_items, whole[-1].after, 9)) == []


def test_the_units_of_a_part_have_its_number_of_items(tmp_path):
    scattered_files(tmp_path / "f")
    places = find_places([str(tmp_path / "f")])
    counts = [len(unit.files) for unit in units(places, 3, 2, Position(), 0)]
    assert counts == [2, 1, 1]


def test_an_empty_tar_is_a_unit(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    (unit,) = takewhile(lambda unit: unit.number < 3, units(find_places([str(tmp_path)]), 3, 2, Position(), 0))
    assert (unit.start, unit.end, unit.after) == (0, 0, (1, 0))


def test_the_fingerprint_changes_with_the_files(tmp_path):
    scattered_files(tmp_path / "f")
    source = [str(tmp_path / "f")]
    before = fingerprint_of(find_places(source))
    assert fingerprint_of(find_places(source)) == before
    (tmp_path / "f" / "z.webp").write_bytes(b"xy")
    changed = fingerprint_of(find_places(source))
    (tmp_path / "f" / "b" / "1.png").unlink()
    assert len({before, changed, fingerprint_of(find_places(source))}) == 3


def test_a_file_that_several_sources_name_is_taken_once(tmp_path):
    folder = scattered_files(tmp_path / "f")
    named = [f"{folder}/z.webp", str(folder), f"{folder}/b/../z.webp", f"{folder}/b"]
    (place,) = find_places(named)
    assert [os.path.relpath(path, folder) for path in place] == ["z.webp", "a.mp4", "b/1.png", "b/2.JPG"]
