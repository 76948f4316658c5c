"""Readers that plugins register: their rows, detection by name, and errors."""

from pathlib import Path

import pytest
from PIL import Image

from univitar_ds.config.schema import RunConfig
from univitar_ds.data.importing.recognise import format_of, read_source
from univitar_ds.data.importing.rows import ReadOptions
from univitar_ds.data.writing.packed_sources import with_packed_sources
from univitar_ds.errors import DataError, PluginError
from univitar_ds.plugins import load_plugins

HEAD = "from univitar_ds.plugins import register_reader\n"


@pytest.fixture(autouse=True)
def forgotten():
    yield
    load_plugins(())


@pytest.fixture
def photos(tmp_path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 30), "red").save(tmp_path / name)
    (tmp_path / "all.lst").touch()
    return tmp_path


def loaded(folder: Path, body: str, about: str = "suffix='.lst'", name: str = "mine") -> None:
    text = f"{HEAD}@register_reader('{name}', {about})\ndef rows(source, options):\n" + body
    (folder / "plugin.py").write_text(text, encoding="utf-8")
    load_plugins([str(folder / "plugin.py")])


def read(source, **options):
    return read_source(source, ReadOptions(**options))


def test_rows_of_a_plugin_are_those_of_a_source_with_its_suffix(photos):
    loaded(
        photos,
        "  yield {'file': 'a.png', 'caption': 'a cat'}\n  yield {'file': 'b.png', 'label': 'dog', 'split': 'val'}",
    )
    assert format_of(str(photos / "all.lst")) == "mine"
    listing = read(photos / "all.lst")
    assert listing.root == photos
    first, second = listing.rows
    assert (first.file, first.captions, first.split) == ("a.png", ("a cat",), "train")
    assert (second.file, second.captions, second.label, second.split) == ("b.png", (), "dog", "val")
    load_plugins(())
    assert format_of(str(photos / "all.lst")) is None


def test_a_row_with_an_error_is_left_out(photos):
    loaded(
        photos,
        "  yield {'file': 'a.png', 'caption': ['a cat', 'a pet']}\n  yield 3\n  yield {'file': 'b.png'}\n"
        "  yield {'file': 'b.png', 'captoin': 'x'}\n  yield {'file': '../x.png', 'caption': 'x'}\n"
        "  yield {'file': 'gone.png', 'caption': 'x'}\n",
    )
    listing = read(photos / "all.lst")
    assert [row.captions for row in listing.rows] == [("a cat", "a pet")]
    reasons = list(listing.left_out.values())
    for reason, said in zip(reasons, ("not a mapping", "no_caption", "captoin", "outside", "missing"), strict=True):
        assert said in reason


def test_a_source_with_a_scheme_is_read_and_packed_as_that_of_a_run(photos, tmp_path):
    loaded(photos, "  yield {'file': source.partition('://')[2] + '.png', 'caption': 'x'}", "scheme='catalog'")
    (row,) = read("catalog://a", images=photos).rows
    assert row.file == "a.png"
    stage = {"name": "s", "samples": 8, "lr": 1e-3}
    source = {"path": "catalog://b", "table": {"images": str(photos)}}
    content = {"name": "r", "output": str(tmp_path / "runs"), "data": {"sources": [source]}, "stages": [stage]}
    (packed,) = with_packed_sources(RunConfig.model_validate(content)).data.sources
    assert Path(packed.path).is_relative_to(tmp_path / "runs")
    assert (Path(packed.path) / "manifest.json").is_file()
    load_plugins(())
    with pytest.raises(DataError, match="cannot read from catalog://"):
        read("catalog://a", images=photos)


def test_an_error_of_the_function_names_the_plugin_its_line_and_the_row(photos):
    loaded(photos, "  yield {'file': 'a.png', 'caption': 'x'}\n  raise KeyError('caption')")
    with pytest.raises(PluginError, match=r"plugin\.py\) failed in the reader mine of .*after row 1: .*\(line 5\)"):
        read(photos / "all.lst")


def test_nothing_to_pack_a_missing_source_and_options_without_use_are_refused(photos):
    loaded(photos, "  return []")
    with pytest.raises(DataError, match="nothing to pack"):
        read(photos / "all.lst")
    with pytest.raises(DataError, match=r"other\.lst: there is no such file"):
        read(photos / "other.lst")
    with pytest.raises(DataError, match=r"mine \(plugin plugin\), which does not use --image-key"):
        read(photos / "all.lst", image_key="x")


def test_options_that_a_reader_uses_are_passed_on(photos):
    body = "  yield {'file': options.image_key, 'caption': 'x'}"
    loaded(photos, body, "suffix='.lst', uses=['image_key']")
    assert [row.file for row in read(photos / "all.lst", image_key="b.png").rows] == ["b.png"]


def test_a_reader_cannot_take_the_name_of_a_format(photos):
    loaded(photos, "  return []", name="table")
    with pytest.raises(PluginError, match="reader table, and a format of this name exists"):
        read(photos / "all.lst")
