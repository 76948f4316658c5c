"""Parts of pages: colours that distinguish tokens, tokens in their places, frames, sizes of images."""

from __future__ import annotations

import pytest
import torch

from univitar_ds.geometry import PATCH
from univitar_ds.model.encoder import grid_positions, raster_order
from univitar_ds.viz.sheet import component_colours, spread_frames, to_size


def test_colours_distinguish_groups_of_tokens_and_agree_between_items():
    groups = torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0]])
    noise = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    one = groups.repeat_interleave(20, 0) + 0.01 * noise
    (first, second), _ = component_colours([one, one[:30]])
    assert first.dtype == torch.uint8
    assert torch.equal(first[:30], second)
    centres = first.float().view(3, 20, 3).mean(1)
    assert torch.pdist(centres).min() > 100


def test_colours_are_those_of_the_principal_components():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(300, 40, generator=generator) * torch.linspace(1.0, 0.1, 40) ** 2 + 5.0
    centred = (tokens - tokens.mean(0)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    values = centred @ vectors[:, -3:].flip(1)
    (colours,), shares = component_colours([tokens])
    for colour, value in zip(colours.T.double(), values.T, strict=True):
        inside = (colour > 0) & (colour < 255)
        assert torch.corrcoef(torch.stack((colour[inside], value[inside])))[0, 1].abs() > 0.9999
    variances = torch.linalg.eigvalsh(centred.T @ centred).flip(0)
    assert shares == pytest.approx((variances[:3] / variances.sum()).tolist(), abs=1e-3)


def test_colours_of_equal_tokens_are_equal():
    (colours,), shares = component_colours([torch.ones(5, 6)])
    assert shares == [0, 0, 0]
    assert colours.shape == (5, 3)
    assert (colours == colours[0]).all()


@pytest.mark.parametrize(("grid", "merge"), [((1, 4, 6), 1), ((2, 4, 6), 2), ((3, 3, 9), 3)])
def test_tokens_of_the_encoder_come_back_row_by_row(grid, merge):
    places = raster_order(grid_positions([grid], merge), grid, merge)
    t, h, w = grid
    wanted = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)
    assert torch.equal(places, wanted.expand(t, h, w, 2))


def test_frames_are_spread_from_the_first_to_the_last():
    assert spread_frames(8, 3) == [0, 4, 7]
    assert spread_frames(2, 3) == [0, 1]
    assert spread_frames(1, 3) == [0]


@pytest.mark.parametrize(("rows", "columns", "size"), [(2, 2, (50, 50)), (2, 10, (80, 16)), (10, 1, (5, 50))])
def test_an_image_and_its_tokens_get_the_same_size_and_keep_their_proportions(rows, columns, size):
    pixels = torch.zeros(rows * PATCH, columns * PATCH, 3, dtype=torch.uint8)
    assert to_size(pixels, 50, 80).size == size
    assert to_size(pixels[:rows, :columns], 50, 80).size == size


def test_an_enlarged_image_has_only_colours_of_the_image():
    pixels = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8)[..., None].expand(2, 2, 3)
    assert len(to_size(pixels, 50, 80).getcolors()) == 2
    assert len(to_size(pixels.repeat(40, 40, 1), 51, 80).getcolors()) > 2, "a smaller one is smoothed"
