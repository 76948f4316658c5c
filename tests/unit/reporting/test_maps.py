"""Maps of a model's features on images and videos, and of their similarity to a caption."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.support import datasets, media
from tests.support.finished import run_config, write_run
from tests.support.shards import write_demo_shards
from univitar_ds.cli.main import main
from univitar_ds.errors import CheckpointError, DataError, UserError
from univitar_ds.reporting import map_items
from univitar_ds.reporting import page as page_module
from univitar_ds.reporting.map_items import read_items
from univitar_ds.reporting.maps import maps_of
from univitar_ds.reporting.page import render_page
from univitar_ds.reporting.record import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    shards = write_demo_shards(tmp_path_factory.mktemp("shards"), images=8, videos=4, shards=1)
    folder = tmp_path_factory.mktemp("maps") / "run"
    stage = run_config(shards).stages[0].model_dump(mode="json")
    stage["video"]["min_tokens"] = 48  # above the maximum of images
    write_run(folder, run_config(shards, stages=[stage]))
    return folder


def drawn(run, *files, caption=None):
    return list(maps_of(read_run(run), read_items([read_run(run)], files, caption)))


def held_out(run, folder, *captions):
    """The run, evaluated on images with these captions."""
    members = []
    for number, caption in enumerate(captions):
        content = io.BytesIO()
        Image.effect_noise((42, 42), 90).save(content, "PNG")
        members += [(f"{number}.png", content.getvalue()), (f"{number}.txt", caption)]
    datasets.write_tar(folder / "0.tar", members)
    sources = {"sources": [{"path": str(folder)}], "token_budget": 200}
    return replace(read_run(run), config=run_config(folder, evaluation=sources))


def test_an_image_has_a_map_for_each_resolution_and_one_for_the_caption(run, tmp_path):
    Image.effect_noise((140, 70), 90).convert("RGB").save(tmp_path / "noise.png")
    (found,) = drawn(run, tmp_path / "noise.png", caption="a red image")
    original, *components, similar = found.maps
    assert original.text == "70 x 140 px"
    assert [one.text.endswith(", native size") for one in components] == [False, False, True]  # at most 36 tokens
    assert components[2].text == "4 x 8 tokens, native size"
    for one in components:
        height, width = (int(text) for text in one.text.split()[:3:2])
        assert width * height <= 36
        cells = np.asarray(one.images["principal components"].resize((width, height), Image.Resampling.NEAREST))
        assert len(np.unique(cells.reshape(-1, 3), axis=0)) > 1
    assert similar.text.startswith("4 x 8 tokens, “a red image”: cosine")


def test_a_video_has_frames_with_their_maps(run, tmp_path):
    (tmp_path / "v.mp4").write_bytes(media.video(media.moving_frames(16)))
    (found,) = drawn(run, tmp_path / "v.mp4")
    assert [one.text for one in found.maps] == ["frame 1 of 4, 5 x 6 tokens", "frame 3 of 4, 5 x 6 tokens"]
    for one in found.maps:
        assert list(one.images) == ["original", "principal components"]
        assert all(image.width <= 224 and image.height <= 224 for image in one.images.values())


def test_held_out_items_are_drawn_with_their_captions(run):
    items = read_items([read_run(run)], [], None)
    assert [isinstance(one.item, Image.Image) for one in items] == [True, True, False]
    assert len({one.name for one in items}) == 3
    assert all("test" in one.name for one in items)
    assert len({one.caption for one in items}) == 3
    for one, found in zip(items, maps_of(read_run(run), items), strict=True):
        assert found.title == f"tried: {one.name}"
        frame = one.item if isinstance(one.item, Image.Image) else one.item[0]
        native = f"{frame.height // 14} x {frame.width // 14} tokens"  # as the evaluation has read it
        assert any(native in drawn.text for drawn in found.maps)
        similar = [drawn for drawn in found.maps if "similarity" in drawn.images]
        assert all(native in drawn.text for drawn in similar)
        assert len(similar) == (1 if isinstance(one.item, Image.Image) else len(found.maps))
        assert all(f"“{one.caption}”: cosine" in drawn.text for drawn in similar)
    assert {one.caption for one in read_items([read_run(run)], [], "another")} == {"another"}


def test_what_cannot_be_drawn_is_reported_before_the_results_are_printed(run, tmp_path, capsys):
    (tmp_path / "x.jpg").write_bytes(b"text")
    (tmp_path / "v.mp4").write_bytes(b"text")
    for file, said in (("x.jpg", "name an image or a video"), ("v.mp4", "name an image or a video"),
                       ("gone.jpg", "No such file or directory; name an image or a video")):  # fmt: skip
        assert main(["report", str(run), "--out", str(tmp_path / "p.html"), "--images", str(tmp_path / file)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"{tmp_path / file} cannot be drawn: " in printed.err
        assert said in printed.err
        assert "[Errno" not in printed.err
    assert not (tmp_path / "p.html").exists()


def test_maps_of_one_item_are_shown_at_one_size_however_they_are_stored(run, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "_MAP_BYTES", 1000)
    Image.effect_noise((140, 70), 90).save(tmp_path / "noise.png")
    record = read_run(run)
    page, _ = render_page([record], read_items([record], [tmp_path / "noise.png"], None))
    shown = re.findall(r'<img style="width: (\d+)px" src="data:image/webp;base64,([^"]+)"', page)
    stored = [Image.open(io.BytesIO(base64.b64decode(content))).width for _, content in shown]
    assert {int(width) for width, _ in shown} == {448}
    assert min(stored) < 448


def test_a_run_without_held_out_data_asks_for_files(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, run_config(evaluation={"sources": []}))
    with pytest.raises(UserError, match=r"evaluation\.sources of tried is empty; name files: --images FILE"):
        read_items([read_run(folder)], [], None)
    moved = replace(read_run(folder), config=run_config(tmp_path / "moved"))
    with pytest.raises(DataError, match=r"held-out data of tried: .*moved.*; or name files: --images FILE"):
        read_items([moved], [], None)


@pytest.mark.parametrize(("looked_at", "shown"), [(64, ["0/0", "0/3"]), (3, ["0/0", "0/1"])])
def test_items_with_different_captions_come_first(run, tmp_path, monkeypatch, looked_at, shown):
    """A data set may have one caption or label: it is neither read to its end nor has it one item."""
    monkeypatch.setattr(map_items, "_LOOKED_AT", looked_at)
    record = held_out(run, tmp_path, "a cat", "a cat", "a cat", "a dog")
    assert [one.name for one in read_items([record], [], None)] == shown


def test_captions_of_any_length_and_direction_leave_the_page_readable(run, tmp_path):
    record = held_out(run, tmp_path, "x" * 10_000, "\u202e<b>evil")
    page, _ = render_page([record], read_items([record], [], None))
    assert "x" * 201 not in page
    assert "“\N{REPLACEMENT CHARACTER}&lt;b&gt;evil”: cosine" in page


def test_files_of_one_name_have_their_folders_in_the_title(run, tmp_path):
    files = [tmp_path / folder / "x.png" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        Image.new("RGB", (42, 42)).save(file)
    assert [one.name for one in read_items([read_run(run)], files, None)] == [str(file) for file in files]
    assert [one.name for one in read_items([read_run(run)], files[:1], None)] == ["x.png"]


def test_a_file_above_the_limit_is_not_read(run, tmp_path, monkeypatch):
    with (tmp_path / "v.mp4").open("wb") as file:
        file.truncate((2 << 20) + 1)
    monkeypatch.setattr(map_items, "_MAX_MB", 2)
    with pytest.raises(UserError, match=r"the file has 2097153 bytes \(limit 2097152\); name an image or a video"):
        read_items([read_run(run)], [tmp_path / "v.mp4"], None)


def test_a_run_without_a_checkpoint_is_reported_first(run, tmp_path):
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_items([read_run(run), read_run(tmp_path)], [], None)


def test_texts_are_drawn_for_the_runs_that_have_a_text_tower(run, tmp_path):
    record = held_out(run, tmp_path, "a cat", "a dog")
    classifier = tmp_path / "classifier"
    shards = write_demo_shards(tmp_path / "shards", images=4, videos=2, shards=1)
    write_run(classifier, run_config(shards, objective={"kind": "classification"}))
    items = read_items([record, read_run(classifier)], [], None)
    for folder, similar in ((run, 1), (classifier, 0)):
        for found in maps_of(read_run(folder), items):
            assert sum("similarity" in drawn.images for drawn in found.maps) == similar
    with pytest.raises(UserError, match="--caption needs a text tower"):
        read_items([record, read_run(classifier)], [], "a cat")
    with pytest.raises(UserError, match="--caption is empty"):
        read_items([record], [], " ")
