"""Softmax contrastive loss (CLIP, arXiv:2103.00020; InfoNCE) over all pairs of a step, over all ranks.

The loss is a cross entropy: each image selects its text among all texts of the step, and each text its image:

    L = 1/(2 items) * [ sum_i (log sum_j exp l_ij - mean_{j in P(i)} l_ij)
                      + sum_j (log sum_i exp l_ij - mean_{i in P(j)} l_ij) ]

with l_ij = scale * <v_i, t_j> and P the positives of an item. A bias would cancel, and its gradient is 0.
Every chunk of texts is compared twice: first for the normalisers of its rows and columns, then for the gradients
g_ij = (softmax over row i + softmax over column j - 2 * [j in P(i)] / |P(i)|) / (2 items).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from univitar_ds.objectives.exchange import (
    ContrastiveResult,
    Exchange,
    nothing,
    pack_rows,
    positive_mask,
    unpack_rows,
)


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
    items = exchange.items
    vision, scale = vision.float(), scale.float().reshape(())
    own_ids = caption_ids.to(vision.device) if same_caption_positive else None
    texts, ids = unpack_rows(exchange.gather(pack_rows(text.float(), own_ids)), text.shape[1], own_ids is not None)
    parts = [slice(start, start + chunk) for start in range(0, items, chunk)]

    def positives(pairs: Tensor, part: slice) -> Tensor:
        return positive_mask(pairs, exchange.first - part.start, None if ids is None else (own_ids, ids[part])).float()

    row_norm = vision.new_full((len(vision),), -torch.inf)
    column_norm = vision.new_full((items,), -torch.inf)
    positive_counts, agreement = torch.zeros_like(row_norm), torch.zeros_like(row_norm)
    for part in parts if len(vision) else ():
        logits = scale * (vision @ texts[part].T)
        positive = positives(logits, part)
        row_norm = torch.logaddexp(row_norm, logits.logsumexp(1))
        column_norm[part] = logits.logsumexp(0)
        positive_counts += positive.sum(1)
        agreement += (positive * logits).sum(1)
    column_norm = _logsumexp_over_ranks(column_norm, exchange)
    own_columns = column_norm[exchange.first : exchange.first + len(vision)]
    # The relation of positives is symmetric, so the means over rows and over columns have the same sum.
    loss = (row_norm.double() + own_columns.double() - 2 * (agreement / positive_counts).double()).sum() / (2 * items)

    vision_grad, text_grad = torch.zeros_like(vision), torch.zeros_like(texts, memory_format=torch.contiguous_format)
    scale_grad = torch.zeros(1, dtype=torch.float64, device=vision.device)
    for part in parts if len(vision) else ():
        similarity = vision @ texts[part].T
        logits = scale * similarity
        probabilities = (logits - row_norm[:, None]).exp() + (logits - column_norm[None, part]).exp()
        logit_grad = (probabilities - 2 * positives(logits, part) / positive_counts[:, None]) / (2 * items)
        scale_grad += (logit_grad * similarity).sum(dtype=torch.float64)
        vision_grad += scale * (logit_grad @ texts[part])
        text_grad[part] = scale * (logit_grad.T @ vision)
    del texts  # before the message of the gradients needs its memory
    return ContrastiveResult(
        loss=exchange.reduce(loss).item(),
        items=items,
        vision_grad=vision_grad,
        text_grad=exchange.scatter_sum(text_grad),
        scale_grad=scale_grad.float(),
        bias_grad=torch.zeros(1, device=vision.device),
    )


def _logsumexp_over_ranks(values: Tensor, exchange: Exchange) -> Tensor:
    """Returns the logarithm of the sum over ranks of exp(values), which is -inf on ranks without images."""
    largest = exchange.reduce(values.clone(), dist.ReduceOp.MAX)
    return largest + exchange.reduce((values - largest).exp()).log()
