"""Sigmoid contrastive loss (SigLIP, arXiv:2303.15343) over all pairs of a step, over all ranks.

The loss of a pair of image i and text j is  -log sigmoid(z_ij * (scale * <v_i, t_j> + bias)),  with z_ij = +1 for a
positive pair and -1 for a negative pair. The sum over pairs is divided by the number of items of the step.
The gradient is computed explicitly, without autograd: g_ij = dL/dlogit_ij = -z_ij * sigmoid(-z_ij * logit_ij) / items.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from univitar_ds.objectives.ring import ContrastiveResult, Ring, positive_mask


@torch.no_grad()
def ring_sigmoid(
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
    """Computes the loss and the gradients. Every rank of the ring must call it.

    Args:
        vision, text: (n, E), converted to float32; row i of both is a pair. n may differ between ranks and may be 0. If
            n is 0 on all ranks, the loss is 0.
        scale, bias: (1,) or (), the same on all ranks. `scale` is not a logarithm.
        caption_ids: (n,) int64, equal for equal captions. Used only with `same_caption_positive`.
        chunk: number of texts that are compared at a time.
        same_caption_positive: whether pairs with equal captions are positive too, on any ranks.
        ring: ring whose number of items is n; None: a ring of all ranks is created.
    """
    ring = ring or Ring(len(vision), vision.device)
    items = max(ring.items, 1)
    vision, visiting = vision.float(), text.float()
    scale, bias = scale.float().reshape(()), bias.float().reshape(())
    ids = caption_ids.to(vision.device)
    own_ids = ids if same_caption_positive else None
    visiting_grad, vision_grad = torch.zeros_like(visiting), torch.zeros_like(vision)
    totals = torch.zeros(3, dtype=torch.float64, device=vision.device)  # loss, scale and bias gradient
    for owner in ring.owners():
        for start in range(0, len(ids), chunk):
            part = slice(start, start + chunk)
            positive = positive_mask(own_ids, ids[part], start, len(vision), owner == ring.rank)
            similarity = vision @ visiting[part].T
            sign = positive.float() * 2 - 1
            agreement = sign * (similarity * scale + bias)
            totals[0] -= F.logsigmoid(agreement).sum(dtype=torch.float64)
            logit_grad = -sign * torch.sigmoid(-agreement) / items
            totals[1] += (logit_grad * similarity).sum(dtype=torch.float64)
            totals[2] += logit_grad.sum(dtype=torch.float64)
            vision_grad += scale * (logit_grad @ visiting[part])
            visiting_grad[part] += scale * (logit_grad.T @ vision)
        visiting, visiting_grad, ids = ring.ring_shift((visiting, visiting_grad, ids), owner)
    return ContrastiveResult(
        loss=ring.total(totals[0] / items),
        items=ring.items,
        vision_grad=vision_grad,
        text_grad=visiting_grad,
        scale_grad=totals[1:2].float(),
        bias_grad=totals[2:3].float(),
    )
