import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support import media
from tests.support.progress import run_watched
from univitar_ds.data.media.resize import fit_image

SIDES = st.integers(5, 160)


def pillow(pixels, grid):
    size = (grid[2] * 14, grid[1] * 14)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize("grid", [(1, 2, 3), (1, 8, 4), (1, 40, 40), (1, 7, 15)])
def test_an_image_is_resized_as_in_the_release(grid):
    pixels = np.asarray(media.noise(101, 203))
    fitted = fit_image(pixels, grid)
    assert fitted.shape == (grid[1] * 14, grid[2] * 14, 3)
    assert fitted.dtype == np.uint8
    difference = np.abs(pillow(pixels, grid) - fitted)
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-4
    assert (difference > 0).mean() < 0.02


@settings(max_examples=150)
@given(SIDES, SIDES, st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_black_and_white_edges_differ_from_pillow_by_at_most_2_levels_and_rarely_by_more_than_1(
    height, width, h, w, seed
):
    cells = np.random.default_rng(seed).integers(0, 2, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8) * 255
    pixels = cells.repeat(4, 0).repeat(4, 1)[:height, :width]
    difference = np.abs(pillow(np.ascontiguousarray(pixels), (1, h, w)) - fit_image(pixels, (1, h, w)))
    assert difference.max() <= 2
    assert (difference > 1).mean() < 0.01


def test_an_image_of_the_right_size_is_not_changed():
    pixels = np.asarray(media.noise(28, 42))
    assert fit_image(pixels, (1, 2, 3)) is pixels
    out = np.zeros_like(pixels)
    assert fit_image(pixels, (1, 2, 3), out) is out
    assert (out == pixels).all()


def test_the_result_is_written_only_to_the_output_array():
    pixels = np.asarray(media.noise(50, 70))
    buffer = np.full(10 + 28 * 42 * 3 + 10, 7, np.uint8)
    out = buffer[10:-10].reshape(28, 42, 3)
    fit_image(pixels, (1, 2, 3), out)
    assert (out == fit_image(pixels, (1, 2, 3))).all()
    assert (buffer[:10] == 7).all()
    assert (buffer[-10:] == 7).all()


def test_transposed_and_flipped_views_are_resized_like_their_copies():
    pixels = np.asarray(media.noise(50, 70))
    for view in (pixels[::-1], pixels[:, ::-1], pixels.swapaxes(0, 1)):
        assert (fit_image(view, (1, 2, 3)) == fit_image(view.copy(), (1, 2, 3))).all()


def test_fine_stripes_are_averaged():
    stripes = np.zeros((560, 560, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit_image(stripes, (1, 2, 2)).astype(int) - 127).max() <= 4


def test_resizing_does_not_import_torch_and_leaks_no_memory():
    code = (
        "import sys, numpy as np; from univitar_ds.data.media.resize import fit_image;"
        "pages = lambda: int(open('/proc/self/statm').read().split()[1]);"
        "a = np.zeros((20, 20, 3), np.uint8); run = lambda n: all(fit_image(a, (1, 1, 2)).size for _ in range(n));"
        "run(1000); before = pages(); run(20000);"
        "print('torch' in sys.modules, pages() - before < 700)"
    )
    result = run_watched([sys.executable, "-c", code], check=True)
    assert result.stdout.split() == ["False", "True"]
