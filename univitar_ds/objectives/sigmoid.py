"""Sigmoid contrastive loss (SigLIP, arXiv:2303.15343) over all pairs of a step, over all ranks.

The loss of a pair of image i and text j is  -log sigmoid(z_ij * (scale * <v_i, t_j> + bias)),  with z_ij = +1 for a
positive pair and -1 for a negative pair. The sum over pairs is divided by the number of items of the step.
The gradient is computed explicitly, without autograd: g_ij = dL/dlogit_ij = -z_ij * sigmoid(-z_ij * logit_ij) / items.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from univitar_ds.objectives.exchange import ContrastiveResult
from univitar_ds.objectives.pairs import PairGradients, loss_of_pairs


def sigmoid_loss(*inputs: Tensor, **settings: Any) -> ContrastiveResult:
    """Computes the loss and the gradients. Arguments and result are those of `pairs.loss_of_pairs` after `loss`."""
    return loss_of_pairs(sigmoid_pairs, *inputs, **settings)


def sigmoid_pairs(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, positives: Tensor, items: int
) -> PairGradients:
    """Computes the losses of a block of pairs; see `pairs.PairLoss`."""
    similarity = images @ texts.T
    sign = positives.float() * 2 - 1
    agreement = sign * (similarity * scale + bias)
    logit_grad = -sign * torch.sigmoid(-agreement) / items
    return PairGradients(
        loss=-F.logsigmoid(agreement).sum(dtype=torch.float64),
        images=scale * (logit_grad @ texts),
        texts=scale * (logit_grad.T @ images),
        scale=(logit_grad * similarity).sum(dtype=torch.float64),
        bias=logit_grad.sum(dtype=torch.float64),
    )
