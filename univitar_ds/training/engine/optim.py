"""AdamW, its parameter groups, and the parts of the model that a stage trains."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from univitar_ds.config.schema import OptimizerConfig, RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.training.distributed.process_group import uses_cuda

PARTS = {"patch_embedding": "vision.embeddings.", "blocks": "vision.", "text": "text.", "rest": ""}
"""Parts that are trained or frozen as a whole, with the prefix of their parameters' names. The first match counts."""
GRADIENT_PARTS = {
    "patch_embedding": "vision.embeddings.",
    "blocks": "vision.",
    "text": "text.",
    "logits": "logit_",
    "heads": "",
}
"""Parts whose gradient norm is logged, with prefixes as in PARTS; "rest" is split into "logits" and "heads"."""
_NAMED = {"vision": ("patch_embedding", "blocks")}
"""Names in the run file, each for several parts."""
_BLOCK = re.compile(r"vision\.encoder\.layers\.(\d+)\.")
_PATCH_EMBEDDING = "vision.embeddings."
_NOT_SAVED = ("params", "fused", "foreach", "capturable", "differentiable")
"""Entries of a parameter group that depend on the machine or are the parameters themselves."""


def part_of(name: str, parts: Mapping[str, str] = PARTS) -> str:
    """Returns the part of a parameter. Args: name: of the parameter. parts: prefixes by part."""
    return next(part for part, prefix in parts.items() if name.startswith(prefix))


def trained_parts(cfg: RunConfig, stage: StageConfig) -> list[str]:
    """Returns the parts that a stage trains, in the order of PARTS."""
    names = [*stage.frozen, *(["text"] if cfg.model.text.frozen else [])]
    frozen = {part for name in names for part in _NAMED.get(name, (name,))}
    return [part for part in PARTS if part not in frozen]


def freeze_but(model: nn.Module, parts: Collection[str]) -> None:
    """Disables the gradient of every parameter outside of `parts`. Must be called before DeepSpeed wraps the model."""
    for name, parameter in model.named_parameters():
        if part_of(name) not in parts:
            parameter.requires_grad_(False)


def parameter_groups(
    model: nn.Module, cfg: OptimizerConfig, began: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Returns the trained parameters in groups: only matrices have weight decay, and layers differ in `lr_scale`.

    Vectors are norms, biases, LayerScale and the learned scale and bias of the logits. `lr_scale` multiplies the
    stage's learning rate: with `layer_decay` d below 1 it is d for the encoder's last block, d * d for the block before
    the last and so on down to the patch embedding (BEiT, arXiv:2106.08254); it is 1 for all other parameters. No group
    is empty, since DeepSpeed cannot partition empty groups.

    Args: began: the number of updates before a part was first trained, 0 if absent. Adam's bias correction of the
    part's groups counts from there.
    """
    began = began or {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks = 1 + max((int(match[1]) for name, _ in named if (match := _BLOCK.match(name))), default=-1)
    grouped: dict[tuple[int, float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        decay = cfg.weight_decay if parameter.ndim > 1 else 0.0
        since = began.get(part_of(name), 0)
        grouped[since, cfg.layer_decay ** _layers_above(name, blocks), decay].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale, "began": since}
        for (since, scale, decay), parameters in sorted(grouped.items(), key=lambda group: group[0], reverse=True)
    ]


def build_optimizer(
    model: nn.Module, cfg: OptimizerConfig, began: Mapping[str, int] | None = None
) -> torch.optim.AdamW:
    """Builds AdamW, fused on GPUs. The learning rate is set before every update, see `set_learning_rate`."""
    return torch.optim.AdamW(
        parameter_groups(model, cfg, began),
        lr=0.0,
        betas=cfg.betas,
        eps=cfg.eps,
        weight_decay=0.0,
        fused=uses_cuda(),
    )


def counted_updates(done: float, master: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """Returns AdamW's `step` of one master tensor: on its device for the fused implementation, else on the host."""
    device = master.device if group["fused"] else torch.device("cpu")
    return torch.tensor(done, dtype=torch.float32, device=device)


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a parameter group that determine the result."""
    return {key: value for key, value in group.items() if key not in _NOT_SAVED}


def set_learning_rate(groups: list[dict[str, Any]], lr: float) -> None:
    """Sets the learning rate of every group to `lr`, the stage's learning rate, times the group's `lr_scale`."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]


def _layers_above(name: str, blocks: int) -> int:
    """Returns the power of `layer_decay`: 1 for the last block, blocks + 1 for the patch embedding, 0 for the rest."""
    if match := _BLOCK.match(name):
        return blocks - int(match[1])
    return blocks + 1 if name.startswith(_PATCH_EMBEDDING) else 0
