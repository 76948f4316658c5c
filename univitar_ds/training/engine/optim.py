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
"""Parts that are trained or frozen as a whole, with prefixes of their parameters' names. The first match counts."""
GRADIENT_PARTS = {
    "patch_embedding": "vision.embeddings.",
    "blocks": "vision.",
    "text": "text.",
    "logits": "logit_",
    "heads": "",
}
"""Parts whose gradient norm is logged, by the same rule: PARTS, and the rest in two parts."""
_NAMED = {"vision": ("patch_embedding", "blocks")}
"""Names in the run file that mean several parts."""
_BLOCK = re.compile(r"vision\.encoder\.layers\.(\d+)\.")
_INLET = "vision.embeddings."
_OF_THE_MACHINE = ("params", "fused", "foreach", "capturable", "differentiable")


def part_of(name: str, parts: Mapping[str, str] = PARTS) -> str:
    """The part that a parameter belongs to."""
    return next(part for part, prefix in parts.items() if name.startswith(prefix))


def trained_parts(cfg: RunConfig, stage: StageConfig) -> list[str]:
    """Parts that are trained in a stage, in the order of PARTS."""
    frozen = [*stage.frozen, *(["text"] if cfg.model.text.frozen else [])]
    resting = {part for name in frozen for part in _NAMED.get(name, (name,))}
    return [part for part in PARTS if part not in resting]


def freeze_but(model: nn.Module, parts: Collection[str]) -> None:
    """Disables the gradient of every parameter outside of `parts`. Call it only before DeepSpeed wraps the model."""
    for name, parameter in model.named_parameters():
        if part_of(name) not in parts:
            parameter.requires_grad_(False)


def parameter_groups(
    model: nn.Module, cfg: OptimizerConfig, began: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Trained parameters in groups: matrices have weight decay, vectors do not; each layer has its learning rate.

    Vectors are norms, biases, LayerScale and the learned scale and bias of the logits. `lr_scale` multiplies the
    stage's rate: with `layer_decay` d below 1 it is d for the encoder's last block, d * d for the one before it and so
    on down to the patch embedding (BEiT, arXiv:2106.08254); it is 1 for everything else. `began`: the number of updates
    before a part was first trained, if that was not at the start; Adam's bias correction of such a group counts from
    there. Groups without parameters are left out, since DeepSpeed cannot partition them.
    """
    began = began or {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks = 1 + max((int(match[1]) for name, _ in named if (match := _BLOCK.match(name))), default=-1)
    grouped: dict[tuple[int, float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        decay = cfg.weight_decay if parameter.ndim > 1 else 0.0
        since = began.get(part_of(name), 0)
        grouped[since, cfg.layer_decay ** _below_top(name, blocks), decay].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale, "began": since}
        for (since, scale, decay), parameters in sorted(grouped.items(), key=lambda group: group[0], reverse=True)
    ]


def build_optimizer(
    model: nn.Module, cfg: OptimizerConfig, began: Mapping[str, int] | None = None
) -> torch.optim.AdamW:
    """AdamW whose learning rate is set before every update. Fused on GPUs."""
    return torch.optim.AdamW(
        parameter_groups(model, cfg, began),
        lr=0.0,
        betas=cfg.betas,
        eps=cfg.eps,
        weight_decay=0.0,
        fused=uses_cuda(),
    )


def counted_updates(done: float, master: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """AdamW's `step` of one master, on the device for the fused implementation and on the host for others."""
    device = master.device if group["fused"] else torch.device("cpu")
    return torch.tensor(done, dtype=torch.float32, device=device)


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group that determine the result: not its parameters, nor settings of this machine."""
    return {key: value for key, value in group.items() if key not in _OF_THE_MACHINE}


def set_learning_rate(groups: list[dict[str, Any]], lr: float) -> None:
    """Sets the learning rate of every group from the stage's rate."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]


def _below_top(name: str, blocks: int) -> int:
    """The number of layers between a parameter and the heads: 0 for everything outside of the encoder."""
    if match := _BLOCK.match(name):
        return blocks - int(match[1])
    return blocks + 1 if name.startswith(_INLET) else 0
