"""Shared by the contrastive losses: the texts of a step and their gradients travel round a ring of ranks.

A rank holds its own embeddings and one visiting block of texts for any number of ranks, and compares `chunk` texts at a
time. The losses therefore do not depend on how the items of a step are distributed over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ContrastiveResult:
    """Loss of a step and its gradients with respect to the inputs of this rank.

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


class Ring:
    """The ranks of a group in a circle; without torch.distributed, a circle of one.

    Creating it synchronizes with the device. If it is created before the embeddings, the loss does not synchronize
    until its value is read: all messages of all hops are enqueued while the GPU still embeds.
    """

    def __init__(self, items: int, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        """`items` of this rank; they differ between ranks and may be 0. Every rank must create its ring."""
        self.group = group
        self.size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if self.size > 1 else 0
        self.counts = [items]
        if self.size > 1:  # on the host: they are sizes of messages
            counts = torch.empty(self.size, dtype=torch.int64, device=device)
            mine = torch.tensor([items], dtype=torch.int64, device=device)
            dist.all_gather_into_tensor(counts, mine, group=group)
            self.counts = counts.tolist()

    @property
    def items(self) -> int:
        """Items of the step."""
        return sum(self.counts)

    def owners(self) -> Iterator[int]:
        """The owner of the visiting texts at each hop, this rank first. After each hop `ring_shift` must be called."""
        for hop in range(self.size):
            yield (self.rank - hop) % self.size

    def ring_shift(self, block: Sequence[Tensor], owner: int) -> list[Tensor]:
        """Sends the block of `owner` to the next rank and receives the one that visits next.

        The tensors of a block have one row per text. After the last hop every block is back at its owner. One message
        carries all tensors as bytes, so that they cannot be mismatched.
        """
        if self.size == 1:
            return list(block)
        incoming = self.counts[(owner - 1) % self.size]
        flat = [part.reshape(part.shape[0], math.prod(part.shape[1:])).contiguous() for part in block]
        outgoing = torch.cat([part.view(torch.uint8) for part in flat], dim=1)
        received = torch.empty(incoming, outgoing.shape[1], dtype=torch.uint8, device=outgoing.device)
        following, preceding = ((self.rank + shift) % self.size for shift in (1, -1))
        if self.group is not None:
            following, preceding = (dist.get_global_rank(self.group, rank) for rank in (following, preceding))
        exchanges = []
        if outgoing.shape[0]:
            exchanges.append(dist.P2POp(dist.isend, outgoing, following, self.group))
        if incoming:
            exchanges.append(dist.P2POp(dist.irecv, received, preceding, self.group))
        if exchanges:
            for work in dist.batch_isend_irecv(exchanges):
                work.wait()
        widths = [part.shape[1] * part.element_size() for part in flat]
        # Copies, not views: a view with a wider type must begin at a multiple of its size.
        copies = (columns.clone(memory_format=torch.contiguous_format) for columns in received.split(widths, dim=1))
        return [copy.view(part.dtype).view(incoming, *part.shape[1:]) for copy, part in zip(copies, block, strict=True)]

    def total(self, value: Tensor) -> float:
        """Sum over ranks. Synchronizes with the device, since the backward pass runs only if the loss is finite."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value.item()


def positive_mask(own_ids: Tensor | None, ids: Tensor, start: int, rows: int, own_block: bool) -> Tensor:
    """Which pairs of this rank's items (rows) with a chunk of visiting texts (columns) are positives, (rows, c) bool.

    Args: own_ids, ids: captions of rows and columns, compared unless `own_ids` is None; start: position of the chunk
    in its block; own_block: whether the block is this rank's, whose diagonal belongs together.
    """
    positive = torch.zeros(rows, len(ids), dtype=torch.bool, device=ids.device)
    if own_block and start < rows:
        positive.diagonal(-start).fill_(True)
    if own_ids is not None:
        positive |= own_ids[:, None] == ids[None, :]
    return positive
