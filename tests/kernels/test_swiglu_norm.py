"""The gated norm's kernel against the reference in float64."""

import pytest
import torch

from tests.kernels.following import assert_follows_reference, drawn
from tests.support.closeness import assert_sums_close
from univitar_ds.kernels import reference

pytestmark = pytest.mark.kernels
EPS = 1e-2


@pytest.mark.parametrize(
    ("tokens", "width", "dtype"),
    [
        (0, 64, torch.float32), (1, 7, torch.float32), (61, 96, torch.float32), (3, 2816, torch.float32),
        (5, 3456, torch.bfloat16),
    ],
)  # fmt: skip
def test_values_and_gradients_are_the_references(device, tokens, width, dtype):
    from univitar_ds.kernels.swiglu_norm import swiglu_norm

    inputs = [drawn(tokens, width, seed=seed, device=device, dtype=dtype) for seed in (1, 2)]
    inputs.append(drawn(width, seed=3, device=device, dtype=dtype))
    assert_follows_reference(
        lambda *x: swiglu_norm(*x, EPS), lambda *x: reference.swiglu_norm(*x, EPS), inputs, tokens + width
    )


def test_gates_far_from_zero_close_or_open_whole(device):
    from univitar_ds.kernels.swiglu_norm import swiglu_norm

    gate = torch.tensor([[-120.0, -80.0, 80.0, 120.0]], device=device)
    ones = torch.ones(1, 4, device=device)
    result = swiglu_norm(gate, ones, ones[0], EPS)
    assert_sums_close(result, reference.swiglu_norm(gate.double(), ones.double(), ones[0].double(), EPS), terms=4)
    assert result[0, :2].abs().max() < 1e-30
