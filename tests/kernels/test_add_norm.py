"""The residual sum and its norm against the reference in float64."""

import pytest
import torch

from kernels import reference
from tests.kernels.closeness import SUMS, assert_follows_reference, drawn, rounding

pytestmark = pytest.mark.kernels
EPS = 1e-2


@pytest.mark.parametrize(
    ("tokens", "width", "dtype"),
    [(0, 64, torch.float32), (1, 7, torch.float32), (61, 96, torch.float32), (5, 1920, torch.bfloat16)],
)
def test_values_and_gradients_are_the_references(device, tokens, width, dtype):
    from kernels.add_norm import add_norm

    inputs = [drawn(tokens, width, seed=seed, device=device, dtype=dtype) for seed in (1, 2)]
    inputs += [drawn(width, seed=seed, device=device, dtype=dtype) for seed in (3, 4)]
    # The norm is that of the sum as it is stored: every value of it is rounded before and after.
    slack = SUMS + (rounding(dtype) if dtype == torch.bfloat16 else 0)
    assert_follows_reference(
        lambda *x: add_norm(*x, EPS), lambda *x: reference.add_norm(*x, EPS), inputs, slack, roundings=2
    )
