"""The labels of sources: all that occur, or all names of a file."""

import json
from pathlib import Path

from tests.support.shards import image, write_tar
from univitar_ds.config.data import SourceConfig
from univitar_ds.data import labels
from univitar_ds.data.labels import iterate_labels


def tar(path: Path, texts: list[dict[str, bytes]]) -> SourceConfig:
    content = image(20, 20)
    write_tar(path, [(f"s{number:03d}", {"jpg": content, **members}) for number, members in enumerate(texts)])
    return SourceConfig(path=str(path))


def said(**fields) -> dict[str, bytes]:
    return {"json": json.dumps(fields).encode()}


def test_every_label_is_found_with_its_set_also_in_the_last_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "NAMED_SAMPLES", 1)
    one = tar(tmp_path / "a.tar", [said(label="cat", set="pets"), {"cls": b"7"}, {"txt": b"a caption"}, {"json": b"{"}])
    two = tar(tmp_path / "b.tar", [said(label="cat"), said(label="cat", set="pets"), said(label="last", caption="c")])
    assert set(iterate_labels([one, two])) == {("pets", "cat"), (None, "7"), (None, "cat"), (None, "last")}


def test_class_names_are_all_names_of_the_file_for_each_set_that_occurs(tmp_path):
    (tmp_path / "names.txt").write_text("tench\nshark\nhen\n")
    bare = tar(tmp_path / "a.tar", [{"cls": b"1"}, {"cls": b"1"}, {"cls": b"99"}])
    named = bare.model_copy(update={"class_names": str(tmp_path / "names.txt")})
    assert set(iterate_labels([named])) == {(None, "tench"), (None, "shark"), (None, "hen")}
    sets = tar(tmp_path / "b.tar", [said(label=0, set="fish"), said(label="hen", set="birds")])
    sets = sets.model_copy(update={"class_names": str(tmp_path / "names.txt")})
    assert set(iterate_labels([sets])) == {(name, c) for name in ("fish", "birds") for c in ("tench", "shark", "hen")}
    assert ("birds", "tench") in set(iterate_labels([named, sets]))
