"""AdamW and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from univitar_ds.config.schema import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices decay; vectors do not.

    Vectors are norms, biases, LayerScale and the learned scale and bias of the logits. An empty group is
    left out, DeepSpeed cannot partition one.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW without a learning rate of its own: the step sets the stage's before every update."""
    return torch.optim.AdamW(
        parameter_groups(model, cfg.weight_decay), lr=0.0, betas=cfg.betas, eps=cfg.eps, weight_decay=0.0
    )
