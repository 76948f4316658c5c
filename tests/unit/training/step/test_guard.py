"""Spikes are values far above the recent median of the same stage and modality, and nothing else."""

import json
import math
import random

import pytest
import torch

from univitar_ds.config.schema import GuardConfig
from univitar_ds.training.step.guard import History, nan_if_not_finite, spike_reason

CFG = GuardConfig(spike_deviations=10.0, window_steps=32, min_steps=8)


def history(steps=32, stage=0, modality="image", seed=0):
    """Losses near 2 that fall a little, gradient norms near 0.5 that differ by factors."""
    draw = random.Random(seed)
    past = History()
    for step in range(steps):
        loss, norm = 2 - 0.01 * step + draw.gauss(0, 0.05), 0.5 * 1.3 ** draw.gauss(0, 1)
        past.add(stage, modality, loss, norm, CFG.window_steps)
    return past


@pytest.mark.parametrize("seed", range(20))
def test_an_ordinary_step_is_not_a_spike(seed):
    draw = random.Random(100 + seed)
    loss, norm = 1.7 + draw.gauss(0, 0.05), 0.5 * 1.3 ** draw.gauss(0, 1)
    assert spike_reason(history(seed=seed), 0, "image", loss, norm, CFG) is None


def test_a_loss_or_gradient_norm_far_above_its_median_is_reported_with_its_numbers():
    story = spike_reason(history(), 0, "image", 6.0, 0.5, CFG)
    assert "the loss is 6, " in story
    assert "over the last 32 image steps" in story
    assert "guard.spike_deviations 10" in story
    assert "the gradient norm is 50" in spike_reason(history(), 0, "image", 1.8, 50.0, CFG)


def test_a_step_far_below_its_median_is_no_spike():
    assert spike_reason(history(), 0, "image", 0.01, 1e-4, CFG) is None


def test_another_stage_another_modality_or_too_few_steps_have_no_spikes():
    assert spike_reason(history(), 1, "image", 1e6, 1e6, CFG) is None
    assert spike_reason(history(), 0, "video", 1e6, 1e6, CFG) is None
    assert spike_reason(history(steps=7), 0, "image", 1e6, 1e6, CFG) is None
    assert spike_reason(history(steps=8), 0, "image", 1e6, 1e6, CFG) is not None
    assert spike_reason(history(), 0, "image", 1e6, 1e6, CFG.model_copy(update={"spike_deviations": None})) is None


def test_a_loss_that_hardly_moves_does_not_make_a_spike_of_a_small_change():
    past = History()
    for _ in range(16):
        past.add(0, "image", 2.0, 1.0, CFG.window_steps)
    assert spike_reason(past, 0, "image", 2.3, 2.0, CFG) is None
    assert spike_reason(past, 0, "image", 2.5, 1.0, CFG) is not None


def test_the_window_slides_and_a_new_stage_empties_it():
    past = history(steps=100)
    assert len(past.values["image"]) == CFG.window_steps
    past.add(1, "video", 1.0, 1.0, CFG.window_steps)
    assert past.values == {"video": [(1.0, 1.0)]}


def test_it_survives_a_checkpoint():
    past = history()
    assert History.from_dict(json.loads(json.dumps(past.to_dict()))) == past


def test_skipped_steps_are_counted_until_a_good_one_and_survive_a_checkpoint():
    past = history()
    past.skipped = 3
    assert History.from_dict(json.loads(json.dumps(past.to_dict()))).skipped == 3
    past.add(0, "image", 2.0, 1.0, CFG.window_steps)
    assert past.skipped == 0


def test_the_history_of_a_checkpoint_of_an_earlier_version_has_no_skipped_step():
    content = {"stage": 1, "values": {"image": [[2.0, 1.0]]}}
    assert History.from_dict(content) == History(1, {"image": [(2.0, 1.0)]}, 0)


@pytest.mark.parametrize(("factor", "wanted"), [(0.3, 0.3), (float("inf"), float("nan")), (float("nan"), float("nan"))])
def test_a_loss_that_is_not_finite_has_a_gradient_that_is_not_either(factor, wanted):
    weight, offset = torch.ones(3, requires_grad=True), torch.tensor(factor)
    finite = factor if math.isfinite(factor) else 1.0
    loss = nan_if_not_finite((finite * weight).sum() + offset)  # without the guard its gradient is finite
    loss.backward()
    assert [str(value) for value in weight.grad.tolist()] == [str(torch.tensor(wanted).item())] * 3
