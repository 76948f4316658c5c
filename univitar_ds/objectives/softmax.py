"""Softmax contrastive loss (CLIP, arXiv:2103.00020; InfoNCE) over all pairs of a step, over all ranks.

The loss is a cross entropy: each image selects its text among all texts of the step, and each text its image:

    L = 1/(2 items) * [ sum_i (log sum_j exp l_ij - mean_{j in P(i)} l_ij)
                      + sum_j (log sum_i exp l_ij - mean_{i in P(j)} l_ij) ]

with l_ij = scale * <v_i, t_j> and P the positives of an item. A bias would cancel out, so its gradient is 0.
Every chunk of texts is compared twice: first for the normalisers of its rows and columns, then for the gradients
g_ij = (softmax over row i + softmax over column j - 2 * [j in P(i)] / |P(i)|) / (2 items).
"""

from __future__ import annotations

import torch
from torch import Tensor

from univitar_ds.kernels import dispatch
from univitar_ds.objectives.exchange import ContrastiveResult, Exchange, nothing, pack_rows, unpack_rows
from univitar_ds.objectives.softmax_blocks import Fused, Plain


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
    rows = pack_rows(text.float(), own_ids)
    blocks = exchange.blocks(rows)
    compared = (Plain if dispatch.runs_plain_on_cpu(images) else Fused)(images, own_ids, chunk)

    text_norms = images.new_full((len(rows), 1), -torch.inf)
    for owner in blocks.owners():
        texts, ids = unpack_rows(blocks.gather(rows, owner), width, own_ids)
        norms = blocks.logsumexp(compared.norms(texts, ids, blocks.first(owner)))
        text_norms = torch.logaddexp(text_norms, blocks.rows_of(norms, owner)[:, None])
        rows, text_norms = blocks.shift(rows, text_norms, owner)
    # The relation of positives is symmetric, so the means over rows and over columns have the same sum.
    loss = compared.row_norms.sum(dtype=torch.float64) + text_norms.sum(dtype=torch.float64)
    loss = (loss - 2 * (compared.sums / compared.counts).sum(dtype=torch.float64)) / (2 * items)

    text_grad = images.new_zeros(len(rows), width)
    for owner in blocks.owners():
        if blocks.groups > 1:  # otherwise `texts` still has all of them
            texts, ids = unpack_rows(blocks.gather(rows, owner), width, own_ids)
            norms = blocks.gather(text_norms, owner)[:, 0]
        gradient = compared.gradient(texts, ids, norms, blocks.first(owner))
        del texts  # frees memory for the message of the gradients
        text_grad += blocks.scatter_sum(gradient, owner)
        del gradient
        rows, travelling = blocks.shift(rows, torch.cat([text_norms, text_grad], dim=1), owner)
        text_norms, text_grad = travelling.split((1, width), dim=1)
    return ContrastiveResult(
        loss=exchange.total(loss),
        items=items,
        vision_grad=compared.pulls * (scale / (2 * items)),
        text_grad=text_grad / (2 * items),
        scale_grad=((vision * compared.pulls).sum(dtype=torch.float64) / (2 * items)).float().reshape(1),
        bias_grad=torch.zeros(1, device=vision.device),
    )
