"""The stated FLOPs, compared with what torch counts while the encoder runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.model.made import drawn_patches, small_encoder
from univitar_ds.geometry import token_count
from univitar_ds.model.flops import cost_coefficients, flops_per_item

GRIDS = [[1, 4, 6], [2, 2, 4], [1, 9, 3]]


def test_forward_flops_are_what_torch_counts():
    model = small_encoder(num_hidden_layers=3, num_attention_heads=2)
    # The counter does not count the CPU's fused attention; plain attention has the same arithmetic.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(drawn_patches(GRIDS), GRIDS)
    assert sum(flops_per_item(model.config, grid) for grid in GRIDS) == counter.get_total_flops()


def test_a_step_costs_three_forward_passes():
    config = small_encoder().config
    a, b = cost_coefficients(config)
    tokens = [token_count(grid) for grid in GRIDS]
    cost = a * sum(tokens) + b * sum(count**2 for count in tokens)
    assert cost == pytest.approx(3 * sum(flops_per_item(config, grid) for grid in GRIDS), rel=1e-12)
