"""The RMSNorm kernel against the reference in float64."""

import pytest
import torch

from tests.kernels.following import assert_follows_reference, drawn
from univitar_ds.kernels import reference

pytestmark = pytest.mark.kernels
EPS = 1e-2


@pytest.mark.parametrize(
    ("tokens", "width", "dtype"),
    [(0, 64, torch.float32), (1, 7, torch.float32), (61, 96, torch.float32), (5, 1280, torch.bfloat16)],
)
def test_values_and_gradients_are_the_references(device, tokens, width, dtype):
    from univitar_ds.kernels.rms_norm import rms_norm

    inputs = [
        drawn(tokens, width, seed=1, device=device, dtype=dtype), drawn(width, seed=2, device=device, dtype=dtype)
    ]  # fmt: skip
    assert_follows_reference(
        lambda x, w: rms_norm(x, w, EPS), lambda x, w: reference.rms_norm(x, w, EPS), inputs, tokens + width
    )
