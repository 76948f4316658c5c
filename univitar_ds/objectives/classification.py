"""Classification loss: cross entropy over the classes of each item's data set, with label smoothing and mixed targets.

The loss of an item with classes a and b, share w of a, and C classes in its set is

    -(1 - s) * (w log p_a + (1 - w) log p_b) - s / C * sum of log p over the set

with s the label smoothing and p the softmax over the set's classes. The loss of a step is a sum over items that do not
depend on each other, so it is computed pack by pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Targets of N items, tensors of shape (N,) on one device.

    `first`: class of the item; -1 if it has none, and then it adds no loss. `second`: class of the item that is mixed
    into it. `share`: float32, share of the item itself, 1 if nothing is mixed into it. `begin`, `end`: range of the
    classes of the item's set.
    """

    first: Tensor
    second: Tensor
    share: Tensor
    begin: Tensor
    end: Tensor


def class_loss(logits: Tensor, targets: Targets, smoothing: float = 0.0) -> Tensor:
    """Returns the sum of the losses of N items, a float32 scalar. Args: logits: (N, C), computed with in float32."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    labelled = targets.first >= 0
    begin = targets.begin.where(labelled, 0)
    end = targets.end.where(labelled, logits.shape[1])
    outside = (columns < begin[:, None]) | (columns >= end[:, None])
    log = logits.float().masked_fill(outside, -torch.inf).log_softmax(dim=1)
    first, second = (
        log.gather(1, index.clamp(min=0)[:, None])[:, 0] for index in (targets.first, targets.second.where(labelled, 0))
    )
    chosen = targets.share * first + (1 - targets.share) * second
    uniform = log.masked_fill(outside, 0.0).sum(dim=1) / (end - begin)
    return -(((1 - smoothing) * chosen + smoothing * uniform) * labelled).sum()
