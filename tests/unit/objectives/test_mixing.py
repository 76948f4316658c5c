"""Mixing of items of equal size: which are mixed, with what share, and the resulting pixels."""

import numpy as np
import pytest
import torch

from univitar_ds.geometry import item_bytes
from univitar_ds.objectives.mixing import Box, Mix, mix_pixels, plan_mixing

GRIDS = [[1, 2, 2], [1, 2, 3], [1, 2, 2], [1, 3, 2], [1, 2, 2], [1, 2, 2], [1, 2, 3], [1, 2, 2]]
GROUPS = ["pets", "pets", "pets", "pets", None, "cars", "pets", "pets"]


def plan(**changes):
    settings = {"mixup": 1.0, "cutmix": 0.0, "key": (0, 1, 2)} | changes
    return plan_mixing(GRIDS, GROUPS, **settings)


def test_only_items_of_one_size_and_group_are_mixed_each_with_another_one():
    found = plan()
    assert [index for index, mix in enumerate(found) if mix is None] == [3, 4, 5]
    for some in ({0, 2, 7}, {1, 6}):
        assert {found[index].partner for index in some} == some
        assert all(found[index].partner != index for index in some)


def test_nothing_is_mixed_when_both_are_off():
    assert plan(mixup=0.0) == [None] * 8


def test_a_plan_depends_on_its_key_alone():
    np.random.seed(1)
    one = plan(cutmix=1.0)
    np.random.seed(2)
    assert plan(cutmix=1.0) == one
    assert plan(cutmix=1.0, key=(0, 1, 3)) != one


@pytest.mark.parametrize(("settings", "kinds"), [
    ({}, {False}), ({"mixup": 0.0, "cutmix": 1.0}, {True}), ({"cutmix": 1.0}, {False, True}),
])  # fmt: skip
def test_shares_are_drawn_from_the_whole_range(settings, kinds):
    found = [mix for number in range(200) for mix in plan(**settings, key=(number,)) if mix]
    assert {mix.box is not None for mix in found} == kinds
    shares = np.array([mix.share for mix in found])  # Beta(1, 1) is uniform
    assert abs(shares.mean() - 0.5) < 0.05
    assert shares.min() < 0.05
    assert shares.max() > 0.95


def test_a_small_parameter_leaves_most_items_nearly_as_they_are_or_replaced():
    shares = np.array([mix.share for number in range(200) for mix in plan(mixup=0.1, key=(number,)) if mix])
    assert (np.minimum(shares, 1 - shares) < 0.1).mean() > 0.6


def packed(grids, frames, seed=0) -> torch.Tensor:
    total = sum(item_bytes(grid, count) for grid, count in zip(grids, frames, strict=True))
    return torch.randint(0, 256, (total,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_pixels_are_averaged_or_cut_from_the_original_partner():
    grids, frames = [[1, 2, 3], [1, 2, 3], [2, 2, 3], [2, 2, 3]], [1, 1, 4, 4]
    pixels = packed(grids, frames)
    before = pixels.clone()
    mixed = mix_pixels(
        pixels, frames, grids,
        [Mix(1, 0.25, None), Mix(0, 0.5, None), None, Mix(2, 0.5, Box(3, 5, 20, 41))],
    )  # fmt: skip
    assert torch.equal(pixels, before)
    assert mixed.dtype == torch.uint8
    size = item_bytes(grids[0], 1)
    a, b = before[:size].double(), before[size : 2 * size].double()
    assert torch.equal(mixed[:size], (0.25 * a + 0.75 * b).round().to(torch.uint8))
    assert torch.equal(mixed[size : 2 * size], (0.5 * a + 0.5 * b).round().to(torch.uint8))
    c, d, cut = (
        part.view(4, 28, 42, 3) for part in (before[2 * size : 6 * size], before[6 * size :], mixed[6 * size :])
    )
    assert torch.equal(mixed[2 * size : 6 * size].view(4, 28, 42, 3), c)
    wanted = d.clone()
    wanted[:, 3:20, 5:41] = c[:, 3:20, 5:41]
    assert torch.equal(cut, wanted)


def test_the_share_of_a_cut_is_the_area_that_stays():
    grids, frames = [[1, 4, 3], [1, 4, 3]], [1, 1]
    pixels = torch.cat([torch.zeros(item_bytes(grids[0], 1)), torch.full((item_bytes(grids[0], 1),), 255)])
    pixels = pixels.to(torch.uint8)
    for number in range(50):
        mixing = plan_mixing(grids, ["a", "a"], mixup=0.0, cutmix=1.0, key=(number,))
        first, second = mix_pixels(pixels, frames, grids, mixing).chunk(2)
        assert abs((first == 0).double().mean().item() - mixing[0].share) < 1e-12
        assert abs((second == 255).double().mean().item() - mixing[1].share) < 1e-12
