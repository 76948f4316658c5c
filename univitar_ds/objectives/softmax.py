"""Softmax contrastive loss (CLIP, arXiv:2103.00020; InfoNCE) over all pairs of a step, over all ranks.

The loss is a cross entropy: each image selects its text among all texts of the step, and each text its image:

    L = 1/(2 items) * [ sum_i (log sum_j exp l_ij - mean_{j in P(i)} l_ij)
                      + sum_j (log sum_i exp l_ij - mean_{i in P(j)} l_ij) ]

with l_ij = scale * <v_i, t_j> and P the positives of an item. A bias would cancel, and its gradient is 0.
Every chunk of texts is compared twice: first for the normalisers of its rows and columns, then for the gradients
g_ij = (softmax over row i + softmax over column j - 2 * [j in P(i)] / |P(i)|) / (2 items).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from univitar_ds.kernels import dispatch
from univitar_ds.objectives.chunks import compared
from univitar_ds.objectives.exchange import ContrastiveResult, Exchange, nothing, pack_rows, unpack_rows


@torch.no_grad()
def softmax_loss(
    vision: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    caption_ids: Tensor,
    *,
    chunk: int,
    same_caption_positive: bool = False,
    exchange: Exchange | None = None,
) -> ContrastiveResult:
    """Computes the loss and the gradients. Arguments and result as in `sigmoid_loss`; `bias` is not used."""
    exchange = exchange or Exchange(len(vision), vision.device)
    if not exchange.items:
        return nothing(vision, text)
    items, width = exchange.items, text.shape[1]
    vision, scale = vision.float(), scale.float().reshape(())
    images = vision * scale
    own_ids = caption_ids.to(vision.device) if same_caption_positive else None
    texts, ids = unpack_rows(exchange.gather(pack_rows(text.float(), own_ids)), width, own_ids is not None)
    chunks = partial(
        compared, images, texts, None if own_ids is None else (own_ids, ids), chunk=chunk, first=exchange.first
    )

    row_norms = images.new_full((len(images),), -torch.inf)
    column_norms = images.new_full((items,), -torch.inf)
    counts, sums = torch.zeros_like(row_norms), torch.zeros_like(row_norms)
    for part in chunks():
        dispatch.softmax_norms(part.logits, row_norms, column_norms[part.span], counts, sums, part.first, part.ids)
    column_norms = _logsumexp_over_ranks(column_norms, exchange)
    own_columns = column_norms[exchange.first : exchange.first + len(images)]
    # The relation of positives is symmetric, so the means over rows and over columns have the same sum.
    loss = (row_norms.double() + own_columns.double() - 2 * (sums / counts).double()).sum() / (2 * items)

    row_shifts, column_shifts, weights = -row_norms, -column_norms, 2 / counts
    pulls = torch.zeros_like(images)  # sums over texts of gradient times text, without scale
    text_grad = images.new_zeros(items, width)
    for part in chunks():
        dispatch.softmax_pairs(part.logits, row_shifts, column_shifts[part.span], weights, part.first, part.ids)
        pulls.addmm_(part.logits, texts[part.span])
        torch.mm(part.logits.T, images, out=text_grad[part.span])
    del texts, chunks  # before the message of the gradients needs their memory
    return ContrastiveResult(
        loss=exchange.reduce(loss).item(),
        items=items,
        vision_grad=pulls * (scale / (2 * items)),
        text_grad=exchange.scatter_sum(text_grad) / (2 * items),
        scale_grad=((vision * pulls).sum(dtype=torch.float64) / (2 * items)).float().reshape(1),
        bias_grad=torch.zeros(1, device=vision.device),
    )


def _logsumexp_over_ranks(values: Tensor, exchange: Exchange) -> Tensor:
    """Returns the logarithm of the sum over ranks of exp(values), which is -inf on ranks without images."""
    largest = exchange.reduce(values.clone(), dist.ReduceOp.MAX)
    return largest + exchange.reduce((values - largest).exp()).log()
