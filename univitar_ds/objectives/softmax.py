"""Softmax contrastive loss (CLIP, arXiv:2103.00020; InfoNCE) over all pairs of a step, over all ranks.

The loss is a cross entropy: each image selects its text among all texts of the step, and each text its image:

    L = 1/(2 items) * [ sum_i (log sum_j exp l_ij - mean_{j in P(i)} l_ij)
                      + sum_j (log sum_i exp l_ij - mean_{i in P(j)} l_ij) ]

with l_ij = scale * <v_i, t_j> and P the positives of an item. A bias would cancel, and its gradient is 0.
The texts pass all ranks twice: the first round computes the normaliser of every row and column, the second round
computes the gradients
g_ij = (softmax over row i + softmax over column j - 2 * [j in P(i)] / |P(i)|) / (2 items).
"""

from __future__ import annotations

import torch
from torch import Tensor

from univitar_ds.objectives.ring import ContrastiveResult, Ring, positive_mask


@torch.no_grad()
def ring_softmax(
    vision: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    caption_ids: Tensor,
    *,
    chunk: int,
    same_caption_positive: bool = False,
    ring: Ring | None = None,
) -> ContrastiveResult:
    """Computes the loss and the gradients. Arguments and result as in `ring_sigmoid`; `bias` is not used."""
    ring = ring or Ring(len(vision), vision.device)
    items = max(ring.items, 1)
    vision, visiting = vision.float(), text.float()
    scale = scale.float().reshape(())
    ids = caption_ids.to(vision.device)
    own_ids = ids if same_caption_positive else None

    def positives(part: slice, owner: int) -> Tensor:
        return positive_mask(own_ids, ids[part], part.start, len(vision), owner == ring.rank).float()

    row_norm = vision.new_full((len(vision),), -torch.inf)
    column_norm = visiting.new_full((len(visiting),), -torch.inf)
    positive_counts, agreement = torch.zeros_like(row_norm), torch.zeros_like(row_norm)
    for owner in ring.owners():
        for part in _chunks(len(ids), chunk):
            logits = scale * (vision @ visiting[part].T)
            positive = positives(part, owner)
            row_norm = torch.logaddexp(row_norm, logits.logsumexp(1))
            column_norm[part] = torch.logaddexp(column_norm[part], logits.logsumexp(0))
            positive_counts += positive.sum(1)
            agreement += (positive * logits).sum(1)
        visiting, column_norm, ids = ring.ring_shift((visiting, column_norm, ids), owner)
    # The relation of positives is symmetric, so the means over rows and over columns have the same sum.
    loss = (row_norm.double() + column_norm.double() - 2 * (agreement / positive_counts).double()).sum() / (2 * items)

    vision_grad, visiting_grad = torch.zeros_like(vision), torch.zeros_like(visiting)
    scale_grad = torch.zeros(1, dtype=torch.float64, device=vision.device)
    for owner in ring.owners():
        for part in _chunks(len(ids), chunk):
            similarity = vision @ visiting[part].T
            logits = scale * similarity
            probabilities = (logits - row_norm[:, None]).exp() + (logits - column_norm[None, part]).exp()
            logit_grad = (probabilities - 2 * positives(part, owner) / positive_counts[:, None]) / (2 * items)
            scale_grad += (logit_grad * similarity).sum(dtype=torch.float64)
            vision_grad += scale * (logit_grad @ visiting[part])
            visiting_grad[part] += scale * (logit_grad.T @ vision)
        visiting, visiting_grad, column_norm, ids = ring.ring_shift((visiting, visiting_grad, column_norm, ids), owner)
    return ContrastiveResult(
        loss=ring.total(loss),
        items=ring.items,
        vision_grad=vision_grad,
        text_grad=visiting_grad,
        scale_grad=scale_grad.float(),
        bias_grad=torch.zeros(1, device=vision.device),
    )


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]
