"""The ring of ranks on which the contrastive losses send the texts of a step and their gradients.

For any number of ranks, a rank stores its own embeddings and one visiting block of texts, and compares `chunk` texts at
a time. Every pair is compared once, so the losses do not depend on the distribution of a step's items over ranks.
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
    """The loss of a step, and the gradients of the loss with respect to the inputs of this rank.

    `loss` is the mean over all items of the step. `loss` and `items` are the same on every rank. `scale_grad` and
    `bias_grad` are this rank's share of the gradient, which is the sum over ranks. The gradients of the embeddings are
    complete for this rank's rows.
    """

    loss: float
    items: int
    vision_grad: Tensor  # (n, E) fp32
    text_grad: Tensor  # (n, E) fp32
    scale_grad: Tensor  # (1,) fp32
    bias_grad: Tensor  # (1,) fp32


class Ring:
    """The ranks of a group in a circle; one rank without torch.distributed.

    Creating a ring synchronizes with the device. If the ring is created before the embeddings, the loss does not
    synchronize until its value is read: the messages of all hops are enqueued while the GPU still computes embeddings.
    """

    def __init__(self, items: int, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        """Exchanges the numbers of items of all ranks. Every rank of the group must create a ring.

        Args: items: number of items of this rank, which may differ between ranks and may be 0."""
        self.group = group
        self.size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if self.size > 1 else 0
        self.counts = [items]
        if self.size > 1:  # read on the host, since the counts are sizes of messages
            counts = torch.empty(self.size, dtype=torch.int64, device=device)
            mine = torch.full((1,), items, dtype=torch.int64, device=device)  # no copy, which the host would wait for
            dist.all_gather_into_tensor(counts, mine, group=group)
            self.counts = counts.tolist()

    @property
    def items(self) -> int:
        """Number of items of the step, over all ranks."""
        return sum(self.counts)

    def owners(self) -> Iterator[int]:
        """Yields the owner of the visiting texts at each hop, this rank first. After each hop, call `ring_shift`."""
        for hop in range(self.size):
            yield (self.rank - hop) % self.size

    def ring_shift(self, block: Sequence[Tensor], owner: int) -> list[Tensor]:
        """Sends the block of `owner` to the next rank, and returns the block received from the previous rank.

        The tensors of a block have one row per text. After the last hop every block is back at its owner. One message
        contains all tensors of a block as bytes, so that tensors cannot be mismatched.
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
        """Returns the sum over ranks. Synchronizes with the device, since backward runs only if the loss is finite."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value.item()


def positive_mask(own_ids: Tensor | None, ids: Tensor, start: int, rows: int, own_block: bool) -> Tensor:
    """Returns which pairs of this rank's items (rows) and a chunk of visiting texts (columns) are positive.

    Args:
        own_ids: (rows,) caption ids of the rows; None: equal captions are not positive.
        ids: (c,) caption ids of the chunk.
        start: position of the chunk in its block.
        rows: number of items of this rank.
        own_block: whether the block is this rank's, so that row i and text i are a pair.
    Returns: (rows, c) bool.
    """
    positive = torch.zeros(rows, len(ids), dtype=torch.bool, device=ids.device)
    if own_block and start < rows:
        positive.diagonal(-start).fill_(True)
    if own_ids is not None:
        positive |= own_ids[:, None] == ids[None, :]
    return positive
