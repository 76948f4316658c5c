"""The bound of all comparisons: it accepts rounding errors, rejects an error of 1 %, or fails if it cannot."""

import re
from pathlib import Path

import pytest
import torch

from tests.support.closeness import AdamReach, assert_all_close, assert_sums_close, entry_bound

pytestmark = pytest.mark.numeric
TESTS = Path(__file__).parents[1]
LEFT_OUT = {
    "distributed/test_train.py",
    "distributed/test_stage_transition.py",
    "distributed/test_train_teacher.py",
    "distributed/test_classification.py",
    "integration/test_convert_matrix.py",
    "integration/test_slurm.py",
    "unit/formats/distributed/test_universal.py",
}
"""Whole runs of the trainer: minutes for the sums that the engine's tests have."""
TYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def product(terms: int, dtype: torch.dtype):
    """A matrix product, once in float64 and once in `dtype` from the last term to the first."""
    generator = torch.Generator().manual_seed(terms)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((40, terms), (terms, 30)))
    backwards = torch.zeros(40, 30, dtype=torch.promote_types(dtype, torch.float32))
    for term in reversed(range(terms)):
        backwards += a[:, term : term + 1].to(backwards.dtype) * b[term].to(backwards.dtype)
    return backwards.to(dtype), a.double() @ b.double()


@TYPES
@pytest.mark.parametrize("terms", [1, 7, 600])
def test_another_order_of_a_sum_passes_and_every_way_of_being_wrong_by_1_percent_fails(terms, dtype):
    got, wanted = product(terms, dtype)
    assert_sums_close(got, wanted, terms)
    largest = torch.where(wanted.abs() == wanted.abs().max(), 0.01, 0.0)
    for wrong in (wanted * 1.01, wanted * 0.99, wanted * (1 + largest)):
        with pytest.raises(AssertionError, match=r"instead of .* times what is allowed"):
            assert_sums_close(wrong.to(dtype) if dtype == torch.float64 else wrong.float(), wanted, terms)


def test_errors_of_a_model_in_bfloat16_pass_where_they_cancel_and_not_where_all_entries_share_them():
    wanted = torch.randn(60, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(60, 64, generator=torch.Generator().manual_seed(1)) * 2**-6 * wanted.abs().max()
    assert_sums_close(wanted + noise, wanted, 9, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="all entries together are wrong by"):
        assert_sums_close((wanted + noise) * 1.01, wanted, 9, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "loose", [{"dtype": torch.bfloat16}, {"reach": 0.1}, {"scale": 1e6}, {"dtype": torch.bfloat16, "reach": 0.1}]
)
def test_a_bound_that_cannot_detect_1_percent_is_refused_even_for_equal_values(loose):
    wanted = torch.tensor([1.0, 2.0])
    with pytest.raises(AssertionError, match="too wide to detect an error of 1%"):
        assert_sums_close(wanted, wanted, 100, **loose)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_not_close_to_a_number(wrong):
    with pytest.raises(AssertionError, match="instead of 2 at 1"):
        assert_sums_close(torch.tensor([1.0, wrong]), torch.tensor([1.0, 2.0]), 10)


def test_zero_must_be_zero_unless_a_scale_is_given():
    zero, rounding = torch.zeros(3), torch.full((3,), 1e-7)
    assert_sums_close(zero, zero, 10)
    assert_sums_close(rounding, zero, 10, scale=1.0)
    for wrong, scale in ((rounding, None), (rounding * 1e3, 1.0)):
        with pytest.raises(AssertionError):
            assert_sums_close(wrong, zero, 10, scale=scale)


def test_shapes_and_names_must_be_the_same():
    with pytest.raises(AssertionError, match=r"shape \(2,\) instead of \(1,\)"):
        assert_sums_close(torch.ones(2), torch.ones(1), 1)
    with pytest.raises(AssertionError):
        assert_all_close({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, 1)
    with pytest.raises(AssertionError, match=r"^b: 3 instead of 1"):
        assert_all_close({"a": torch.ones(1), "b": torch.full((1,), 3.0)}, dict.fromkeys("ab", torch.ones(1)), 1)


def adam(noise: float):
    """Weights after five steps with gradients 0, rounding alone, small and large; and how far they may miss."""
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.5)
    optimizer, reach = torch.optim.AdamW(model.parameters(), lr=1e-3), AdamReach(model, 100, torch.float32)
    for step in range(5):
        model.weight.grad = torch.tensor([[0.0, noise * (-1) ** step, 0.01 + noise, 1.0]])
        optimizer.step()
        reach.step(optimizer, 1e-3)
    return model.weight.detach(), reach.by_name["weight"]


def test_adam_reach_is_a_whole_step_for_rounding_errors_and_almost_0_for_a_real_gradient():
    (one, reach), (other, _) = adam(1e-7), adam(-1e-7)
    unused, rounded, small, large = reach.flatten().tolist()
    assert unused == 0
    assert rounded == pytest.approx(2 * 5 * 1e-3), "as far as two results can move apart"
    assert 0 < large < small < 1e-3 * 5 * 2 * 2 * entry_bound(500, 1, torch.float32) / 0.01
    assert (one - other).abs()[0, 1] > 1e-4
    assert_sums_close(one, other, 500, reach=reach)
    with pytest.raises(AssertionError, match="instead of"):
        assert_sums_close(one, other, 500)


def test_no_test_has_a_bound_of_its_own_and_tests_that_compare_sums_have_the_marker_numeric():
    for path in set(TESTS.rglob("test_*.py")) - {Path(__file__)}:
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(TESTS))
        own = re.search(r"torch\.testing(?!\._internal\.distributed)|allclose|[^_]rtol|\.norm\(\) <=", text)
        assert not own, f"{name} has a bound of its own: {own[0]}"
        if re.search(r"assert_(sums|all)_close\(", text) and name not in LEFT_OUT:
            # Triton's interpreter computes with numpy, whatever torch takes.
            assert re.search(r"pytest\.mark\.(numeric|kernels)", text), f"{name} lacks the marker `numeric`"
