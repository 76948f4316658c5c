"""The reference against loops written straight from the definitions, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.closeness import assert_sums_close
from univitar_ds import geometry
from univitar_ds.kernels import reference

THETA, EPS = 10000.0, 1e-6
HEADS = [(3, 64), (2, 80), (2, 120), (2, 24)]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm_by_loop(row, weight):
    rms = math.sqrt(sum(value * value for value in row) / len(row) + EPS)
    return [value / rms * scale for value, scale in zip(row, weight, strict=True)]


def turn_by_loop(head, row, column):
    """One head of K values: plane j is (j, j + K/2)."""
    width = len(head)
    quarter, half = width // 4, width // 2
    turned = [0.0] * width
    for plane in range(half):
        place, step = (row, plane) if plane < quarter else (column, plane - quarter)
        angle = place / THETA ** (2 * step / half)
        a, b = head[plane], head[plane + half]
        turned[plane] = a * math.cos(angle) - b * math.sin(angle)
        turned[plane + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def test_the_patch_sizes_are_the_projects():
    assert (reference.PATCH, reference.TUBELET) == (geometry.PATCH, geometry.TUBELET)


@pytest.mark.numeric
@pytest.mark.parametrize(("heads", "width"), HEADS)
def test_rope_then_norm_over_all_heads_equals_the_loop(heads, width):
    qkv = draw(5, 3, heads, width)
    positions = torch.tensor([[0, 0], [0, 3], [7, 0], [11, 5], [2, 64]])
    weights = [draw(heads * width, seed=seed) for seed in (1, 2)]
    q, k, v = reference.rope2d_qk_norm(qkv, positions, *weights, theta=THETA, eps=EPS)
    for part, result, weight in ((0, q, weights[0]), (1, k, weights[1])):
        for token, (row, column) in enumerate(positions.tolist()):
            turned = [value for head in qkv[token, part].tolist() for value in turn_by_loop(head, row, column)]
            wanted = torch.tensor(norm_by_loop(turned, weight.tolist()), dtype=torch.float64)
            assert_sums_close(result[token].flatten(), wanted, heads * width)
    assert torch.equal(v, qkv[:, 2])


@pytest.mark.numeric
@pytest.mark.parametrize(("heads", "width"), HEADS)
def test_rope_without_weights_turns_only(heads, width):
    qkv, positions = draw(3, 3, heads, width), torch.tensor([[1, 2], [3, 4], [50, 60]])
    q, _, _ = reference.rope2d_qk_norm(qkv, positions, None, None, theta=THETA, eps=EPS)
    wanted = [
        [turn_by_loop(head, *place) for head in token]
        for token, place in zip(qkv[:, 0].tolist(), positions.tolist(), strict=True)
    ]
    assert_sums_close(q, torch.tensor(wanted, dtype=torch.float64), terms=60)  # up to a turn by 60


@pytest.mark.numeric
def test_scores_after_rope_depend_on_the_distance_alone():
    q, k = draw(1, 1, 64), draw(1, 1, 64, seed=1)
    at = lambda x, row, column: reference.rope2d(x, torch.tensor([[row, column]]), THETA)  # noqa: E731
    near = (at(q, 3, 4) * at(k, 1, 9)).sum()
    assert_sums_close(near, (at(q, 13, 24) * at(k, 11, 29)).sum(), 64, scale=(q.norm() * k.norm()).item())


@pytest.mark.numeric
def test_swiglu_norm_equals_the_loop():
    gate, up, weight = draw(4, 9), draw(4, 9, seed=1), draw(9, seed=2)
    result = reference.swiglu_norm(gate, up, weight, EPS)
    for row in range(4):
        gated = [a / (1 + math.exp(-a)) * b for a, b in zip(gate[row].tolist(), up[row].tolist(), strict=True)]
        wanted = torch.tensor(norm_by_loop(gated, weight.tolist()), dtype=torch.float64)
        assert_sums_close(result[row], wanted, terms=9)


@pytest.mark.numeric
def test_add_norm_equals_the_loop():
    x, branch, scale, weight = draw(4, 7), draw(4, 7, seed=1), draw(7, seed=2), draw(7, seed=3)
    total, normed = reference.add_norm(x, branch, scale, weight, EPS)
    for row in range(4):
        wanted = [a + s * b for a, s, b in zip(x[row].tolist(), scale.tolist(), branch[row].tolist(), strict=True)]
        assert_sums_close(total[row], torch.tensor(wanted, dtype=torch.float64), terms=2)
        normal = torch.tensor(norm_by_loop(wanted, weight.tolist()), dtype=torch.float64)
        assert_sums_close(normed[row], normal, terms=7)


@pytest.mark.numeric
@pytest.mark.parametrize("operation", ["rope", "swiglu", "add"])
def test_gradients_equal_finite_differences(operation):
    inputs = [draw(3, 8, seed=seed).requires_grad_() for seed in range(2)]
    scale, weight = draw(8, seed=5).requires_grad_(), draw(8, seed=6).requires_grad_()
    positions = torch.tensor([[0, 1], [5, 2], [3, 3]])
    function = {
        "rope": lambda x, _, s, w: reference.rope2d_norm(x.view(3, 2, 4), positions, w, theta=THETA, eps=EPS),
        "swiglu": lambda a, b, s, w: reference.swiglu_norm(a, b, w, EPS),
        "add": lambda a, b, s, w: reference.add_norm(a, b, s, w, EPS),
    }[operation]
    assert torch.autograd.gradcheck(function, (*inputs, scale, weight))


@pytest.mark.numeric
def test_bfloat16_is_computed_wide_and_rounded_once():
    x, weight = draw(64, 256).bfloat16(), draw(256, seed=1).bfloat16()
    wide = reference.rms_norm(x.double(), weight.double(), EPS)
    result = reference.rms_norm(x, weight, EPS)
    assert result.dtype == torch.bfloat16
    assert_sums_close(result, wide, 256)


def patchify_by_loop(pixels, frames, grids, merge):
    rows, byte = [], 0
    for count, (t, h, w) in zip(frames, grids, strict=True):
        size = count * h * 14 * w * 14 * 3
        video = pixels[byte : byte + size].view(count, h * 14, w * 14, 3)
        byte += size
        for step in range(t):
            for block_y in range(h // merge):
                for block_x in range(w // merge):
                    for y in range(block_y * merge, (block_y + 1) * merge):
                        for x in range(block_x * merge, (block_x + 1) * merge):
                            both = [0, 0] if count == 1 else [2 * step, 2 * step + 1]
                            cell = video[both, y * 14 : y * 14 + 14, x * 14 : x * 14 + 14]
                            rows.append(cell.permute(3, 0, 1, 2).reshape(-1))
    return torch.stack(rows)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
    st.sampled_from([1, 2]),
)
def test_patches_equal_the_loop(items, merge):
    frames = [max(1, 2 * steps) for steps, _, _ in items]
    grids = [(max(1, steps), h * merge, w * merge) for steps, h, w in items]
    size = sum(count * h * w * 588 for count, (_, h, w) in zip(frames, grids, strict=True))
    pixels = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    assert torch.equal(reference.patchify(pixels, frames, grids, merge), patchify_by_loop(pixels, frames, grids, merge))


def test_an_empty_pack_has_no_patches():
    patches = reference.patchify(torch.empty(0, dtype=torch.uint8), [], [], 1)
    assert patches.shape == (0, 1176)
    assert reference.normalise(patches, (0.5,) * 3, (0.5,) * 3).shape == (0, 1176)


def test_pixels_that_do_not_fill_the_grid_are_a_bug_and_raise():
    with pytest.raises(ValueError, match="frames do not match t"):
        reference.patchify(torch.zeros(3 * 588, dtype=torch.uint8), [3], [(1, 1, 1)], 1)
    with pytest.raises(ValueError, match="pixel bytes"):
        reference.patchify(torch.zeros(2 * 588, dtype=torch.uint8), [1], [(1, 1, 1)], 1)


@pytest.mark.numeric
def test_normalising_is_per_channel():
    patches = torch.arange(1176).remainder(256).to(torch.uint8)[None]
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    wanted = [(patches[0, i].item() / 255 - mean[i // 392]) / std[i // 392] for i in range(1176)]
    assert_sums_close(reference.normalise(patches, mean, std)[0], torch.tensor(wanted, dtype=torch.float64), terms=3)
