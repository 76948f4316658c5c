"""The progress of a run, on a terminal and in a file."""

import itertools

from univitar_ds.config.stage import StageConfig
from univitar_ds.training.logging.progress import Outlook, Pace, ProgressLine, steps_text
from univitar_ds.training.step.curriculum import Progress, advance

SIZES = {"min_tokens": 4, "max_tokens": 24, "divisor_px": 14}


def stages(*lengths):
    return [
        StageConfig(name=f"s{number}", samples=samples, image=SIZES, video=SIZES, token_budget=96, lr=1e-3)
        for number, samples in enumerate(lengths)
    ]


def paced(lengths, steps, *, items=10, seconds=2.0, first_s=50.0, start=None):
    """A pace after `steps` steps of `items` samples; the first takes `first_s`, the others `seconds`."""
    times = itertools.chain([0.0], itertools.count(first_s, seconds))
    plan, progress = stages(*lengths), start or Progress()
    pace = Pace(plan, progress, clock=lambda: next(times))
    for _ in range(steps):
        progress = advance(progress, plan, samples=items, tokens=items, bad_samples=0)
        pace.add(progress)
    return pace.outlook()


def test_before_the_first_step_nothing_is_estimated():
    outlook = paced([100], 0)
    assert (outlook.percent, outlook.steps, outlook.eta) == (0.0, None, "ETA unknown")
    assert steps_text(0, outlook) == "step 0"


def test_steps_and_time_left_follow_from_the_last_steps_and_not_from_the_first():
    outlook = paced([200], 5)
    assert (outlook.percent, outlook.steps) == (25.0, 20)
    assert (outlook.remaining_s, outlook.samples_per_s) == (30.0, 5.0)
    assert steps_text(5, outlook) == "step 5 of ~20"


def test_the_first_step_alone_gives_an_estimate():
    outlook = paced([100], 1)
    assert (outlook.steps, outlook.remaining_s) == (10, 450.0)


def test_all_stages_count_and_the_surplus_of_a_stage_does_not():
    outlook = paced([25, 75], 4)  # 3 steps of 10 end the first stage
    assert outlook.percent == 35.0
    assert outlook.steps == 4 + 7


def test_a_resumed_run_continues_from_its_progress_and_measures_this_launch():
    outlook = paced([200], 2, start=Progress(step=10, step_in_stage=10, samples_in_stage=100, samples=100))
    assert (outlook.percent, outlook.steps, outlook.remaining_s) == (60.0, 20, 16.0)


def test_at_the_end_the_steps_are_exact():
    outlook = paced([20, 30], 5)
    assert (outlook.percent, outlook.remaining_s) == (100.0, 0.0)
    assert steps_text(5, outlook) == "step 5 of 5"


def test_a_step_without_items_gives_no_estimate_and_no_division_by_zero():
    assert paced([100], 1, items=0).eta == "ETA unknown"


def test_the_line_names_stage_step_percent_time_loss_speed_and_mfu():
    line = ProgressLine(stages(10, 20))
    outlook = Outlook(12.34, 400, 3723.0, 9.87)
    assert line.text(0, 57, 3.43731, outlook) == (
        "s0 (1 of 2) | step 57 of ~400 | 12.3 % | ETA 1 h 02 min | loss 3.4373 | 9.9 samples/s"
    )
    line.note({"mfu_pct": 41.7})
    assert line.text(1, 57, 3.0, outlook).endswith("9.9 samples/s | mfu 42 %")
    assert ProgressLine(stages(10)).text(0, 1, 3.0, outlook).startswith("s0 | step 1 of")


def test_a_time_without_steps_is_left_out():
    now = [0.0]
    plan, progress = stages(100), Progress()
    pace = Pace(plan, progress, clock=lambda: now[0])
    for seconds in (50.0, 2.0, 2.0):
        now[0] += seconds
        progress = advance(progress, plan, samples=10, tokens=10, bad_samples=0)
        pace.add(progress)
        now[0] += 1000.0
        pace.leave_out(1000.0)
    assert (pace.outlook().samples_per_s, pace.outlook().remaining_s) == (5.0, 14.0)
