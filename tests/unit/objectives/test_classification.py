"""The classification loss, compared with torch's cross-entropy on each set."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.closeness import assert_sums_close
from univitar_ds.objectives.classification import Targets, class_loss

BEGIN, END = (0, 3, 0, 3, 0), (3, 8, 3, 8, 3)  # two sets, of 3 and of 5 classes
FIRST, SECOND, SHARE = (2, 3, 0, 7, -1), (2, 6, 1, 7, -1), (1.0, 0.3, 0.75, 0.5, 1.0)


def targets(**changes) -> Targets:
    values = {"first": FIRST, "second": SECOND, "begin": BEGIN, "end": END} | changes
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    return Targets(**{"share": torch.tensor(SHARE), **tensors})


def logits() -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.numeric
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_a_cross_entropy_over_the_classes_of_each_set(smoothing):
    own = logits().requires_grad_()
    class_loss(own, targets(), smoothing).backward()
    plain = logits().double().requires_grad_()
    wanted = 0.0
    for row, (first, second, share) in enumerate(zip(FIRST, SECOND, SHARE, strict=True)):
        if first >= 0:
            part = plain[row : row + 1, BEGIN[row] : END[row]]
            for label, weight in ((first, share), (second, 1 - share)):
                label = torch.tensor([label - BEGIN[row]])
                wanted = wanted + weight * F.cross_entropy(part, label, label_smoothing=smoothing)
    wanted.backward()
    assert_sums_close(class_loss(logits(), targets(), smoothing), wanted.item(), terms=5 * 8)
    assert_sums_close(own.grad, plain.grad, terms=8)
    outside = torch.tensor([[not b <= c < e for c in range(8)] for b, e in zip(BEGIN, END, strict=True)])
    assert not own.grad[outside].any()
    assert not own.grad[4].any()


def test_items_of_unknown_sets_and_empty_packs_have_no_loss_and_a_gradient_of_zero():
    for rows in (logits()[:2], torch.empty(0, 8)):
        rows = rows.clone().requires_grad_()
        none = [-1] * len(rows)
        fields = {name: torch.tensor(none, dtype=torch.int64) for name in ("first", "second")}
        zeros = torch.zeros(len(rows), dtype=torch.int64)
        loss = class_loss(rows, Targets(**fields, share=torch.ones(len(rows)), begin=zeros, end=zeros), 0.1)
        loss.backward()
        assert loss.item() == 0.0
        assert not rows.grad.any()
        assert rows.grad.isfinite().all()


def test_half_precision_is_summed_in_float32():
    rows = logits().bfloat16()
    assert class_loss(rows, targets()).dtype == torch.float32
    assert torch.equal(class_loss(rows, targets()), class_loss(rows.float(), targets()))
