"""The optimizer, its parameter groups and moments, and the parts of the model that a stage trains."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from univitar_ds.config.schema import OptimizerConfig, RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.formats.stored_model import MOMENTS
from univitar_ds.plugins import OPTIMIZERS, Moment, optimizer_of
from univitar_ds.training.distributed.process_group import uses_cuda
from univitar_ds.training.engine.zero3 import blocks_of
from univitar_ds.training.optimizers import muon
from univitar_ds.training.optimizers.elementwise import ElementwiseOptimizer
from univitar_ds.training.optimizers.muon import MatricesAndAdamW

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
"""Names in the run file that mean several parts."""
_BLOCK = re.compile(r"vision\.encoder\.layers\.(\d+)\.")
_PATCH_EMBEDDING = "vision.embeddings."
ADAMW = "adamw"
_MOMENTS = {ADAMW: dict.fromkeys(MOMENTS, Moment()), muon.KIND: {muon.MOMENTUM: Moment()}}
_ON_HOST = {"fused": False}
"""Option of parameter groups whose `step` is a tensor on the host."""
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
    """Returns the trained parameters in groups by weight decay, `lr_scale` and the start of their training.

    Vectors have no weight decay: norms, biases, LayerScale and the learned scale and bias of the logits. `lr_scale`
    multiplies the stage's learning rate: with `layer_decay` d below 1 it is d for the encoder's last block, d * d for
    the block before the last and so on down to the patch embedding (BEiT, arXiv:2106.08254); it is 1 for all other
    parameters. With the optimizer kind muon, the matrices of all blocks are in one group, so that one exchange of
    messages updates them; `matrix_scales` returns the factors of their learning rates. No group is empty, since
    DeepSpeed cannot partition empty groups.

    Args: began: by part, the number of updates of the run before the part was first trained, 0 if absent. Adam's bias
        correction counts the updates of a group from there.
    """
    began = began or {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks = 1 + max((int(match[1]) for name, _ in named if (match := _BLOCK.match(name))), default=-1)
    matrices = {id(parameter) for parameter in block_matrices(model).values()} if cfg.kind == muon.KIND else ()
    grouped: dict[tuple[int, float, float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        decay = cfg.weight_decay if parameter.ndim > 1 else 0.0
        since, whole = began.get(part_of(name), 0), id(parameter) in matrices
        scale = 1.0 if whole else cfg.layer_decay ** _layers_above(name, blocks)
        grouped[since, scale, decay, whole].append(parameter)
    kinds = {True: {"kind": muon.KIND, **_ON_HOST}, False: {} if cfg.kind in OPTIMIZERS else {**_ON_HOST}}
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale, "began": since, **kinds[whole]}
        for (since, scale, decay, whole), parameters in sorted(
            grouped.items(), key=lambda group: group[0], reverse=True
        )
    ]


def block_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained matrices of the towers' blocks by name: weights of two dimensions, except embeddings."""
    inside = (module for block in blocks_of(model) for module in block.modules())
    found = {
        id(weight)
        for module in inside
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.ndim == 2 and weight.requires_grad
    }
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in found}


def matrix_scales(model: nn.Module, cfg: OptimizerConfig) -> dict[str, float]:
    """Returns the factor of the stage's learning rate of each matrix that Muon updates, by name."""
    names = block_matrices(model)
    blocks = 1 + max((int(match[1]) for name in names if (match := _BLOCK.match(name))), default=-1)
    return {name: cfg.muon.lr_scale * cfg.layer_decay ** _layers_above(name, blocks) for name in names}


def moments_of(cfg: OptimizerConfig, group: Mapping[str, Any]) -> Mapping[str, Moment]:
    """Returns the moments of a parameter group by name, in the order of checkpoints.

    Raises: PluginError if the optimizer is that of a plugin that is not loaded."""
    if cfg.kind in OPTIMIZERS:
        return _MOMENTS[group.get("kind", ADAMW)]
    return optimizer_of(cfg.kind, cfg.options)[1].moments


def build_optimizer(
    model: nn.Module, cfg: OptimizerConfig, began: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """Builds the optimizer; AdamW is fused on GPUs. Its learning rate is 0 until `set_learning_rate`, which is called
    before every update.

    Raises: PluginError if the optimizer is that of a plugin that is not loaded."""
    groups = parameter_groups(model, cfg, began)
    if cfg.kind not in OPTIMIZERS:
        return ElementwiseOptimizer(groups, cfg.kind, *optimizer_of(cfg.kind, cfg.options))
    options = {"lr": 0.0, "betas": cfg.betas, "eps": cfg.eps, "weight_decay": 0.0, "fused": uses_cuda()}
    if cfg.kind == muon.KIND:
        return MatricesAndAdamW(groups, cfg.muon, matrix_scales(model, cfg), **options)
    return torch.optim.AdamW(groups, **options)


def put_unaligned_last(optimizer: torch.optim.Optimizer) -> None:
    """Moves parameters whose number of elements is not a multiple of 8 to the end of their groups.

    Needed for bf16 with ZeRO 1: DeepSpeed's class for it concatenates the parameters of a group and ignores
    `parameter_alignment`. No parameter after a logit scale, which has one element, would begin at a multiple of 16
    bytes, as kernels read them. ZeRO 2 aligns parameters, and ZeRO-3 gathers each into memory of its own.
    """
    for group in optimizer.param_groups:
        group["params"].sort(key=lambda parameter: parameter.numel() % 8 > 0)


def counted_updates(done: float, master: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """Returns `done` as the `step` of one master tensor: on its device if the group is fused, else on the host."""
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
