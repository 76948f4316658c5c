"""Gathers the whole weights of a model from the shards of all ranks, with the values that a checkpoint would have.

Every rank gets copies of all weights; the engine does not change. Nothing is written to files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from univitar_ds.formats.elastic import EMA, FROZEN, MASTER
from univitar_ds.formats.stored_model import HEADS
from univitar_ds.training.checkpoint.sharded import persistent_buffers, writes
from univitar_ds.training.engine.engine import Engine, ParamShard

AT_ONCE = 1 << 25
"""Elements that are gathered at a time, 134 MB in float32."""

Whole = Mapping[str, Tensor]
"""Parameters and buffers of a model, by name."""


class WholeMemory(NamedTuple):
    """Memory for the whole parameters of a model, and a buffer for the elements that are gathered at a time."""

    whole: dict[str, Tensor]
    buffer: Tensor


def memory_for_whole(engine: Engine, dtype: torch.dtype | None, count: int) -> list[WholeMemory]:
    """Returns memory for `count` copies of the model's whole parameters, on the device of this rank.

    It is separate from `gather_whole`, which communicates, so that a rank without enough memory fails before the first
    collective. Distillation heads, which only training uses, are left out.
    Args: dtype: of the copies; None: float32. The model's `exact_parameters` are always float32.
    """
    exact, device = set(getattr(engine.module, "exact_parameters", ())), engine.world.device
    shapes = {piece.name: piece.shape for piece in _wanted(engine)}
    most = max((sum(span.length for span in spans) for spans in _buckets(_wanted(engine))), default=0)
    buffer = torch.empty(most, dtype=torch.float32, device=device)
    types = {name: torch.float32 if dtype is None or name in exact else dtype for name in shapes}

    def empty() -> dict[str, Tensor]:
        return {name: torch.empty(shape, dtype=types[name], device=device) for name, shape in shapes.items()}

    return [WholeMemory(empty(), buffer) for _ in range(count)]


def gather_whole(engine: Engine, memory: WholeMemory, *, averaged: bool) -> dict[str, Tensor]:
    """Fills `memory` with the weights of all ranks. All ranks call it.

    Args: averaged: whether to gather the average of the weights, which the engine must keep.
    Returns: the whole parameters, and copies of the model's persistent buffers.
    """
    world = engine.world
    for spans in _buckets(_wanted(engine)):
        flat = memory.buffer[: sum(span.length for span in spans)].zero_()
        for span, part in zip(spans, flat.split([span.length for span in spans]), strict=True):
            if writes(span.piece, world):
                _put_own(span, _weights_of(span.piece, averaged=averaged), part)
        if world.size > 1:
            dist.all_reduce(flat)  # one rank has each element, the others zeros: the sum is exact
        for span, part in zip(spans, flat.split([span.length for span in spans]), strict=True):
            memory.whole[span.piece.name].view(-1)[span.begin : span.begin + span.length].copy_(part)
    buffers = persistent_buffers(engine.module).items()
    return {**memory.whole, **{name: value.to(world.device) for name, value in buffers if not name.startswith(HEADS)}}


def _wanted(engine: Engine) -> list[ParamShard]:
    return [piece for piece in engine.pieces() if not piece.name.startswith(HEADS)]


class _Span(NamedTuple):
    """`length` elements of a whole parameter, from element `begin` on."""

    piece: ParamShard
    begin: int
    length: int


def _buckets(pieces: Sequence[ParamShard]) -> Iterator[list[_Span]]:
    """Yields lists of spans that cover all parameters, with at most `AT_ONCE` elements each.

    A tensor-parallel parameter is not divided: a list that has only such a parameter may exceed the limit."""
    bucket: list[_Span] = []
    held = 0
    for span in (span for piece in pieces for span in _spans(piece)):
        if bucket and held + span.length > AT_ONCE:
            yield bucket
            bucket, held = [], 0
        bucket.append(span)
        held += span.length
    if bucket:
        yield bucket


def _spans(piece: ParamShard) -> Iterator[_Span]:
    total = math.prod(piece.shape)
    step = AT_ONCE if piece.slice is None else max(total, 1)
    for begin in range(0, total, step):
        yield _Span(piece, begin, min(step, total - begin))


def _weights_of(piece: ParamShard, *, averaged: bool) -> Tensor:
    """Returns the weights of a piece, as `ElasticReader.weights_kind` chooses them."""
    kind = FROZEN if FROZEN in piece.tensors else EMA if averaged else MASTER
    return piece.tensors[kind]


def _put_own(span: _Span, own: Tensor, into: Tensor) -> None:
    """Copies this rank's elements of a span to their positions in `into`, (span.length,)."""
    piece = span.piece
    if piece.slice is not None:
        part = into.new_zeros(span.length // piece.slice.count)
        part[piece.start : piece.start + piece.length].copy_(own)
        piece.slice.put(part, into)
        return
    low, high = max(span.begin, piece.start), min(span.begin + span.length, piece.start + piece.length)
    if low < high:
        into[low - span.begin : high - span.begin].copy_(own[low - piece.start : high - piece.start])
