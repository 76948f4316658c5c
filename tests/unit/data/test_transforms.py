import numpy as np
import pytest
from PIL import Image

from tests.support import media
from univitar_ds.data.transforms import fit_clip, fit_image


@pytest.mark.parametrize("grid", [(1, 2, 3), (1, 8, 4), (1, 40, 40)])
def test_a_picture_is_resized_as_the_release_does(grid):
    image = media.noise(101, 203)
    pixels = fit_image(np.asarray(image), grid)
    expected = image.resize((grid[2] * 14, grid[1] * 14), Image.Resampling.BICUBIC)
    assert pixels.shape == (grid[1] * 14, grid[2] * 14, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == np.asarray(expected)).all()


def test_a_picture_of_the_right_size_is_left_alone():
    pixels = np.asarray(media.noise(28, 42))
    assert (fit_image(pixels, (1, 2, 3)) == pixels).all()


def test_fine_stripes_average_out_instead_of_flickering():
    stripes = np.zeros((560, 560, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit_image(stripes, (1, 2, 2)).astype(int) - 127).max() <= 4


def test_every_frame_of_a_clip_is_resized_alike():
    frames = np.stack([np.asarray(media.noise(50, 70, seed)) for seed in range(4)])
    clip = fit_clip(frames, (2, 3, 5))
    assert clip.shape == (4, 42, 70, 3)
    assert clip.flags.c_contiguous
    for frame, fitted in zip(frames, clip, strict=True):
        assert (fit_image(frame, (1, 3, 5)) == fitted).all()
