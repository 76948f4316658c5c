"""Packed attention against the softmax formula, and the choice of the back end."""

import pytest
import torch

from univitar_ds.errors import ConfigError
from univitar_ds.model.attention import Spans, attention, choose_backend

CPU = torch.device("cpu")


def dense(q, k, v, queries, keys):
    outputs, a, b = [], 0, 0
    for m, n in zip(queries, keys, strict=True):
        scores = torch.einsum("qhk,thk->hqt", q[a : a + m], k[b : b + n]) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("hqt,thk->qhk", scores.softmax(-1), v[b : b + n]))
        a, b = a + m, b + n
    return torch.cat(outputs).flatten(1)


@pytest.mark.parametrize("width", [64, 80, 120])
@pytest.mark.parametrize("queries", [(5, 1, 7), (1, 1, 1)], ids=["self", "pool"])
def test_values_and_gradients_equal_the_formula(width, queries):
    keys = (5, 1, 7)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(sum(lengths), 2, width, dtype=torch.float64, generator=generator, requires_grad=True)
        for lengths in (queries, keys, keys)
    ]
    result = attention(*drawn, Spans.of(queries, CPU), Spans.of(keys, CPU))
    wanted = dense(*drawn, queries, keys)
    torch.testing.assert_close(result, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(result.shape, dtype=torch.float64, generator=generator)
    for mine, exact in zip(
        torch.autograd.grad(result, drawn, upstream), torch.autograd.grad(wanted, drawn, upstream), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-12)


def test_spans_keep_lengths_on_the_host_and_bounds_as_int32():
    spans = Spans.of([3, 5, 1], CPU)
    assert (spans.lengths, spans.max_length) == ((3, 5, 1), 5)
    assert spans.cu_seqlens.tolist() == [0, 3, 8, 9]
    assert spans.cu_seqlens.dtype == torch.int32
    assert Spans.of([], CPU).max_length == 0


def test_auto_is_item_by_item_on_the_cpu_and_a_packed_kernel_for_half_precision_on_cuda():
    assert choose_backend("auto", CPU, torch.bfloat16) == "sdpa"
    assert choose_backend("auto", torch.device("cuda"), torch.float32) == "sdpa"
    assert choose_backend("auto", torch.device("cuda"), torch.bfloat16) in ("flash", "varlen")
    assert choose_backend("sdpa", torch.device("cuda"), torch.bfloat16) == "sdpa"


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_a_back_end_that_cannot_run_here_is_refused(backend):
    with pytest.raises(ConfigError, match=f"model.attention {backend} cannot run on cpu in float32; able here: sdpa"):
        choose_backend(backend, CPU, torch.float32)
