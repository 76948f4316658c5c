"""Sigmoid contrastive loss (SigLIP, arXiv:2303.15343) over all pairs of a step, over all ranks.

The loss of a pair of image i and text j is  -log sigmoid(z_ij * (scale * <v_i, t_j> + bias)),  with z_ij = +1 for a
positive pair and -1 for a negative pair. The sum over pairs is divided by the number of items of the step.
The gradient is computed explicitly, without autograd: g_ij = dL/dlogit_ij = -z_ij * sigmoid(-z_ij * logit_ij) / items.

The texts get a column of ones, and the images a column with the bias. So the matrix product of images and texts gives
the logits, and the product of g and the texts also gives the row sums of g, whose sum is the gradient of the bias. The
gradient of the scale is the sum over i of <v_i, sum_j g_ij t_j>.
"""

from __future__ import annotations

import torch
from torch import Tensor

from univitar_ds.kernels import dispatch
from univitar_ds.objectives.chunks import compared
from univitar_ds.objectives.exchange import ContrastiveResult, Exchange, nothing, pack_rows, unpack_rows


@torch.no_grad()
def sigmoid_loss(
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
    """Computes the loss and the gradients. Arguments and result are those of `pairs.loss_of_pairs` after `loss`."""
    exchange = exchange or Exchange(len(vision), vision.device)
    if not exchange.items:
        return nothing(vision, text)
    items, width = exchange.items, text.shape[1]
    vision, scale = vision.float(), scale.float().reshape(())
    images = torch.cat([vision * scale, bias.float().reshape(1, 1).expand(len(vision), 1)], dim=1)
    own_ids = caption_ids.to(vision.device) if same_caption_positive else None
    rows = pack_rows(text.float(), own_ids, ones=True)
    blocks = exchange.blocks(rows)

    loss = torch.zeros((), dtype=torch.float64, device=vision.device)
    pulls = torch.zeros_like(images)  # per image, the sum over texts of gradient times text, without scale
    text_grad = images.new_zeros(len(rows), width)
    for owner in blocks.owners():
        texts, ids = unpack_rows(blocks.gather(rows, owner), width + 1, own_ids)
        losses = images.new_zeros(-(-len(texts) // chunk), len(images))
        gradient = images.new_zeros(len(texts), width)
        for index, part in enumerate(compared(images, texts, ids, chunk=chunk, first=blocks.first(owner))):
            dispatch.sigmoid_pairs(part.logits, losses[index], part.first, part.ids)
            pulls.addmm_(part.logits, texts[part.span])
            torch.mm(part.logits.T, images[:, :width], out=gradient[part.span])
        loss += losses.sum(dtype=torch.float64)
        del texts  # frees memory for the message of the gradients
        text_grad += blocks.scatter_sum(gradient, owner)
        del gradient
        rows, text_grad = blocks.shift(rows, text_grad, owner)
    return ContrastiveResult(
        loss=exchange.total(loss / items),
        items=items,
        vision_grad=pulls[:, :width] * (scale / items),
        text_grad=text_grad / items,
        scale_grad=((vision * pulls[:, :width]).sum(dtype=torch.float64) / items).float().reshape(1),
        bias_grad=(pulls[:, width].sum(dtype=torch.float64) / items).float().reshape(1),
    )
