"""Sizes of a run: parameters by part, memory of a rank between steps by ZeRO stage, and bytes of a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from univitar_ds.config.deepspeed import OFFLOADED_OPTIMIZER, on_disk
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.schema import OptimizerConfig, RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.model.described import build_described
from univitar_ds.training.engine.optim import (
    GRADIENT_PARTS,
    PARTS,
    block_matrices,
    moments_of,
    part_of,
    trained_parts,
)

FP32 = 4
MUON = "muon"
_WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
RULE = {
    1: "ZeRO-1: each rank has all weights and gradients; optimizer states are sharded",
    2: "ZeRO-2: each rank has all weights; gradients and optimizer states are sharded",
    3: "ZeRO-3: weights, gradients and optimizer states are sharded",
}
"""What each rank holds between steps, by ZeRO stage."""


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters by part, in the order of GRADIENT_PARTS."""

    by_part: Mapping[str, int]
    matrices: Mapping[str, int] = field(default_factory=dict)
    """Of the parameters in `by_part`, those in the matrices of blocks, which Muon can update."""
    shapes: Mapping[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)
    """Shapes of these matrices, by part."""

    @property
    def total(self) -> int:
        return sum(self.by_part.values())

    def split(self, tensor: int) -> Counts:
        """Returns the counts of one rank if `tensor` ranks share the weights of each block (tensor parallelism).

        The result has no `shapes`.
        """
        parts = (self.by_part, self.matrices)
        return Counts(*({part: n // tensor if part == "blocks" else n for part, n in own.items()} for own in parts))

    def trained(self, config: RunConfig, stage: StageConfig) -> int:
        """Returns the number of parameters that a stage trains."""
        return _trained(self.by_part, config, stage)

    def of_muon(self, config: RunConfig, stage: StageConfig) -> int:
        """Returns the number of parameters that a stage trains by Muon."""
        return _trained(self.matrices, config, stage) if config.optimizer.kind == MUON else 0

    def shapes_of_muon(self, config: RunConfig, stage: StageConfig) -> list[tuple[int, ...]]:
        """Returns the shapes of the matrices that a stage trains by Muon."""
        if config.optimizer.kind != MUON:
            return []
        return [shape for part in _trained_of(self.shapes, config, stage) for shape in self.shapes[part]]

    def moments(self, config: RunConfig, stage: StageConfig) -> int:
        """Returns the bytes of the optimizer's moments of all parameters that a stage trains.

        Raises: PluginError if the optimizer comes from a plugin that was not imported.
        """
        cfg, trained, matrices = config.optimizer, self.trained(config, stage), self.of_muon(config, stage)
        return matrices * _bytes_of(cfg, {"kind": MUON}) + (trained - matrices) * _bytes_of(cfg, {})


def _trained(counts: Mapping[str, int], config: RunConfig, stage: StageConfig) -> int:
    return sum(counts[part] for part in _trained_of(counts, config, stage))


def _trained_of(counts: Mapping[str, Any], config: RunConfig, stage: StageConfig) -> list[str]:
    parts = trained_parts(config, stage)
    return [part for part in counts if (part if part in PARTS else "rest") in parts]


def _bytes_of(cfg: OptimizerConfig, group: Mapping[str, str]) -> int:
    return sum(getattr(torch, moment.dtype).itemsize for moment in moments_of(cfg, group).values())


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank between steps by part, without activations, communication buffers and teacher.

    `offloaded`: names of the parts that are not on the device, `stored`: those of them that are on a local disk instead
    of in host memory; `device`, `host`, `disk`: the sums.
    """

    parts: Mapping[str, float]
    offloaded: tuple[str, ...]
    stored: tuple[str, ...] = ()

    @property
    def device(self) -> float:
        return sum(size for name, size in self.parts.items() if name not in self.offloaded)

    @property
    def host(self) -> float:
        return sum(size for name, size in self.parts.items() if name in self.offloaded and name not in self.stored)

    @property
    def disk(self) -> float:
        return sum(size for name, size in self.parts.items() if name in self.stored)


def count_parameters(
    config: RunConfig, description: Mapping[str, Any], *, teacher_width: int | None, classes: int | None
) -> Counts:
    """Counts the parameters of a run's model without allocating them.

    Arguments and errors are those of `build_described`.
    """
    with torch.device("meta"):
        built = build_described(config, description, teacher_width=teacher_width, classes=classes)
    matrices, shapes = block_matrices(built), defaultdict(list)
    for name, matrix in matrices.items():
        shapes[part_of(name, GRADIENT_PARTS)].append(tuple(matrix.shape))
    return Counts(_by_part(dict(built.named_parameters())), _by_part(matrices), shapes)


def _by_part(parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    counts = dict.fromkeys(GRADIENT_PARTS, 0)
    for name, parameter in parameters.items():
        counts[part_of(name, GRADIENT_PARTS)] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def memory_of_rank(
    config: RunConfig, stage: StageConfig, counts: Counts, world_size: int, resolved: Mapping[str, Any]
) -> RankMemory:
    """Returns the memory of a rank between the steps of a stage.

    Args: world_size: number of ranks that share a training state; resolved: the complete DeepSpeed configuration.
    """
    zero = resolved["zero_optimization"]
    trained = counts.trained(config, stage)
    width, gradient = compute_width(resolved), gradient_width(resolved)
    share = 1 / world_size
    parts = {
        "weights": counts.total * width * (share if zero["stage"] == 3 else 1),
        "gradients": trained * gradient * (share if zero["stage"] > 1 else 1),
        "optimizer": (trained * FP32 + counts.moments(config, stage)) * share,  # master weights and moments
    }
    if config.optimizer.ema_decay is not None:
        parts["average"] = trained * FP32 * share
    offloaded = ("optimizer", "average") if _offloads(zero, OFFLOADED_OPTIMIZER) else ()
    stored = offloaded if on_disk(resolved) else ()
    if stored:  # DeepSpeed reads and writes one sub-group at a time
        states = sum(size for name, size in parts.items() if name in stored)
        parts["buffers"] = states * min(1.0, zero.get("sub_group_size", 10**9) / max(1.0, trained * share))
        offloaded = (*offloaded, "buffers")
    return RankMemory(parts, (*offloaded, "weights") if _offloads(zero, "offload_param") else offloaded, stored)


def checkpoint_bytes(config: RunConfig, stage: StageConfig, counts: Counts, resolved: Mapping[str, Any]) -> int:
    """Returns the bytes of the tensors in a checkpoint: master weights, moments, averaged weights, frozen weights."""
    trained = counts.trained(config, stage)
    kinds = 1 + (config.optimizer.ema_decay is not None)
    return trained * kinds * FP32 + counts.moments(config, stage) + (counts.total - trained) * compute_width(resolved)


def compute_width(resolved: Mapping[str, Any]) -> int:
    """Returns the bytes of a weight in the forward pass: 2 in bf16, else 4."""
    return 2 if resolved.get("bf16", {}).get("enabled") else FP32


def gradient_width(resolved: Mapping[str, Any]) -> int:
    """Returns the bytes of an accumulated gradient."""
    return _WIDTHS.get(resolved.get("data_types", {}).get("grad_accum_dtype"), compute_width(resolved))


def amount(size: float) -> str:
    """Returns a number of bytes with a unit, such as "1.5 GB"."""
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def encoder_of(description: Mapping[str, Any]) -> EncoderConfig:
    """Returns the encoder's configuration in a model's description. Raises: CheckpointError if it is invalid."""
    return EncoderConfig.from_dict(description["encoder"])


def _offloads(zero: Mapping[str, Any], name: str) -> bool:
    return zero.get(name, {}).get("device", "none") != "none"
