"""Reference implementations for comparison with the trainer: contrastive losses and a plain training loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.closeness import AdamReach
from tests.support.standin import LANES, STANDIN_TERMS, inputs, pack
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.training.engine.optim import parameter_groups


def dense_sigmoid(vision: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None = None) -> Tensor:
    """Mean over items of the sum over all pairs; with `ids`, items with equal ids are positive pairs."""
    n = vision.shape[0]
    positive = torch.eye(n, dtype=torch.bool) if ids is None else ids[:, None] == ids[None]
    sign = torch.where(positive, 1.0, -1.0).to(vision.dtype)
    return -F.logsigmoid(sign * (vision @ text.T * scale + bias)).sum() / max(n, 1)


def dense_softmax(vision: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None = None) -> Tensor:
    """Cross-entropy of rows and of columns, averaged; with `ids`, equal ids share the target evenly."""
    n = vision.shape[0]
    positive = torch.eye(n, dtype=torch.bool) if ids is None else ids[:, None] == ids[None]
    target = positive.to(vision.dtype) / positive.sum(1, keepdim=True)
    logits = vision @ text.T * scale
    entropies = -(target * logits.log_softmax(1)).sum() - (target.T * logits.log_softmax(0)).sum()
    return entropies / (2 * max(n, 1)) + 0.0 * bias.sum()


@dataclass(frozen=True)
class Trained:
    """A result of `dense_training`: (loss, gradient norm) of every step, the weights, and their `AdamReach`."""

    curve: list[tuple[float, float]]
    weights: dict[str, Tensor]
    reach: dict[str, Tensor]


def dense_training(
    model: nn.Module, steps: int, *, lr, clip: float, terms: float = STANDIN_TERMS, dtype: torch.dtype = torch.float32
) -> Trained:
    """Train `model` on the packs of all lanes at once with plain torch. `terms` of a gradient and `dtype` are those of
    the result that is compared with it."""
    reach = AdamReach(model, terms, dtype)
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimizerConfig()), lr=0.0, betas=(0.9, 0.98), eps=1e-8)
    curve = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        outputs = [model(*inputs(pack(step, lane))) for lane in range(LANES)]
        vision, text = (torch.cat([output[i] for output in outputs]) for i in (0, 1))
        loss = dense_sigmoid(vision, text, outputs[0][2], outputs[0][3])
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        reach.step(optimizer, lr(step))
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return Trained(curve, model.state_dict(), reach.by_name)
