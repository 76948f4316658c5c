"""AdamW and its parameter groups."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from univitar_ds.config.schema import OptimizerConfig

_BLOCK = re.compile(r"vision\.encoder\.layers\.(\d+)\.")
_INLET = "vision.embeddings."


def parameter_groups(model: nn.Module, cfg: OptimizerConfig) -> list[dict[str, Any]]:
    """Trained parameters by what they share: matrices decay, vectors do not; each layer has its learning rate.

    Vectors are norms, biases, LayerScale and the learned scale and bias of the logits. `lr_scale` is what a group
    takes of the stage's rate: with `layer_decay` d below 1 the encoder's last block takes d, the one before it d * d
    and so on down to the patch embedding (BEiT, arXiv:2106.08254); everything else takes all of it. A group without
    parameters is left out, DeepSpeed cannot partition one.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks = 1 + max((int(match[1]) for name, _ in named if (match := _BLOCK.match(name))), default=-1)
    grouped: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        decay = cfg.weight_decay if parameter.ndim > 1 else 0.0
        grouped[cfg.layer_decay ** _below_top(name, blocks), decay].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), parameters in sorted(grouped.items(), key=lambda group: group[0], reverse=True)
    ]


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW without a learning rate of its own: the step sets the stage's before every update. Fused on GPUs."""
    return torch.optim.AdamW(
        parameter_groups(model, cfg),
        lr=0.0,
        betas=cfg.betas,
        eps=cfg.eps,
        weight_decay=0.0,
        fused=torch.cuda.is_available(),
    )


def set_learning_rate(groups: list[dict[str, Any]], lr: float) -> None:
    """Gives every group its part of the stage's rate."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]


def _below_top(name: str, blocks: int) -> int:
    """How far below the heads a parameter lies: 0 for everything outside of the encoder."""
    if match := _BLOCK.match(name):
        return blocks - int(match[1])
    return blocks + 1 if name.startswith(_INLET) else 0
