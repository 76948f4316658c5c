"""The residual sum and its norm against the reference in float64."""

import pytest
import torch

from tests.kernels.following import add_norm_of, assert_follows_reference, drawn

pytestmark = pytest.mark.kernels
EPS = 1e-2


@pytest.mark.parametrize(
    ("tokens", "width", "dtype"),
    [(0, 64, torch.float32), (1, 7, torch.float32), (61, 96, torch.float32), (5, 1920, torch.bfloat16)],
)
def test_values_and_gradients_are_the_references(device, tokens, width, dtype):
    from univitar_ds.kernels.add_norm import add_norm

    inputs = [drawn(tokens, width, seed=seed, device=device, dtype=dtype) for seed in (1, 2)]
    inputs += [drawn(width, seed=seed, device=device, dtype=dtype) for seed in (3, 4)]
    stored = add_norm(*inputs, EPS)[0].detach()
    assert_follows_reference(
        lambda *x: add_norm(*x, EPS), lambda *x: add_norm_of(stored)(*x, EPS), inputs, tokens + width
    )
