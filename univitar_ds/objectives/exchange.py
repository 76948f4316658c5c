"""The messages of the contrastive losses: the texts of a step go to all ranks, and their gradients come back.

Every rank compares its own images with the texts of all ranks, `chunk` texts at a time. The texts arrive in one
all-gather, and one reduce-scatter returns the sum of their gradients over ranks. So the number of messages does not
depend on the number of ranks, and the number of chunks depends on the texts of the step only.

Steps with more texts than `GATHERED_BYTES` are compared in blocks: the ranks are divided into groups, and the texts of
one group at a time are gathered. The texts move from group to group in a ring: at each hop a rank holds the texts of
one rank of another group, the ranks of its group gather these texts, and the sums of their gradients move on with them.
So the number of messages grows with the number of groups, not with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

GATHERED_BYTES = 2**30
"""Most bytes of texts that are gathered at once. The loss needs twice as much while it runs, for texts and gradients:
2 GiB, a fortieth of a GPU of 80 GB. 1 GiB holds 232,000 texts of 1152 values. Messages of that length take so long that
the latency of a few more is negligible."""


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
    """

    def __init__(
        self,
        items: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        limit: int = GATHERED_BYTES,
        known: tuple[Tensor, list[int]] | None = None,
    ) -> None:
        """Exchanges the numbers of items of all ranks. Every rank of the group must create an exchange.

        Args: items: number of items of this rank, which may differ between ranks and may be 0. limit: most bytes of
        texts that are gathered at once, unless one rank has more. known: the numbers of items of all ranks, (size,)
        int64 on the device and as a list, if the ranks have exchanged them before.
        """
        self.group, self.limit = group, limit
        self.size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if self.size > 1 else 0
        self.counts: list[int] = []
        if known is not None:
            self.on_device, self.counts = known
            assert self.counts[self.rank] == items, (self.counts, self.rank, items)
            return
        # Filled on the device: the host would wait for a copy.
        counts = mine = torch.full((1,), items, dtype=torch.int64, device=device)
        if self.size > 1:
            counts = mine.new_empty(self.size)
            dist.all_gather_single(counts, mine, group=group)
        self.on_device = counts
        self.counts = counts.tolist()  # read on the host, since they are sizes of messages

    @property
    def items(self) -> int:
        """Number of items of the step, over all ranks."""
        return sum(self.counts)

    def blocks(self, rows: Tensor) -> Blocks:
        """Returns the blocks in which the texts `rows` (n, k) are gathered, with as few groups as `limit` allows.

        All groups have the same number of ranks.
        """
        row_bytes = rows.shape[1] * rows.element_size()
        for groups in (count for count in range(1, self.size) if self.size % count == 0):
            members = self.size // groups
            starts = range(0, self.size, members)
            longest = max(max(self.counts[start : start + members]) for start in starts)
            if members * longest * row_bytes <= self.limit:
                return Blocks(self, groups)
        return Blocks(self, self.size)

    def total(self, value: Tensor) -> float:
        """Returns the sum over ranks. Synchronizes with the device: a loss that is not finite must get a gradient that
        is not finite."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value.item()


class Blocks:
    """The texts of a step in one block for each group of ranks, which this rank's group compares one after another.

    A loop over `owners` calls `gather` with the rows of the owner that this rank holds, compares the gathered texts,
    calls `scatter_sum` with their gradients, and calls `shift` with rows and sums. After the loop all rows are back on
    their own ranks.

    All ranks of a group send messages of one size, that of the rank with the most texts, since all-gather and
    reduce-scatter require it. The padding rows are dropped before the texts are compared.
    """

    def __init__(self, exchange: Exchange, groups: int) -> None:
        self.exchange, self.groups = exchange, groups
        self.members = exchange.size // groups
        self.own, self.place = divmod(exchange.rank, self.members)
        self.group = exchange.group if groups == 1 else _group_of(exchange, self.own, self.members)
        self._known_places: dict[int, tuple[Tensor, Tensor]] = {}

    def owners(self) -> Iterator[int]:
        """Yields the group whose texts are compared, this rank's first."""
        for hop in range(self.groups):
            yield (self.own - hop) % self.groups

    def counts(self, owner: int) -> list[int]:
        """Returns the number of texts of each rank of the group `owner`."""
        return self.exchange.counts[owner * self.members : (owner + 1) * self.members]

    def first(self, owner: int) -> int:
        """Returns the index of this rank's first text in a block; the number of texts if it is in another block."""
        counts = self.counts(owner)
        return sum(counts[: self.place]) if owner == self.own else sum(counts)

    def rows_of(self, values: Tensor, owner: int) -> Tensor:
        """Returns the rows of `values` for the texts that this rank passed to `gather`."""
        counts = self.counts(owner)
        begin = sum(counts[: self.place])
        return values[begin : begin + counts[self.place]]

    def gather(self, rows: Tensor, owner: int) -> Tensor:
        """Returns the rows of all ranks of the group in their order: (n, k) -> (texts of the owner, k)."""
        counts = self.counts(owner)
        sent = rows.new_empty(max(counts), rows.shape[1])
        sent[: len(rows)] = rows
        received = sent
        if self.members > 1 and len(sent):
            received = rows.new_empty(self.members * len(sent), rows.shape[1])
            dist.all_gather_single(received, sent, group=self.group)
        return received.index_select(0, self._places(owner)[0])

    def scatter_sum(self, values: Tensor, owner: int) -> Tensor:
        """Sums `values` over the ranks of the group. Returns the rows for the texts that this rank passed to
        `gather`."""
        counts = self.counts(owner)
        sent = values.index_select(0, self._places(owner)[1])
        received = sent
        if self.members > 1 and len(sent):
            received = values.new_empty(max(counts), values.shape[1])
            dist.reduce_scatter_single(received, sent, group=self.group)
        return received[: counts[self.place]]

    def logsumexp(self, values: Tensor) -> Tensor:
        """Returns the logarithm of the sum over the ranks of the group of exp(values), which may be -inf."""
        largest = values.clone()
        if self.members > 1 and len(values):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        largest.clamp_(min=torch.finfo(values.dtype).min)  # -inf - -inf is not a number
        total = (values - largest).exp()
        if self.members > 1 and len(values):
            dist.all_reduce(total, group=self.group)
        return largest + total.log()

    def shift(self, rows: Tensor, values: Tensor, owner: int) -> tuple[Tensor, Tensor]:
        """Sends `rows` and their `values` to the next group, and returns those from the previous group. Both have the
        same dtype, and are sent in one message."""
        if self.groups == 1:
            return rows, values
        exchange, width = self.exchange, rows.shape[1]
        sent = torch.cat([rows, values], dim=1)
        count = self.counts((owner - 1) % self.groups)[self.place]
        received = sent.new_empty(count, sent.shape[1])
        following, preceding = ((exchange.rank + step) % exchange.size for step in (self.members, -self.members))
        if exchange.group is not None:
            following, preceding = (dist.get_global_rank(exchange.group, rank) for rank in (following, preceding))
        messages = []
        if len(sent):
            messages.append(dist.P2POp(dist.isend, sent, following, exchange.group))
        if count:
            messages.append(dist.P2POp(dist.irecv, received, preceding, exchange.group))
        for work in dist.batch_isend_irecv(messages) if messages else ():
            work.wait()
        return received[:, :width].contiguous(), received[:, width:].contiguous()

    def _places(self, owner: int) -> tuple[Tensor, Tensor]:
        """Returns the row of each text in a message, (texts,), and the text of each row of a message, (rows,). A
        padding row has the index of some other text.

        Both are computed on the device, so that the host does not wait for it.
        """
        if owner in self._known_places:
            return self._known_places[owner]
        counts = self.counts(owner)
        items, largest = sum(counts), max(counts)
        on_device = self.exchange.on_device[owner * self.members : (owner + 1) * self.members]
        ends = on_device.cumsum(0)
        begins = ends - on_device
        text = torch.arange(items, device=ends.device)
        rank = torch.searchsorted(ends, text, right=True)
        offset = largest * torch.arange(self.members, device=ends.device) - begins
        row = torch.arange(largest, device=ends.device)
        texts = (begins[:, None] + row[None]).clamp(max=items - 1).flatten()
        self._known_places[owner] = text + offset[rank], texts
        return self._known_places[owner]


_groups: WeakKeyDictionary[dist.ProcessGroup, dict[int, dist.ProcessGroup]] = WeakKeyDictionary()
"""{process group of all ranks: {ranks per group: this rank's group}}: each group is created once."""


def _group_of(exchange: Exchange, own: int, members: int) -> dist.ProcessGroup | None:
    """Returns this rank's group of `members` ranks; None for one rank. Every rank creates only its own group."""
    if members == 1:
        return None
    world = exchange.group or dist.group.WORLD
    made = _groups.setdefault(world, {})
    if members not in made:
        ranks = [dist.get_global_rank(world, rank) for rank in range(own * members, (own + 1) * members)]
        made[members] = dist.new_group(ranks, use_local_synchronization=True)
    return made[members]


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


def unpack_rows(rows: Tensor, width: int, own_ids: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Returns the first `width` values of each row, and the ids of images and texts, None without `own_ids`."""
    ids = None if own_ids is None else (own_ids, rows.view(torch.int64)[:, -1].contiguous())
    return rows[:, :width], ids


def positive_mask(
    shape: tuple[int, int], first: int, ids: tuple[Tensor, Tensor] | None, device: torch.device
) -> Tensor:
    """Returns which pairs of this rank's images and a chunk of texts are positive.

    Args:
        shape: numbers of images (rows) and of texts (columns).
        first: the column of the text of row 0, below 0 or beyond the last column if it is in another chunk.
        ids: caption ids of the rows and of the columns; None: equal captions are not positive.
    Returns: (rows, columns) bool.
    """
    positive = torch.zeros(shape, dtype=torch.bool, device=device)
    positive.diagonal(first).fill_(True)
    if ids is not None:
        positive |= ids[0][:, None] == ids[1][None, :]
    return positive
