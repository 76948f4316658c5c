"""A group of ranks that computes the blocks of an encoder together, and its collectives with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.divisors import divisors
from univitar_ds.errors import ConfigError


@dataclass(frozen=True)
class RankGroup:
    """`rank`: index of this rank in the group; `size`: number of ranks; `group`: None if the group is one rank."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


def check_sizes(encoder: EncoderConfig, tensor: int, sequence: int, ranks: int | None = None) -> None:
    """Checks that an encoder can be split over `tensor` times `sequence` ranks.

    Args: ranks: of the run, if known, so that the message names numbers that divide them too.
    Raises: ConfigError with the numbers of ranks that can.
    """
    heads, inner = encoder.num_attention_heads, encoder.inner_width
    if heads % tensor or inner % tensor:
        raise ConfigError(
            f"model.tensor_parallel {tensor} does not divide the encoder's {heads} heads and its feed-forward width of "
            f"{inner}; set it to {_divisors(gcd(heads, inner, ranks or 0))}"
        )
    if heads // tensor % sequence:
        share = (
            f"{heads} heads" if tensor == 1 else f"{heads // tensor} of {heads} heads that a rank has of the weights"
        )
        raise ConfigError(
            f"model.sequence_parallel {sequence} does not divide the encoder's {share}; set it to "
            f"{_divisors(gcd(heads // tensor, (ranks or 0) // tensor))}"
        )


def _divisors(number: int) -> str:
    *most, last = map(str, divisors(number))
    return f"{', '.join(most)} or {last}" if most else last


def sharing_bytes(encoder: EncoderConfig, tensor: int, sequence: int, *, number: int) -> float:
    """Returns the bytes that a rank sends in one pass through all blocks, forward or backward, for each of its tokens.

    Tensor parallelism all-reduces two results (T, D) per block, and three sums of squares in float32: of queries, of
    keys and of the feed-forward layer. A ring all-reduce sends every value twice. Sequence parallelism exchanges
    queries, keys, values and the result of attention; under tensor parallelism a rank has only its share of the heads.

    Args: number: bytes of a value in the forward pass.
    """
    width, layers = encoder.hidden_size, encoder.num_hidden_layers
    sums = 2 * (2 * number * width + 3 * 4) * (tensor - 1) / tensor
    exchanged = 4 * number * width / tensor * (sequence - 1) / sequence
    return layers * (sums + exchanged)


def sharing_collectives(encoder: EncoderConfig, tensor: int, sequence: int) -> int:
    """Returns the number of collectives in one pass through all blocks, forward or backward; see `sharing_bytes`."""
    return encoder.num_hidden_layers * (4 * (tensor > 1) + 2 * (sequence > 1))


def sum_over(values: Tensor, group: RankGroup) -> Tensor:
    """Returns the sum of `values` over the ranks of a group.

    Each rank computes its own results from the whole sum, so the backward pass sums the gradients over the ranks.
    """
    return _Sum.apply(values, group)


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: RankGroup) -> Tensor:
    """Sends rows (n, k) to the ranks of a group in their order, and returns those from the ranks in their order.

    Args: sent, received: numbers of rows to and from each rank, which may be 0. The backward pass returns gradients to
    the rows' ranks.
    """
    return _Exchange.apply(rows, tuple(sent), tuple(received), group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...], group: RankGroup) -> Tensor:
        ctx.way = sent, received, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.way
        return _exchanged(grad, received, sent, group), None, None, None


def _summed(values: Tensor, group: RankGroup) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.group)
    return total


def _exchanged(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: RankGroup) -> Tensor:
    got = rows.new_empty(sum(received), rows.shape[1])
    # As bytes: gloo does not exchange bfloat16.
    out, given = (tensor.view(torch.uint8) for tensor in (got, rows.contiguous()))
    dist.all_to_all_single(out, given, list(received), list(sent), group=group.group)
    return got
