"""Draws of crops, flips and colours, and what they do to pixels, against the formulas in float64."""

import colorsys
import json
import math

import numpy as np
import pytest
from PIL import Image
from PIL.ImageEnhance import Brightness, Color, Contrast

from tests.support import media
from univitar_ds.data.media.augment import Augment, Augmentation, Crop, recolour, square_crop
from univitar_ds.data.media.resize import fit_image

ALL = Augment(
    crop_scale=(0.2, 0.9),
    crop_ratio=(0.5, 2.0),
    flip=0.5,
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.3,
    saturation=0.2,
    hue=0.1,
    grey=0.25,
)
GOLDEN = Augmentation(
    Crop(top=7, left=7, height=293, width=378, of_height=300, of_width=500),
    True,
    (
        ("hue", 0.045894639207783555),
        ("brightness", 1.2287923891577583),
        ("contrast", 0.8335496153076662),
        ("saturation", 1.1176376891990683),
    ),
    True,
)
WEIGHTS = (0.299, 0.587, 0.114)


def drawn(augment=ALL, count=2000, height=300, width=500):
    return [augment.drawn(number, height, width) for number in range(count)]


def test_a_draw_is_the_same_in_every_version_and_differs_between_samples():
    """Runs that are resumed with a later version depend on it."""
    change = ALL.drawn(7, 300, 500)
    assert change == ALL.drawn(7, 300, 500)
    assert change == GOLDEN
    assert Augmentation.from_json(json.loads(json.dumps(change)))._replace(jitter=change.jitter) == change
    assert len({one.crop for one in drawn(count=100)}) == 100


def test_a_crop_keeps_its_share_of_the_area_and_its_ratio_inside_the_image():
    crops = [one.crop for one in drawn()]
    for crop in crops:
        assert 0 <= crop.top <= 300 - crop.height
        assert 0 <= crop.left <= 500 - crop.width
        assert (crop.of_height, crop.of_width) == (300, 500)
    shares = np.array([crop.height * crop.width / 150_000 for crop in crops])
    ratios = np.array([crop.width / crop.height / (500 / 300) for crop in crops])
    assert 0.195 < shares.min() < 0.22
    assert 0.88 < shares.max() < 0.905
    assert shares.mean() == pytest.approx(0.55, abs=0.02)
    assert 0.49 < ratios.min() < 0.55
    assert 1.85 < ratios.max() < 2.02
    assert np.log(ratios).mean() == pytest.approx(0, abs=0.03), "as often wider as narrower"
    inner = [crop for crop in crops if crop.height < 300 and crop.width < 500]
    places = [(crop.top / (300 - crop.height), crop.left / (500 - crop.width)) for crop in inner]
    middles = np.array(places)
    assert middles.mean(axis=0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    assert middles.min() == 0
    assert middles.max() == 1
    assert {crop.left % 8 for crop in crops} == set(range(8))
    assert {one.crop.left % 8 for one in drawn(width=512)} == {0}, "whole pixels at every scale of a large JPEG"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 900), (3, 2)])
def test_a_crop_of_a_tiny_image_has_at_least_one_pixel(height, width):
    for one in drawn(count=50, height=height, width=width):
        assert 1 <= one.crop.height <= height
        assert 1 <= one.crop.width <= width


def test_without_a_range_of_ratios_a_crop_has_the_ratio_of_the_image():
    for one in drawn(Augment(crop_scale=(0.25, 0.25)), count=20):
        assert (one.crop.height, one.crop.width) == (150, 250)


def test_probabilities_and_ranges_of_factors_hold():
    found = drawn()
    assert sum(one.flip for one in found) / len(found) == pytest.approx(0.5, abs=0.04)
    assert sum(one.grey for one in found) / len(found) == pytest.approx(0.25, abs=0.04)
    jittered = [one.jitter for one in found if one.jitter]
    assert len(jittered) / len(found) == pytest.approx(0.8, abs=0.04)
    assert len({tuple(name for name, _ in jitter) for jitter in jittered}) == math.factorial(4)
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        factors = [dict(jitter)[name] for jitter in jittered]
        assert low <= min(factors) < low + 0.01
        assert high - 0.01 < max(factors) <= high


def test_a_setting_does_not_change_the_draws_of_another():
    other = Augment(crop_scale=(0.2, 0.9), crop_ratio=(0.5, 2.0), hue=0.1, grey=0.25)
    for one, two in zip(drawn(count=50), drawn(other, count=50), strict=True):
        assert (one.crop, one.grey) == (two.crop, two.grey)
        assert not two.flip
        assert [name for name, _ in two.jitter] == ["hue"]
        assert not one.jitter or dict(one.jitter)["hue"] == dict(two.jitter)["hue"]


def greys(values):
    return np.floor((values * np.array(WEIGHTS)).sum(axis=-1, keepdims=True) + 0.5)


def worked(values, name, factor):
    """The formula of one operation in float64, for values 0..255 of all frames."""
    if name == "hue":
        turned = []
        for red, green, blue in values.reshape(-1, 3) / 255:
            hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
            turned.append(colorsys.hsv_to_rgb((hue + factor) % 1, saturation, value))
        return np.array(turned).reshape(values.shape) * 255
    towards = {"brightness": 0.0, "contrast": np.floor(greys(values).mean() + 0.5), "saturation": greys(values)}[name]
    return np.clip(factor * values + (1 - factor) * towards, 0, 255)


def pixels(frames=1):
    """All kinds of colours: random ones, greys, pure ones and ties between channels."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (frames, 12, 40, 3), np.uint8)
    colours[:, 0] = colours[:, 0, :, :1]
    colours[:, 1, :, 1] = colours[:, 1, :, 0]
    colours[:, 2, :, 2] = colours[:, 2, :, 1]
    colours[:, 3] = rng.choice([0, 255], (40, 3))
    return colours


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        *((name, factor) for name in ("brightness", "contrast", "saturation") for factor in (0.0, 0.4, 1.0, 1.7)),
        *(("hue", factor) for factor in (-0.5, -0.3, -0.04, 0.0, 0.1, 0.26, 0.5)),
    ],
)
@pytest.mark.parametrize("frames", [1, 3])
def test_an_operation_is_its_formula(name, factor, frames):
    before, after = pixels(frames), pixels(frames)
    recolour(after, [(name, factor)])
    difference = after - worked(before.astype(np.float64), name, factor)
    if name == "hue":
        assert np.abs(difference).max() <= 0.501, "rounded to the nearest"
    else:
        assert difference.max() <= 0.001, "rounded down"
        assert difference.min() > -1.001


@pytest.mark.parametrize("factor", [0.0, 0.35, 0.999, 1.0, 1.21, 1.9])
def test_brightness_contrast_and_saturation_are_pillows_bit_for_bit(factor):
    """torchvision and timm call these for Pillow images."""
    enhancers = {"brightness": Brightness, "contrast": Contrast, "saturation": Color}
    for name, enhancer in enhancers.items():
        after = pixels()
        recolour(after, [(name, factor)])
        assert (after[0] == np.asarray(enhancer(Image.fromarray(pixels()[0])).enhance(factor))).all()


def test_operations_come_in_their_order_and_grey_last():
    operations = [("contrast", 1.8), ("brightness", 0.5)]
    one, other, grey = pixels(), pixels(), pixels()
    recolour(one, operations)
    recolour(other, operations[::-1])
    assert (one != other).any()
    recolour(grey, operations, grey=True)
    assert (grey == greys(one.astype(np.float64))).all()


def test_values_that_are_equal_in_two_frames_of_a_video_remain_equal():
    frames = pixels(2)
    frames[1, 6:] = 250  # the second frame is brighter
    frames[1, :6] = frames[0, :6]
    recolour(frames, [("contrast", 1.5), ("hue", 0.2), ("saturation", 0.5)])
    assert (frames[1, :6] == frames[0, :6]).all()


def test_a_flip_reverses_the_columns_of_every_frame():
    before, after = pixels(3), pixels(3)
    Augmentation(flip=True).finish(after)
    assert (after == before[:, :, ::-1]).all()
    Augmentation().finish(after)
    assert (after == before[:, :, ::-1]).all()


def test_a_crop_is_cut_out_of_the_whole_image_and_of_one_at_a_smaller_scale():
    image = np.asarray(media.noise(160, 240))
    crop = Crop(40, 80, 96, 144, 160, 240)
    part, extent = crop.cut(image)
    assert (part == image[40:136, 80:224]).all()
    assert extent == (96, 144)
    half, extent = crop.cut(image.reshape(80, 2, 120, 2, 3).mean(axis=(1, 3)).astype(np.uint8), (80, 120))
    assert half.shape == (48, 72, 3)
    assert extent == (48, 72)
    assert np.abs(fit_image(half, (1, 2, 3)).astype(int) - fit_image(part, (1, 2, 3))).max() <= 12
    assert crop.whole(28, 42) == (47, 70)
    # 77.5 of 78 rows hold the image; the crop ends in the last one.
    low, extent = Crop(60, 0, 95, 1, 155, 240).cut(image[:78, :120], (77.5, 120))
    assert low.shape[0] == 48
    assert extent == (47.5, 0.5)


def test_square_crops_are_at_both_ends_and_in_the_centre_of_the_longer_side():
    assert [square_crop(30, 50, number, 3)[:4] for number in range(3)] == [(0, left, 30, 30) for left in (0, 10, 20)]
    assert [square_crop(50, 30, number, 2).top for number in range(2)] == [0, 20]
    assert square_crop(30, 50, 0, 1) == Crop(0, 10, 30, 30, 30, 50)
    assert square_crop(600, 1101, 2, 3).left == 496  # 501, at a multiple of 8 as other crops of large images
    assert square_crop(40, 40, 2, 3)[:4] == (0, 0, 40, 40)
