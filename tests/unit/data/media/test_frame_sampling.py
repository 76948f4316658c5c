"""The number and the indices of the frames that are sampled from a video."""

from bisect import bisect_right

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from univitar_ds.data.media.frame_sampling import UNIFORM, Sampling, by_count, by_time, frames_of, sample_positions

JITTER = Sampling(jitter=True)
draws = st.integers(0, 2**64 - 1)


def fps(rate: float, jitter: bool = False) -> Sampling:
    return Sampling("fps", rate, jitter)


@given(st.floats(-10, 10**9), st.integers(2, 64), st.floats(0.01, 240))
def test_the_number_of_frames_is_a_multiple_of_the_tubelet_size_up_to_the_maximum(seconds, most, rate):
    for sampling in (UNIFORM, fps(rate)):
        frames = frames_of(sampling, most, seconds)
        assert frames % 2 == 0
        assert 2 <= frames <= most


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.1, 2), (1.0, 2), (2.0, 4), (4.6, 10), (7.9, 16), (8.0, 16), (3600.0, 16), (0.0, 16)]
)
def test_fps_sampling_takes_frames_by_duration_and_the_maximum_if_it_is_unknown(seconds, expected):
    assert frames_of(fps(2.0), 16, seconds) == expected


def test_uniform_sampling_takes_the_same_number_from_every_video():
    assert [frames_of(UNIFORM, 8, seconds) for seconds in (0.0, 0.1, 5.0, 1e6)] == [8, 8, 8, 8]


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_without_jitter_frames_are_in_the_middle_of_equal_parts(total, frames):
    assert by_count(sample_positions(UNIFORM, frames, 7), total) == [
        (2 * i + 1) * total // (2 * frames) for i in range(frames)
    ]


@given(st.integers(1, 10**6), st.integers(1, 64), draws)
def test_with_jitter_each_frame_is_in_its_own_part_and_depends_only_on_the_draw(total, frames, draw):
    seen = by_count(sample_positions(JITTER, frames, draw), total)
    assert all(i * total // frames <= number <= (i + 1) * total / frames for i, number in enumerate(seen))
    assert max(seen) < total
    assert seen == sorted(seen)
    assert seen == by_count(sample_positions(JITTER, frames, draw), total)


def test_jitter_chooses_all_frames_of_a_part_about_equally_often():
    counts = [0] * 40
    for draw in range(2000):
        for number in by_count(sample_positions(JITTER, 4, draw), 40):
            counts[number] += 1
    assert sum(counts) == 8000
    assert all(140 <= count <= 260 for count in counts), counts  # 200 each; 60 is more than 4 standard deviations


def test_parts_of_one_video_and_videos_are_jittered_independently():
    first, second = (sample_positions(JITTER, 8, draw) for draw in (1, 2))
    within = [place % 2**64 for place in first]
    assert len(set(within)) == 8
    assert not set(within) & {place % 2**64 for place in second}


times = st.lists(st.integers(-(10**6), 10**9), min_size=1, max_size=50, unique=True).map(sorted)


@given(times, st.integers(0, 10**6), st.integers(1, 32), draws, st.booleans())
def test_sampling_by_time_takes_the_frame_displayed_at_that_time(shown, last, frames, draw, jitter):
    end = shown[-1] + last
    positions = sample_positions(fps(2.0, jitter), frames, draw)
    seen = by_time(positions, shown, end)
    length = max(end, shown[-1] + 1) - shown[0]
    assert seen == sorted(seen)
    for place, number in zip(positions, seen, strict=True):
        at = shown[0] + place * length / (frames * 2**64)
        assert abs(number - (bisect_right(shown, at) - 1)) <= 1, "differs by one only because of float rounding"
        assert 0 <= number < len(shown)


@given(st.integers(1, 400), st.integers(1, 32), draws)
def test_at_a_constant_frame_rate_sampling_by_time_and_by_count_agree(total, frames, draw):
    for sampling in (fps(2.0), fps(2.0, jitter=True)):
        positions = sample_positions(sampling, frames, draw)
        assert by_time(positions, [512 * i for i in range(total)], 512 * total) == by_count(positions, total)


def test_a_frame_with_a_long_duration_is_sampled_several_times():
    assert by_time(sample_positions(fps(1.0), 8, 0), [0, 10, 20, 30], 80) == [0, 1, 2, 3, 3, 3, 3, 3]


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 200))
@example(3, 1, 180)
def test_parts_of_a_video_are_sampled_as_the_whole(parts, steps, total):
    """All parts together have the frames of one sampling of the whole video."""
    frames = 2 * steps
    each = [by_count(sample_positions(Sampling(part=part, parts=parts), frames, 0), total) for part in range(parts)]
    assert [index for one in each for index in one] == by_count(sample_positions(UNIFORM, parts * frames, 0), total)


def test_a_part_has_the_frames_of_its_duration():
    assert frames_of(Sampling("fps", 2.0, parts=2), 16, 8.0) == 8
