"""Images in every mode and orientation, videos, and rejected input."""

import dataclasses

import pytest
import torch
from PIL import Image

from tests.support.golden import golden
from univitar_ds import Preprocessor
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.errors import CheckpointError, UserError

CONFIG = EncoderConfig(min_tokens=4, max_tokens=64, resize_factor=1)
WHITE, RED, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 0)


def test_a_video_shares_its_limit_among_its_steps():
    frames = [Image.new("RGB", (300, 300))] * 8
    values, grid = Preprocessor(dataclasses.replace(CONFIG, max_tokens=68))([frames, frames[0]])
    assert grid.tolist() == [[4, 4, 4], [1, 8, 8]]
    assert values.shape == (128, 1176)


def test_one_frame_in_a_list_is_a_still_image():
    image = golden("merge1").items()[0]
    prep = Preprocessor(CONFIG)
    assert torch.equal(prep([[image]])[0], prep([image])[0])


def test_both_frames_of_a_still_image_are_the_same_and_those_of_a_video_are_not():
    black, white = Image.new("RGB", (28, 28)), Image.new("RGB", (28, 28), WHITE)
    values, _ = Preprocessor(CONFIG)([black, [black, white]])
    first, second = values.view(2, -1, 3, 2, 196).unbind(3)
    assert torch.equal(first[0], second[0])
    assert (first[1] < second[1]).all()


def test_a_fixed_mode_makes_squares_and_relarge_grows_before_the_limits():
    image = Image.new("RGB", (56, 28))
    square = Preprocessor(dataclasses.replace(CONFIG, resolution_mode="224"))
    assert square([image])[1].tolist() == [[1, 16, 16]]
    grown = Preprocessor(dataclasses.replace(CONFIG, relarge_ratio=2.0))
    assert grown([image])[1].tolist() == [[1, 4, 8]]


@pytest.mark.parametrize(
    ("items", "complaint"),
    [
        ([], "at least one"),
        (Image.new("RGB", (28, 28)), "put a single one in a list"),
        ([[]], "item 0 is a video without frames"),
        ([[Image.new("RGB", (28, 28))] * 3], "item 0 has 3 frames; give one frame or a multiple of 2"),
        ([[Image.new("RGB", (28, 28)), Image.new("RGB", (28, 30))]], r"different sizes \[\(28, 28\), \(28, 30\)\]"),
        (["cat.png"], "has an object of type str"),
        ([[Image.new("RGB", (28, 28))] * 200], "200 frames does not fit max_tokens 64"),
    ],
    ids=["nothing", "bare image", "no frames", "odd frames", "sizes", "path", "too long"],
)
def test_an_item_that_cannot_be_prepared_is_refused_with_a_message(items, complaint):
    with pytest.raises(UserError, match=complaint):
        Preprocessor(CONFIG)(items)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        Preprocessor.from_pretrained(tmp_path)
