"""The fused rotary embedding and norm against the reference in float64."""

import pytest
import torch

from tests.kernels.following import assert_follows_reference, assert_turned_close, drawn
from univitar_ds.kernels import reference
from univitar_ds.model.encoder import grid_positions

pytestmark = pytest.mark.kernels
MANY = [[1, 1, 1], [1, 2, 3], [2, 3, 1], [1, 1, 1], [1, 1, 2]]  # 16 tokens, videos and items of one token among them
EPS = 1e-2  # large enough to be missed


def case(heads: int, width: int, grids, device: str, dtype=torch.float32):
    positions = grid_positions(grids, 1).to(device)
    qkv = drawn(len(positions), 3, heads, width, seed=1, device=device, dtype=dtype)
    weights = [drawn(heads * width, seed=seed, device=device, dtype=dtype) for seed in (2, 3)]
    return positions, qkv, weights


def angle(positions) -> float:
    """How far an angle may be off: a relative 2^-22 of the largest (a product, and exp2 as the GPU has it)."""
    return positions.max().item() * 2**-22 if len(positions) else 0.0


def terms(qkv) -> int:
    """Of a norm over all heads, or of the gradient of its weight, which sums over tokens."""
    return qkv.shape[2] * qkv.shape[3] + len(qkv)


def follows(positions, inputs, *, theta=10000.0, normed=(True, True)):
    from univitar_ds.kernels.rope2d_qk_norm import rope2d_qk_norm

    def call(function):
        def run(qkv, *weights):
            left = list(weights)
            pair = [left.pop(0) if one else None for one in normed]
            return function(qkv, positions, *pair, theta=theta, eps=EPS)

        return run

    assert_follows_reference(
        call(rope2d_qk_norm), call(reference.rope2d_qk_norm), inputs, terms(inputs[0]), angle(positions)
    )


@pytest.mark.parametrize(
    ("heads", "width", "grids"),
    [
        (3, 64, MANY), (5, 80, [[1, 3, 3]]), (2, 96, [[1, 1, 1]]), (3, 120, [[1, 1, 3]]), (1, 128, [[1, 2, 1]]),
        (4, 16, [[1, 7, 9]]), (2, 24, MANY),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)}items",
)  # fmt: skip
def test_values_and_gradients_are_the_references(device, heads, width, grids):
    positions, qkv, weights = case(heads, width, grids, device)
    follows(positions, [qkv, *weights])


@pytest.mark.parametrize(("heads", "width"), [(16, 64), (16, 80), (24, 80), (16, 120)])
def test_the_models_own_widths_in_bfloat16(device, heads, width):
    positions, qkv, weights = case(heads, width, [[1, 1, 5]], device, torch.bfloat16)
    follows(positions, [qkv, *weights])


def test_far_rows_and_columns_turn_as_near_ones_do(device):
    _, qkv, weights = case(2, 12, [[1, 1, 3]], device)
    follows(torch.tensor([[0, 511], [300, 7], [1, 1]], device=device), [qkv, *weights])


@pytest.mark.parametrize("normed", [(False, False), (False, True)])
def test_either_norm_can_be_left_out(device, normed):
    positions, qkv, weights = case(2, 24, MANY, device)
    follows(positions, [qkv, *(weight for weight, one in zip(weights, normed, strict=True) if one)], normed=normed)


def test_theta_is_an_option(device):
    positions, qkv, weights = case(2, 16, MANY, device)
    follows(positions, [qkv, *weights], theta=100.0)


def test_an_empty_pack_has_no_rows_and_gradients_of_zero(device):
    positions, qkv, weights = case(2, 16, [], device)
    follows(positions, [qkv, *weights])


def test_values_pass_as_a_view(device):
    from univitar_ds.kernels.rope2d_qk_norm import rope2d_qk_norm

    positions, qkv, weights = case(2, 16, MANY, device)
    v = rope2d_qk_norm(qkv, positions, *weights, theta=1e4, eps=EPS)[2]
    assert v.data_ptr() == qkv[:, 2].data_ptr()
    assert torch.equal(v, qkv[:, 2])


def test_gradients_may_come_in_strides_or_not_at_all(device):
    """Attention may hand back parts of one tensor; a sum hands back one number, expanded."""
    from univitar_ds.kernels.rope2d_qk_norm import rope2d_qk_norm

    positions, qkv, weights = case(2, 16, MANY, device)
    whole = drawn(len(positions), 3, 2, 16, seed=9, device=device).detach()
    wanted_of = [x.detach().double().requires_grad_() for x in (qkv, *weights)]
    ours = rope2d_qk_norm(qkv, positions, *weights, theta=1e4, eps=EPS)
    theirs = reference.rope2d_qk_norm(wanted_of[0], positions, *wanted_of[1:], theta=1e4, eps=EPS)
    for grads in (whole.unbind(1), (whole[:, 0], torch.ones(1, 1, 1, device=device).expand(len(positions), 2, 16))):
        got = torch.autograd.grad(ours[: len(grads)], (qkv, *weights), grads, retain_graph=True)
        wanted = torch.autograd.grad(
            theirs[: len(grads)], wanted_of, [grad.double() for grad in grads], retain_graph=True
        )
        for mine, exact in zip(got, wanted, strict=True):
            assert_turned_close(mine, exact, terms(qkv), angle(positions), "gradient")
