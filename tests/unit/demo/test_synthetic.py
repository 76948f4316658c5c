"""The data set of scenes: held-out compositions, directions that no single frame shows, and reproducible files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from univitar_ds.demo import scenes
from univitar_ds.demo.draw import COLOURS, QUARTER, SHAPES, luminance
from univitar_ds.demo.scenes import compositions, image_scene, render, thing_at, video_scene
from univitar_ds.demo.synthetic import write_scenes
from univitar_ds.errors import DataError

EIGHT_OF = 8


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(where, images=48, videos=32, seed=5)
    return where


def test_held_out_compositions_are_new_but_their_colours_and_shapes_are_not():
    train, test = compositions("train"), compositions("test")
    assert not set(train) & set(test)
    assert len(train) + len(test) == len(COLOURS) * len(SHAPES)
    for axis, names in ((0, COLOURS), (1, SHAPES)):
        for name in names:
            assert sum(pair[axis] == name for pair in train) == 6
            assert sum(pair[axis] == name for pair in test) == 2, "one alone would be known by its colour"


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_scene_shows_compositions_of_its_split_only(split: str):
    allowed = set(compositions(split))
    shown = set()
    for index in range(200):
        for scene in (image_scene(1, split, index), video_scene(1, split, index)):
            shown |= {(thing.colour, thing.shape) for thing in scene.things}
    assert shown == allowed


def test_held_out_videos_move_in_all_four_directions():
    seen = {(video.things[0].name, video.direction) for video in (video_scene(0, "test", i) for i in range(64))}
    assert len(seen) == 16 * 4


def test_captions_name_the_shapes_and_their_arrangement():
    relations = set()
    for index in range(300):
        scene = image_scene(2, "train", index)
        if scene.label is not None:
            (thing,) = scene.things
            assert scene.label == thing.name
            assert scene.captions[0].endswith(thing.name)
            continue
        one, other = scene.things
        words = scene.captions[0].removeprefix(f"a {one.name} ").removesuffix(f" a {other.name}")
        relations.add(words)
        dx = (other.left_q + other.diameter_q / 2) - (one.left_q + one.diameter_q / 2)
        dy = (other.top_q + other.diameter_q / 2) - (one.top_q + one.diameter_q / 2)
        expected = ("above" if dy > 0 else "below") if abs(dy) > abs(dx) else None
        expected = expected or ("to the left of" if dx > 0 else "to the right of")
        assert words == expected
        opposite = {"above": "below", "to the left of": "to the right of"}
        opposite |= {other: one for one, other in opposite.items()}
        assert scene.captions[1] == f"a {other.name} {opposite[words]} a {one.name}"
    assert relations == set(scenes.RELATIONS)


def test_still_shapes_are_inside_the_image_and_differ_in_brightness_and_place():
    for index in range(300):
        scene = image_scene(3, "train", index)
        for thing in scene.things:
            assert min(thing.left_q, thing.top_q) >= 0
            assert thing.left_q + thing.diameter_q <= scene.width * QUARTER
            assert thing.top_q + thing.diameter_q <= scene.height * QUARTER
            assert abs(luminance(scene.background.first) - luminance(thing.rgb)) > 25
        if len(scene.things) == 2:
            one, other = scene.things
            apart_x = abs(one.left_q - other.left_q) >= (one if one.left_q < other.left_q else other).diameter_q
            apart_y = abs(one.top_q - other.top_q) >= (one if one.top_q < other.top_q else other).diameter_q
            assert apart_x or apart_y


def test_sizes_and_aspect_ratios_spread_over_the_stated_range():
    sides = np.array([(s.width, s.height) for s in (image_scene(0, "train", i) for i in range(2000))])
    assert sides.min() == 40
    assert sides.max() == 400
    ratios = sides[:, 0] / sides[:, 1]
    assert ratios.max() <= 3.1
    assert ratios.min() >= 1 / 3.1
    assert ratios.max() > 2.2
    assert ratios.min() < 1 / 2.2
    assert abs(np.median(ratios) - 1) < 0.1
    videos = [video_scene(0, "train", i) for i in range(300)]
    assert all(40 <= side <= 160 and side % 2 == 0 for video in videos for side in (video.width, video.height))


def test_no_single_frame_shows_the_direction():
    """Places in the first, middle and last frame, as shares of the sides, are uniform for each direction alone."""
    places: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for index in range(4000):
        video = video_scene(7, "train", index)
        for which, frame in enumerate((0, video.frames // 2, video.frames - 1)):
            thing = thing_at(video, frame)
            share = (thing.left_q / video.width / QUARTER, thing.top_q / video.height / QUARTER)
            places.setdefault((video.direction, which), []).append(share)
    assert len(places) == 12
    for samples in places.values():
        for axis in np.array(samples).T:
            counts, _ = np.histogram(axis, bins=10, range=(0, 1))
            expected = len(axis) / 10
            assert ((counts - expected) ** 2 / expected).sum() < 33.7, "chi-square, 9 degrees, p = 1e-4"


def test_a_frame_does_not_depend_on_the_direction():
    videos = [video_scene(8, "train", index) for index in range(4000)]
    for read in (lambda c: c.width / c.height, lambda c: c.things[0].diameter_q, lambda c: c.frames, lambda c: c.rate):
        values = np.array([read(video) for video in videos], dtype=float)
        groups = [values[[c.direction == direction for c in videos]] for direction in scenes.DIRECTIONS]
        error = values.std() / np.sqrt(1000)
        assert all(abs(group.mean() - values.mean()) < 4 * error for group in groups)


@pytest.mark.parametrize(("direction", "opposite"), [("left", "right"), ("up", "down")])
def test_a_video_played_backwards_is_a_video_of_the_opposite_motion(direction: str, opposite: str):
    index = list(scenes.DIRECTIONS).index(direction)
    for video in (video_scene(9, "train", index + 4 * i) for i in range(8)):
        assert video.direction == direction
        mirrored = replace(video, direction=opposite, things=(thing_at(video, video.frames - 1),))
        for backwards, forwards in zip(reversed(render(video)), render(mirrored), strict=True):
            assert np.array_equal(backwards, forwards)


def test_eight_evenly_sampled_frames_move_the_shape_by_four_to_ten_pixels():
    for index in range(300):
        video = video_scene(0, "train", index)
        assert 16 <= video.frames <= 24
        assert 4 <= video.speed_q / QUARTER * video.frames / EIGHT_OF <= 10.6  # speeds are whole quarters of a pixel


def test_edges_are_smooth():
    circle = next(s for s in (image_scene(0, "test", i) for i in range(200)) if s.label and s.label.endswith("circle"))
    flat = replace(circle, background=replace(circle.background, first=(0, 0, 0), second=(0, 0, 0), noise=0.0))
    pixels = render(flat)[0]
    levels = np.unique(pixels[..., np.argmax(flat.things[0].rgb)])
    assert len(levels) > 8, "a shape without intermediate tones has jagged edges"


def test_files_on_disk_match_the_rows(folder: Path):
    import av

    rows = _rows(folder)
    assert sum(row["split"] == "test" for row in rows) == (48 + 32) // 8
    assert {row["file"] for row in rows} == {
        str(path.relative_to(folder)) for path in folder.glob("*/*") if path.is_file()
    }
    for row in rows:
        index = int(Path(row["file"]).stem.rsplit("-", 1)[1])
        scene = (image_scene if row["kind"] == "image" else video_scene)(5, row["split"], index)
        truth = render(scene)
        if row["kind"] == "image":
            with Image.open(folder / row["file"]) as image:
                assert image.format == ("PNG" if row["file"].endswith("png") else "JPEG")
                frames = [np.asarray(image.convert("RGB"))]
        else:
            with av.open(str(folder / row["file"])) as container:
                assert "mp4" in container.format.name
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == len(truth) == scene.frames
        for got, want in zip(frames, truth, strict=True):
            assert got.shape == want.shape
            error = np.abs(got.astype(int) - want.astype(int)).mean()  # grain of up to 6 grey levels is the worst of it
            assert error < (0.01 if row["file"].endswith("png") else 5.0), (row["file"], error)


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path):
    write_scenes(tmp_path / "again", images=48, videos=32, seed=5)
    assert _digests(tmp_path / "again") == _digests(folder)
    write_scenes(tmp_path / "other", images=48, videos=32, seed=6)
    assert _digests(tmp_path / "other") != _digests(folder)


def test_an_interrupted_set_is_completed_and_a_finished_one_is_left_alone(folder: Path, tmp_path: Path):
    out = tmp_path / "set"
    write_scenes(out, images=4, videos=4, seed=5)
    before = _digests(out)
    (out / "metadata.jsonl").unlink()
    next((out / "images").iterdir()).unlink()
    write_scenes(out, images=4, videos=4, seed=5)
    assert _digests(out) == before
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    write_scenes(out, images=4, videos=4, seed=5)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_foreign_folder_or_another_set_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="name another folder"):
        write_scenes(folder, images=49, videos=32, seed=5)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        write_scenes(tmp_path, images=4, videos=4, seed=0)
    with pytest.raises(DataError, match="raise one of them"):
        write_scenes(tmp_path / "none", images=0, videos=0, seed=0)
