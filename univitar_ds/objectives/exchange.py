"""The messages of the contrastive losses: the texts of a step go to all ranks, and their gradients come back.

Every rank compares its own images with the texts of all ranks, `chunk` texts at a time. The texts arrive in one
all-gather, and one reduce-scatter returns the sum of their gradients over ranks. So the number of messages does not
depend on the number of ranks, and the number of chunks depends on the texts of the step only.
"""

from __future__ import annotations

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


def nothing(vision: Tensor, text: Tensor) -> ContrastiveResult:
    """Returns the result of a step without any item on any rank."""
    zero = torch.zeros(1, device=vision.device)
    return ContrastiveResult(0.0, 0, torch.zeros_like(vision.float()), torch.zeros_like(text.float()), zero, zero)


class Exchange:
    """The items of all ranks of a group, and the messages between these ranks; one rank without torch.distributed.

    Creating an exchange synchronizes with the device. If it is created before the embeddings, the loss does not
    synchronize until its value is read: all messages are enqueued while the GPU still computes embeddings.

    Messages have one size for all ranks, that of the rank with the most items, since NCCL's and gloo's reduce-scatter
    have no other. The rows that fill up the others are dropped before the texts are compared.
    """

    def __init__(self, items: int, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        """Exchanges the numbers of items of all ranks. Every rank of the group must create an exchange.

        Args: items: number of items of this rank, which may differ between ranks and may be 0."""
        self.group = group
        self.size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if self.size > 1 else 0
        # Without a copy, which the host would wait for.
        counts = mine = torch.full((1,), items, dtype=torch.int64, device=device)
        if self.size > 1:
            counts = mine.new_empty(self.size)
            dist.all_gather_single(counts, mine, group=group)
        self.counts: list[int] = counts.tolist()  # read on the host, since they are sizes of messages
        self._slots, self._texts = _places(counts, self.items, self.largest)

    @property
    def items(self) -> int:
        """Number of items of the step, over all ranks."""
        return sum(self.counts)

    @property
    def largest(self) -> int:
        """The most items of a rank."""
        return max(self.counts)

    @property
    def first(self) -> int:
        """Place of this rank's first text among the texts of all ranks."""
        return sum(self.counts[: self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """Returns the rows of all ranks in the order of ranks: (n, k) -> (items, k)."""
        sent = rows.new_empty(self.largest, rows.shape[1])
        sent[: len(rows)] = rows
        received = sent
        if self.size > 1:
            received = rows.new_empty(self.size * self.largest, rows.shape[1])
            dist.all_gather_single(received, sent, group=self.group)
        return received.index_select(0, self._slots)

    def scatter_sum(self, values: Tensor) -> Tensor:
        """Returns this rank's rows of the sum over ranks, the inverse of `gather`: (items, k) -> (n, k)."""
        sent = values.index_select(0, self._texts)
        received = sent
        if self.size > 1:
            received = values.new_empty(self.largest, values.shape[1])
            dist.reduce_scatter_single(received, sent, group=self.group)
        return received[: self.counts[self.rank]]

    def reduce(self, value: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Replaces `value` by its sum, or by the result of another operation, over ranks, and returns it."""
        if self.size > 1:
            dist.all_reduce(value, operation, group=self.group)
        return value


def _places(counts: Tensor, items: int, largest: int) -> tuple[Tensor, Tensor]:
    """Returns where the texts are in a message of `largest` rows per rank, (items,), and which text each row of such a
    message holds, (ranks * largest,). A row without a text holds another rank's, which is dropped.

    Both are computed on the device: the kernels are enqueued without waiting for it.
    """
    ends = counts.cumsum(0)
    begins = ends - counts
    text = torch.arange(items, device=counts.device)
    owner = torch.searchsorted(ends, text, right=True)
    offset = largest * torch.arange(len(counts), device=counts.device) - begins
    slots = text + offset[owner]
    row = torch.arange(largest, device=counts.device)
    texts = (begins[:, None] + row[None]).clamp(max=items - 1).flatten()
    return slots, texts


def pack_rows(text: Tensor, ids: Tensor | None, *, ones: bool = False) -> Tensor:
    """Returns texts (n, E) as the rows of one message, float32; with `ones` a column of ones after the E values, and
    then the caption ids if there are any.

    A row is a multiple of 16 bytes, so that products with the texts in it read aligned rows.
    """
    width = text.shape[1] + ones
    used = width if ids is None else width + width % 2 + 2
    rows = text.new_zeros(len(text), 4 * -(-used // 4))
    rows[:, : text.shape[1]] = text
    if ones:
        rows[:, width - 1] = 1
    if ids is not None:
        rows.view(torch.int64)[:, -1] = ids
    return rows


def unpack_rows(rows: Tensor, width: int, has_ids: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the first `width` values of each row, and the ids that `pack_rows` has put there."""
    return rows[:, :width], rows.view(torch.int64)[:, -1].contiguous() if has_ids else None


def positive_mask(pairs: Tensor, first: int, ids: tuple[Tensor, Tensor] | None) -> Tensor:
    """Returns which pairs of this rank's images and a chunk of texts are positive.

    Args:
        pairs: (rows, columns), any tensor with an entry for each pair.
        first: the column of the text of row 0, below 0 or beyond the last column if it is in another chunk.
        ids: caption ids of the rows and of the columns; None: equal captions are not positive.
    Returns: (rows, columns) bool.
    """
    positive = torch.zeros_like(pairs, dtype=torch.bool)
    positive.diagonal(first).fill_(True)
    if ids is not None:
        positive |= ids[0][:, None] == ids[1][None, :]
    return positive
