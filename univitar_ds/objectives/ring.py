"""What the contrastive losses share: the texts of a step travel round a ring of ranks, and their gradient with them.

A rank holds its own embeddings and one visiting block of texts, whatever the number of ranks, and compares `chunk`
texts at a time. The losses therefore do not know how the items of a step are spread over ranks.
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


class Ring:
    """The ranks of a group in a circle; without torch.distributed, a circle of one.

    Making it waits for the device. Made before the embeddings are, a loss round it waits for nothing until it is
    known: a GPU has all messages of all hops before it in the queue while it still embeds.
    """

    def __init__(self, items: int, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        """`items` of this rank; they differ between ranks and may be 0. Every rank must make its ring."""
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
        """Whose texts visit, hop by hop; the own ones first. After each the block is to be passed on."""
        for hop in range(self.size):
            yield (self.rank - hop) % self.size

    def ring_shift(self, block: Sequence[Tensor], owner: int) -> list[Tensor]:
        """Sends the block of `owner` to the next rank and receives the one that visits next.

        The tensors of a block have one row per text. After the last hop every block is home again. One message
        carries them all as bytes, so that they can never be matched wrongly.
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
        # A copy each, not a view: a view as wider numbers must begin at a multiple of their size.
        copies = (columns.clone(memory_format=torch.contiguous_format) for columns in received.split(widths, dim=1))
        return [copy.view(part.dtype).view(incoming, *part.shape[1:]) for copy, part in zip(copies, block, strict=True)]

    def total(self, value: Tensor) -> float:
        """Sum over ranks. A device sync: whether a loss is finite decides whether there is a backward at all."""
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
