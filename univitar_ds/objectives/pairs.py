"""Contrastive losses that are a sum over pairs of an image and a text, over all ranks.

A `PairLoss` returns the sum of the losses of a block of pairs, and its gradients. This module calls it for all blocks
of the step with the texts of all ranks, and divides by the number of items. So a loss needs no code for several ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from univitar_ds.errors import PluginError
from univitar_ds.objectives.exchange import (
    ContrastiveResult,
    Exchange,
    nothing,
    pack_rows,
    positive_mask,
    unpack_rows,
)


class PairGradients(NamedTuple):
    """The loss of n * m pairs and its gradients: `loss`, (), the sum over pairs; the others are gradients of that sum
    divided by the items of the step: `images` (n, E), `texts` (m, E), `scale` (), `bias` ()."""

    loss: Tensor
    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor


class PairLoss(Protocol):
    """A loss of a block of pairs."""

    def __call__(
        self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, positives: Tensor, items: int
    ) -> PairGradients:
        """Returns the loss and gradients of a block.

        Args: images: (n, E), texts: (m, E), float32; scale, bias: (); positives: (n, m) bool; items: of the step.
        """


def pair_losses(loss_of_chunk: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> PairLoss:
    """Returns a loss whose gradients autograd computes.

    Args: loss_of_chunk: see `plugins.Objective`; called with images, texts, scale, bias and positives.
    The loss raises: PluginError if `loss_of_chunk` returns no scalar with a gradient.
    """

    def loss(
        images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, positives: Tensor, items: int
    ) -> PairGradients:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (images, texts, scale, bias)]
        with torch.enable_grad():
            value = loss_of_chunk(*leaves, positives)
            if not isinstance(value, Tensor) or value.numel() != 1:
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise PluginError(f"loss_of_chunk returned {shape}, not a tensor of one number; sum it over the pairs")
            if not value.requires_grad:
                raise PluginError("loss_of_chunk returned a number without a gradient; compute it from its arguments")
            gradients = torch.autograd.grad(
                value.reshape(()) / items, leaves, allow_unused=True, materialize_grads=True
            )
        return PairGradients(value.detach().reshape(()).double(), *gradients)

    return loss


def check_additive(loss: PairLoss) -> None:
    """Checks that the loss of a block of random pairs is the sum of the losses of its parts.

    Raises: PluginError if they differ, or the loss is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(count, 16, generator=generator), dim=-1) for count in (6, 8))
    scale, bias = torch.tensor(10.0), torch.tensor(-2.0)
    positives = torch.zeros(6, 8, dtype=torch.bool)
    positives.fill_diagonal_(True)

    def of(rows: slice, columns: slice) -> float:
        return float(loss(images[rows], texts[columns], scale, bias, positives[rows, columns], 1).loss)

    rows, columns = (slice(0, 2), slice(2, 6)), (slice(0, 3), slice(3, 8))
    whole = of(slice(6), slice(8))
    parts = sum(of(row, column) for row in rows for column in columns)
    if not math.isfinite(whole):
        raise PluginError(f"the loss of 48 random pairs is {whole}; it must be a finite number")
    if abs(whole - parts) > 1e-3 * max(abs(whole), abs(parts)):
        raise PluginError(
            f"the loss of 48 pairs is {whole:.6g}, and {parts:.6g} in four parts; it must be a sum over the pairs, "
            "without a mean or a softmax over the block"
        )


@torch.no_grad()
def loss_of_pairs(
    loss: PairLoss,
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
    """Computes the loss over all pairs and the gradients. Every rank of the exchange must call it.

    Many arguments because the loss takes results of both towers and settings of the exchange.

    Args:
        loss: of a block of pairs.
        vision, text: (n, E), converted to float32; row i of both is a pair. n may differ between ranks and may be 0. If
            n is 0 on all ranks, the loss is 0.
        scale, bias: (1,) or (), the same on all ranks. `scale` is not a logarithm.
        caption_ids: (n,) int64, equal for equal captions. Used only with `same_caption_positive`.
        chunk: number of texts that are compared at a time.
        same_caption_positive: whether pairs with equal captions are positive too, on any ranks.
        exchange: one whose number of items is n; None: one of all ranks is created.
    """
    exchange = exchange or Exchange(len(vision), vision.device)
    if not exchange.items:
        return nothing(vision, text)
    vision, scale, bias = vision.float(), scale.float().reshape(()), bias.float().reshape(())
    own_ids = caption_ids.to(vision.device) if same_caption_positive else None
    rows = pack_rows(text.float(), own_ids)
    blocks = exchange.blocks(rows)
    vision_grad = torch.zeros_like(vision)
    text_grad = vision.new_zeros(len(rows), text.shape[1])
    totals = torch.zeros(3, dtype=torch.float64, device=vision.device)  # loss, scale and bias gradient
    for owner in blocks.owners():
        texts, ids = unpack_rows(blocks.gather(rows, owner), text.shape[1], own_ids)
        gradient = vision.new_zeros(len(texts), text.shape[1])
        for start in range(0, len(texts) if len(vision) else 0, chunk):
            part = slice(start, start + chunk)
            pair_ids = None if ids is None else (own_ids, ids[1][part])
            shape = len(vision), len(texts[part])
            positive = positive_mask(shape, blocks.first(owner) - start, pair_ids, vision.device)
            found = loss(vision, texts[part], scale, bias, positive, exchange.items)
            totals += torch.stack([value.double() for value in (found.loss, found.scale, found.bias)])
            vision_grad += found.images
            gradient[part] = found.texts
        del texts  # frees memory for the message of the gradients
        text_grad += blocks.scatter_sum(gradient, owner)
        del gradient
        rows, text_grad = blocks.shift(rows, text_grad, owner)
    return ContrastiveResult(
        loss=exchange.total(totals[0] / exchange.items),
        items=exchange.items,
        vision_grad=vision_grad,
        text_grad=text_grad,
        scale_grad=totals[1:2].float(),
        bias_grad=totals[2:3].float(),
    )
