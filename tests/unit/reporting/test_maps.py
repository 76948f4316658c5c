"""Maps of a model's features on images and videos, and of their similarity to a caption."""

import numpy as np
import pytest
from PIL import Image

from tests.support import media
from tests.support.finished import run_config, write_run
from univitar_ds.errors import UserError
from univitar_ds.reporting.maps import maps_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps") / "run"
    write_run(folder, run_config())
    return folder


def test_an_image_has_a_map_for_each_resolution_and_one_for_the_caption(run, tmp_path):
    Image.effect_noise((140, 70), 90).convert("RGB").save(tmp_path / "noise.png")
    (found,) = maps_of(run, "tried", [tmp_path / "noise.png"], "a red image")
    original, *components, similar = found.maps
    assert original.text == "70 x 140 px"
    assert len(components) >= 1  # the rule of this run allows at most 36 tokens, which can be the same grid
    for one in components:
        height, width = (int(text) for text in one.text.split()[:3:2])
        assert width * height <= 36
        cells = np.asarray(one.image.resize((width, height), Image.Resampling.NEAREST))
        assert len(np.unique(cells.reshape(-1, 3), axis=0)) > 1
    assert "“a red image”: cosine" in similar.text


def test_a_video_has_frames_with_their_maps(run, tmp_path):
    (tmp_path / "v.mp4").write_bytes(media.video(media.moving_frames(16)))
    (found,) = maps_of(run, "tried", [tmp_path / "v.mp4"])
    assert next(one.text for one in found.maps if one.text.startswith("frame")) == "frame 1 of 16"
    assert len(found.maps) % 2 == 0


def test_a_file_that_is_no_image_is_named(run, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match=r"x\.jpg cannot be drawn: .*; name an image or a video"):
        list(maps_of(run, "tried", [tmp_path / "x.jpg"]))
    with pytest.raises(UserError, match=r"gone\.jpg cannot be drawn"):
        list(maps_of(run, "tried", [tmp_path / "gone.jpg"]))
