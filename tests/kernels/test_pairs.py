"""The losses of pairs in every implementation, against their formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.closeness import assert_sums_close
from univitar_ds.kernels import compiled, reference

SHAPES = [
    # images, texts, column of the text of image 0
    (5, 7, 1), (5, 7, -2), (3, 40, 60), (34, 37, -40), (1, 1, 0), (0, 4, 0), (2, 1030, 1026),
]  # fmt: skip
cases = pytest.mark.parametrize("same", [False, True], ids=["own text", "equal captions"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(shape, same, device="cpu", spread=6.0):
    """Logits as a part of wider rows, the mask of positive pairs, and the arguments `first` and `ids`."""
    rows, columns, first = shape
    g = torch.Generator().manual_seed(rows + columns)
    logits = (torch.randn(rows, columns + 3, generator=g) * spread).to(device)[:, :columns]
    ids = [torch.randint(0, 3, (count,), generator=g) for count in (rows, columns)]
    own = torch.arange(columns)[None] == torch.arange(rows)[:, None] + first
    for row, column in own.nonzero().tolist():
        ids[1][column] = ids[0][row]  # a pair has one caption
    positive = ids[0][:, None] == ids[1][None] if same else own
    return logits, positive.to(device), (first, tuple(part.to(device) for part in ids) if same else None)


def check_sigmoid(of, shape, same, device="cpu"):
    logits, positive, arguments = drawn(shape, same, device, spread=20.0)
    exact = logits.double().requires_grad_()
    wanted = F.softplus(torch.where(positive, -exact, exact), threshold=200).sum(1)
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    losses = torch.full((len(logits),), torch.nan, device=device)
    of.sigmoid_pairs(logits, losses, *arguments)
    assert_sums_close(losses, wanted, logits.shape[1], "losses")
    assert_sums_close(logits, gradient, 1, "gradient")


def check_softmax(of, shape, same, device="cpu"):
    """Of two chunks with the same images; the second one has no positives by place."""
    parts = [drawn(shape, same, device), drawn((*shape[:2], shape[1]), same, device)]
    rows = shape[0]
    norms = torch.full((rows,), -torch.inf, device=device)
    counts, sums = torch.zeros(rows, device=device), torch.zeros(rows, device=device)
    columns = [torch.full((shape[1],), torch.nan, device=device) for _ in parts]
    for (logits, _, arguments), column in zip(parts, columns, strict=True):
        before = logits.clone()
        of.softmax_norms(logits, norms, column, counts, sums, *arguments)
        assert torch.equal(logits, before)
    exact = torch.cat([logits for logits, *_ in parts], 1).double()
    positive = torch.cat([mask for _, mask, _ in parts], 1)
    terms = 2 * shape[1] + rows
    if not rows:
        return
    assert_sums_close(norms, exact.logsumexp(1), terms, "norms of rows")
    assert_sums_close(torch.cat(columns), exact.logsumexp(0), terms, "norms of columns")
    assert torch.equal(counts.double(), positive.sum(1).double())
    assert_sums_close(sums, (exact * positive).sum(1), terms, "sums", scale=exact.abs().max().item())
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(3)).to(device)
    wanted = exact.softmax(1) + exact.softmax(0) - positive * weights.double()[:, None]
    for (logits, _, arguments), column in zip(parts, columns, strict=True):
        of.softmax_pairs(logits, -norms, -column, weights, *arguments)
    # exp turns the rounding errors of logits and norms, of up to 25 and 25 + log(terms), into relative ones.
    assert_sums_close(torch.cat([logits for logits, *_ in parts], 1), wanted, terms * 25, "gradient")


@pytest.mark.numeric
@cases
@shapes
@pytest.mark.parametrize("check", [check_sigmoid, check_softmax])
def test_plain_torch_follows_the_formula(check, shape, same):
    check(reference, shape, same)


@pytest.mark.kernels
@cases
@shapes
@pytest.mark.parametrize("check", [check_sigmoid, check_softmax])
def test_the_kernels_follow_the_formula(device, check, shape, same):
    from univitar_ds.kernels import fused

    check(fused, shape, same, device)


@pytest.mark.slow
@pytest.mark.numeric
@cases
@pytest.mark.parametrize("check", [check_sigmoid, check_softmax])
def test_what_is_compiled_for_the_cpu_follows_the_formula_in_every_shape(check, same):
    for shape in SHAPES:
        check(compiled, shape, same)
    assert not compiled.Region.failed


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
@pytest.mark.parametrize("of", ["plain", pytest.param("triton", marks=pytest.mark.kernels)])
def test_losses_of_logits_far_from_zero_are_finite_and_exact_where_small(of, name, device):
    from univitar_ds.kernels import fused

    of = reference if of == "plain" else fused
    if of is reference:
        device = "cpu"
    logits = torch.tensor([[120.0, -30.0], [-120.0, -17.0]], device=device)
    if name == "sigmoid":
        losses = torch.empty(2, device=device)
        of.sigmoid_pairs(logits, losses, 0, None)
        tiny = torch.tensor([-30.0, -120.0], dtype=torch.float64).exp()
        assert_sums_close(losses[0], tiny[0].item(), terms=64)  # exp(-120) of the positive is 0 in float32
        assert_sums_close(losses[1], 17.0, terms=4)
        assert_sums_close(logits[0, 1], tiny[0].item(), terms=64)
    else:
        norms, columns = torch.full((2,), -torch.inf, device=device), torch.empty(2, device=device)
        counts, sums = torch.zeros(2, device=device), torch.zeros(2, device=device)
        of.softmax_norms(logits, norms, columns, counts, sums, 0, None)
        assert_sums_close(norms, [120.0, -17.0], terms=4)
        assert_sums_close(columns, [120.0, -17.0], terms=4)
