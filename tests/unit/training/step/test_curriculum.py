import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from univitar_ds.config.stage import Schedule, StageConfig
from univitar_ds.training.step.curriculum import Progress, advance, distills_later, lr_at, modality_at, weight_at


def stage(name="a", samples=1000, **settings) -> StageConfig:
    return StageConfig(name=name, samples=samples, lr=2e-3, **settings)


@given(st.integers(0, 100), st.integers(0, 500), st.integers(1, 300))
def test_any_window_of_steps_has_its_share_of_videos_up_to_one(percent, first, length):
    videos = sum(modality_at(percent / 100, step) == "video" for step in range(first, first + length))
    assert abs(videos - length * percent / 100) < 1


@pytest.mark.parametrize("percent", range(0, 101))
def test_a_hundred_steps_have_exactly_the_percentage_of_videos(percent):
    assert sum(modality_at(percent / 100, step) == "video" for step in range(100)) == percent


def test_videos_are_spread_evenly_not_bunched():
    places = [step for step in range(100) if modality_at(0.25, step) == "video"]
    assert {b - a for a, b in itertools.pairwise(places)} == {4}


def test_the_rate_warms_up_from_zero_and_falls_as_a_cosine_to_its_floor():
    leg = stage(warmup_samples=200, final_lr_ratio=0.1)
    assert lr_at(leg, 0) == 0.0
    assert lr_at(leg, 50) == pytest.approx(0.25 * 2e-3)
    assert lr_at(leg, 200) == pytest.approx(2e-3)
    assert lr_at(leg, 600) == pytest.approx(2e-3 * (0.1 + 0.9 * 0.5))
    assert lr_at(leg, 400) == pytest.approx(2e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert lr_at(leg, 1000) == lr_at(leg, 5000) == pytest.approx(2e-4)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert lr_at(stage(), 0) == 2e-3


def test_warm_up_stable_decay_stays_at_its_peak_and_falls_in_a_line():
    leg = stage(warmup_samples=100, lr_schedule="wsd", decay_samples=200, final_lr_ratio=0.5)
    assert lr_at(leg, 50) == pytest.approx(1e-3)
    assert lr_at(leg, 100) == lr_at(leg, 800) == 2e-3
    assert lr_at(leg, 900) == pytest.approx(1.5e-3)
    assert lr_at(leg, 1000) == lr_at(leg, 1001) == pytest.approx(1e-3)


def test_a_constant_rate_only_warms_up():
    leg = stage(warmup_samples=100, lr_schedule="constant")
    assert [lr_at(leg, done) for done in (25, 100, 1000)] == [5e-4, 2e-3, 2e-3]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_schedule": "wsd"}, "wsd needs decay_samples above 0"),
        ({"decay_samples": 10}, "remove it, or use wsd"),
        ({"lr_schedule": "wsd", "decay_samples": 600, "warmup_samples": 500}, "together exceed samples 1000"),
    ],
)
def test_a_schedule_that_does_not_fit_its_stage_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        stage(**settings)


@pytest.mark.parametrize(
    ("kind", "end", "wanted"),
    [
        ("constant", None, [0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", 0.2, [0.8, 0.65, 0.5, 0.2, 0.2]),
        ("cosine", 0.2, [0.8, 0.2 + 0.3 * (1 + math.cos(math.pi / 4)), 0.5, 0.2, 0.2]),
        ("cosine", 1.8, [0.8, 1.8 - 0.5 * (1 + math.cos(math.pi / 4)), 1.3, 1.8, 1.8]),
    ],
)
def test_the_weight_of_a_loss_moves_from_start_to_end_over_its_stage(kind, end, wanted):
    schedule = Schedule(kind=kind, start=0.8, end=end)
    assert [weight_at(schedule, done, 1000) for done in (0, 250, 500, 1000, 1003)] == pytest.approx(wanted)


def test_without_a_schedule_a_weight_is_zero():
    assert {weight_at(stage().distill, done, 1000) for done in (0, 500, 1000)} == {0.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"start": 1.0, "end": 0.5}, "stays at start 1; remove end 0.5"),
        ({"kind": "linear", "start": 1.0}, "kind linear moves from start 1 to end; add end"),
        ({"start": -1.0}, "greater than or equal to 0"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Schedule(**settings)


def test_a_teacher_is_needed_until_the_last_stage_that_distills():
    falling = Schedule(kind="linear", start=1.0, end=0.0)
    rising = Schedule(kind="cosine", start=0.0, end=1.0)
    stages = [stage("a"), stage("b", distill=falling), stage("c"), stage("d", distill=rising), stage("e")]
    needed = [distills_later(stages, Progress(stage=number, samples_in_stage=999)) for number in range(6)]
    assert needed == [True, True, True, True, False, False]


def test_a_stage_ends_with_the_step_that_reaches_its_samples():
    stages = [stage("a", 10), stage("b", 5)]
    progress = Progress()
    seen = []
    while not progress.finished(stages):
        seen.append((progress.stage, progress.step_in_stage, progress.samples_in_stage))
        progress = advance(progress, stages, samples=4, tokens=100, bad_samples=1)
    assert seen == [(0, 0, 0), (0, 1, 4), (0, 2, 8), (1, 0, 0), (1, 1, 4)]
    assert progress == Progress(stage=2, step=5, samples=20, tokens=500, bad_samples=5)


def test_a_step_that_ends_exactly_at_the_samples_ends_the_stage():
    assert advance(Progress(), [stage("a", 4), stage("b")], samples=4, tokens=1, bad_samples=0).stage == 1


def test_a_step_without_items_moves_on():
    progress = advance(Progress(), [stage()], samples=0, tokens=0, bad_samples=3)
    assert (progress.step, progress.samples, progress.stage) == (1, 0, 0)


def test_progress_survives_json():
    progress = Progress(1, 2, 3, 4, 5, 6, 7)
    assert Progress(**progress.to_dict()) == progress
