import pytest
import torch

from tests.support.closeness import assert_sums_close
from univitar_ds.objectives.distill import DISTANCES, distill

both = pytest.mark.parametrize("kind", DISTANCES)


def rows(count: int, *, width: int = 6, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=g), 2 * torch.randn(count, width, generator=g)


def by_formula(student, teacher, kind):
    """Sum over rows, and of their cosines, in double precision and one row at a time."""
    total, agreement = torch.zeros((), dtype=torch.float64), 0.0
    for s, t in zip(student.double(), teacher.double(), strict=True):
        cosine = (s @ t) / (s.norm() * t.norm())
        gap = (s - t).abs()
        huber = torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).sum() / len(s)
        total = total + (1 - cosine if kind == "cosine" else huber)
        agreement += cosine.item()
    return total, agreement


@pytest.mark.numeric
@both
def test_sum_agreement_and_gradient_are_those_of_the_formula(kind):
    student, teacher = rows(9)
    student.requires_grad_()
    total, agreement = distill(student, teacher, torch.ones(9, dtype=torch.bool), kind)
    wanted, wanted_agreement = by_formula(student, teacher, kind)
    assert_sums_close(total, wanted, 9 * 6)
    assert_sums_close(agreement, wanted_agreement, 9 * 6, scale=9.0)
    assert not agreement.requires_grad
    [got] = torch.autograd.grad(total, student)
    [grad] = torch.autograd.grad(wanted, student)
    assert_sums_close(got, grad, 9 * 6)


@pytest.mark.numeric
@both
@pytest.mark.parametrize("rubbish", [0.0, 1e30, float("nan"), float("inf")])
def test_masked_rows_add_nothing_for_any_content(kind, rubbish):
    student, teacher = rows(7)
    valid = torch.tensor([True, False, True, True, False, False, True])
    wanted, wanted_agreement = by_formula(student[valid], teacher[valid], kind)
    student[~valid], teacher[~valid] = rubbish, rubbish
    student.requires_grad_()
    total, agreement = distill(student, teacher, valid, kind)
    assert_sums_close(total, wanted, 7 * 6)
    assert_sums_close(agreement, wanted_agreement, 7 * 6, scale=7.0)
    [grad] = torch.autograd.grad(total, student)
    assert not grad[~valid].any()
    assert grad[valid].any(1).all()


@pytest.mark.numeric
@both
def test_a_student_equal_to_its_teacher_has_a_gradient_of_zero(kind):
    student, _ = rows(5)
    total, agreement = distill(student, student.clone(), torch.ones(5, dtype=torch.bool), kind)
    assert_sums_close(total, 0.0, 5 * 6, scale=5.0)
    assert_sums_close(agreement, 5.0, 5 * 6)


@both
def test_without_rows_the_sum_is_zero_and_has_a_gradient_graph(kind):
    head = torch.nn.Linear(3, 6)
    total, agreement = distill(head(torch.empty(0, 3)), torch.empty(0, 6), torch.empty(0, dtype=torch.bool), kind)
    total.backward()
    assert total.item() == agreement.item() == 0.0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


@pytest.mark.numeric
@both
def test_half_precision_is_compared_in_float32_and_the_teacher_gets_no_gradient(kind):
    student, teacher = (side.bfloat16().requires_grad_() for side in rows(40))
    total, _ = distill(student, teacher, torch.ones(40, dtype=torch.bool), kind)
    assert total.dtype == torch.float32
    assert_sums_close(total, by_formula(student, teacher, kind)[0], 40 * 6)
    total.backward()
    assert student.grad is not None
    assert teacher.grad is None
