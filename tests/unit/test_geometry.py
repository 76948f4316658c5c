"""The resize rule, compared with the release's own results, and properties of all sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.golden import resize_rows
from univitar_ds.geometry import PATCH, Resolution, cumulative, smart_resize, token_count

ROWS = resize_rows()
SOUND = [row for row in ROWS if min(row[5:]) > 0]
FAULTY = [row for row in ROWS if min(row[5:]) == 0]


def test_the_golden_rows_hold_both_kinds():
    assert len(ROWS) == 400
    assert FAULTY


@pytest.mark.parametrize("row", SOUND, ids=str)
def test_a_size_is_the_releases_to_the_pixel(row):
    assert smart_resize(*row[:5]) == tuple(row[5:])


@pytest.mark.parametrize("row", FAULTY, ids=str)
def test_where_the_release_returns_a_side_of_0_both_sides_keep_a_factor(row):
    *request, _, _ = row
    height, width = smart_resize(*request)
    factor, _, max_pixels = request[2:]
    assert min(height, width) >= factor
    assert height % factor == width % factor == 0
    assert height * width <= max_pixels


sides = st.integers(1, 20_000)


@given(sides, sides, st.sampled_from([14, 28, 56, 112]), st.integers(1, 2_000), st.integers(0, 20_000))
def test_every_size_is_divisible_positive_and_within_the_pixel_limit(height, width, factor, least, more):
    min_pixels, max_pixels = least * 196, (least + more) * 196
    if factor * factor > max_pixels:
        with pytest.raises(ValueError, match=str(factor)):
            smart_resize(height, width, factor, min_pixels, max_pixels)
        return
    h, w = smart_resize(height, width, factor, min_pixels, max_pixels)
    assert h % factor == w % factor == 0
    assert min(h, w) >= factor
    # Growing to min_pixels rounds both sides up, as in the release, and may so pass max_pixels.
    assert h * w <= max_pixels or (h - factor) * (w - factor) <= min_pixels


@given(st.integers(56, 4_000), st.floats(0.25, 4.0), st.sampled_from([28, 56, 112]))
def test_a_plain_image_keeps_its_shape_and_its_limits(height, aspect, factor):
    width = max(56, round(height * aspect))
    h, w = smart_resize(height, width, factor, 64 * 112 * 112 // 4, 64 * 112 * 112)
    assert 64 * 112 * 112 // 4 <= h * w <= 64 * 112 * 112
    assert abs(h / height - w / width) <= factor / height + factor / width


@given(st.integers(1, 3_000), st.integers(1, 3_000), st.integers(1, 16))
def test_a_grid_counts_two_frames_a_step_and_keeps_the_limit_of_the_whole_item(height, width, frames):
    steps, h, w = Resolution(min_tokens=16, max_tokens=1024, divisor_px=28).grid(height, width, frames)
    assert steps == (frames + 1) // 2
    assert h % 2 == w % 2 == 0
    assert token_count((steps, h, w)) <= 1024


def test_a_fixed_rule_returns_the_same_square_for_any_input():
    rule = Resolution(1, 10**6, fixed_px=224)
    assert rule.grid(31, 4000, 8) == (4, 224 // PATCH, 224 // PATCH)


@pytest.mark.parametrize("sides", [(0, 5), (5, -1)])
def test_a_side_below_one_pixel_is_refused(sides):
    with pytest.raises(ValueError, match="at least 1"):
        smart_resize(*sides, 28, 784, 784)


def test_bounds_start_at_0_and_end_at_the_sum():
    assert cumulative([3, 0, 5]) == [0, 3, 3, 8]
    assert cumulative([]) == [0]
