"""Sigmoid contrastive loss (SigLIP, arXiv:2303.15343) over all pairs of a step, over all ranks.

Every pair of a picture i and a text j costs  -log sigmoid(z_ij * (scale * <v_i, t_j> + bias)),  z_ij = +1 for a
pair that belongs together and -1 for every other; the sum is divided by the number of items of the step.
The loss therefore does not know how the items are spread over ranks.

The texts travel round a ring of ranks and their gradient travels with them, so a rank holds its own
embeddings, one visiting block and `chunk` columns of similarities, whatever the number of ranks.
The gradient is written out, not recorded: g_ij = dL/dlogit_ij = -z_ij * sigmoid(-z_ij * logit_ij) / items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SigmoidResult:
    """Loss of a step and what each input of this rank has to do with it.

    `loss` is the mean over all items of the step and the same number on every rank, as is `items`.
    `scale_grad` and `bias_grad` are this rank's share: their sum over ranks is the gradient. The embedding
    gradients are complete for this rank's rows.
    """

    loss: float
    items: int
    vision_grad: Tensor  # (n, E) fp32
    text_grad: Tensor  # (n, E) fp32
    scale_grad: Tensor  # (1,) fp32
    bias_grad: Tensor  # (1,) fp32


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
    group: dist.ProcessGroup | None = None,
) -> SigmoidResult:
    """Loss and gradients; every rank of `group` must call it. Row i of `vision` belongs to row i of `text`.

    Args:
        vision, text: (n, E) fp32; n differs between ranks and may be 0, also on all of them (loss 0).
        scale, bias: (1,) or () fp32, the same on all ranks; the scale itself, not its logarithm.
        caption_ids: (n,) int64, equal for equal captions. Only read with `same_caption_positive`.
        chunk: texts compared at a time.
        same_caption_positive: pairs of equal captions belong together too, wherever their items are.
    """
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    rank = dist.get_rank(group) if size > 1 else 0
    counts = _counts(vision.shape[0], vision.device, size, group)
    items = max(sum(counts), 1)
    vision, visiting = vision.float(), text.float()
    scale, bias = scale.float().reshape(()), bias.float().reshape(())
    visiting_ids = caption_ids.to(vision.device)
    own_ids = visiting_ids
    visiting_grad = torch.zeros_like(visiting)
    vision_grad = torch.zeros_like(vision)
    totals = torch.zeros(3, dtype=torch.float64, device=vision.device)  # loss, scale and bias gradient
    for hop in range(size):
        owner = (rank - hop) % size
        for start in range(0, counts[owner], chunk):
            stop = min(start + chunk, counts[owner])
            together = torch.zeros(vision.shape[0], stop - start, dtype=torch.bool, device=vision.device)
            if owner == rank:  # its own texts: row i and column i
                together.diagonal(-start).fill_(True)
            if same_caption_positive:
                together |= own_ids[:, None] == visiting_ids[None, start:stop]
            _add_block(
                vision,
                visiting[start:stop],
                together,
                scale,
                bias,
                items,
                vision_grad,
                visiting_grad[start:stop],
                totals,
            )
        if size > 1:
            previous_owner = (owner - 1) % size
            visiting, visiting_grad, visiting_ids = _pass_on(
                visiting, visiting_grad, visiting_ids, counts[previous_owner], rank, size, group
            )
    loss = totals[0] / items
    if size > 1:
        dist.all_reduce(loss, group=group)
    return SigmoidResult(
        loss=loss.item(),  # a device sync: whether the loss is finite decides whether there is a backward at all
        items=sum(counts),
        vision_grad=vision_grad,
        text_grad=visiting_grad,
        scale_grad=totals[1:2].float(),
        bias_grad=totals[2:3].float(),
    )


def _add_block(
    vision: Tensor,
    text: Tensor,
    together: Tensor,
    scale: Tensor,
    bias: Tensor,
    items: int,
    vision_grad: Tensor,
    text_grad: Tensor,
    totals: Tensor,
) -> None:
    """Adds the pairs of `vision` (n, E) with `text` (c, E) to the gradients and totals, in place."""
    similarity = vision @ text.T
    sign = together.float() * 2 - 1
    agreement = sign * (similarity * scale + bias)
    totals[0] -= F.logsigmoid(agreement).sum(dtype=torch.float64)
    logit_grad = -sign * torch.sigmoid(-agreement) / items
    totals[1] += (logit_grad * similarity).sum(dtype=torch.float64)
    totals[2] += logit_grad.sum(dtype=torch.float64)
    vision_grad += scale * (logit_grad @ text)
    text_grad += scale * (logit_grad.T @ vision)


def _counts(mine: int, device: torch.device, size: int, group: dist.ProcessGroup | None) -> list[int]:
    """Items of every rank, on the host: they are sizes of messages."""
    if size == 1:
        return [mine]
    counts = torch.empty(size, dtype=torch.int64, device=device)
    dist.all_gather_single(counts, torch.tensor([mine], dtype=torch.int64, device=device), group=group)
    return counts.tolist()


def _pass_on(
    text: Tensor,
    grad: Tensor,
    ids: Tensor,
    incoming: int,
    rank: int,
    size: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sends the visiting block to the next rank and receives `incoming` rows from the previous one.

    One message carries text, gradient and caption ids as bytes, so they can never be matched wrongly.
    """
    width = text.shape[1] * 4
    outgoing = torch.cat([part.contiguous().view(torch.uint8) for part in (text, grad, ids[:, None])], dim=1)
    received = torch.empty(incoming, 2 * width + 8, dtype=torch.uint8, device=text.device)
    following, preceding = ((rank + shift) % size for shift in (1, -1))
    if group is not None:
        following, preceding = (dist.get_global_rank(group, r) for r in (following, preceding))
    exchanges = []
    if outgoing.shape[0]:
        exchanges.append(dist.P2POp(dist.isend, outgoing, following, group))
    if incoming:
        exchanges.append(dist.P2POp(dist.irecv, received, preceding, group))
    if exchanges:
        for work in dist.batch_isend_irecv(exchanges):
            work.wait()
    text, grad, ids = (part.contiguous() for part in received.split([width, width, 8], dim=1))
    return text.view(torch.float32), grad.view(torch.float32), ids.view(torch.int64)[:, 0]
