"""Chooses the DeepSpeed configuration of a run with `deepspeed: auto` by the memory of a GPU.

`ds_configs/README.md` states the rule. Memory is predicted from shapes (`planning.memory`), not measured on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from univitar_ds.config.deepspeed import AUTO, packs_per_rank, read_deepspeed, resolve_deepspeed
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.drafting.machine import Machine
from univitar_ds.planning.forecast.step_load import Placement, PlannedModel, peak_of, wanted_recomputation
from univitar_ds.planning.sizes import Counts, amount

USABLE = 0.8
"""Share of a GPU's memory that the prediction may fill. The rest is for CUDA itself, a teacher and fragmentation."""
SEVERAL_PACKS = 4
"""Minimum number of packs of a rank in a step for ZeRO-1. ZeRO-1 exchanges gradients once a step, after the backward
pass; ZeRO-2 exchanges them for each pack, overlapped with the backward pass. Chosen, not measured."""
ON_CPU = "zero3_cpu"
OFFLOADED = "zero3_offload"
ON_GPUS = ("zero1", "zero2", "zero3_node", "zero3", OFFLOADED)
"""Candidates, in the order of the number of messages in a step. The first that fits is chosen."""
_TASKS = re.compile(r"\d+")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run. `size`: number of ranks; `node`: ranks on each machine; `gpu_memory`: bytes of the smallest
    GPU, 0 on a CPU."""

    size: int
    node: int
    gpu_memory: float


@dataclass(frozen=True)
class Choice:
    """A chosen configuration: its name in `ds_configs/`, and the reason. `fits`: whether the predicted memory fits."""

    name: str
    reason: str
    fits: bool = True

    @property
    def line(self) -> str:
        return f"deepspeed: {AUTO} chooses {self.name}: {self.reason}"


def ranks_of(world_size: int, machine: Machine, environment: Mapping[str, str]) -> Ranks:
    """Returns the ranks of a run. The number on each machine comes from the launcher's variables, or else from the
    number of its GPUs; without GPUs, all ranks are on one machine."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")
    found = (_TASKS.match(environment.get(name, "")) for name in names)  # Slurm writes 8(x2),4
    node = next((int(match[0]) for match in found if match), machine.gpus or world_size)
    return Ranks(world_size, max(1, min(world_size, node)), machine.gpu_memory if machine.gpus else 0.0)


def choose(config: RunConfig, description: Mapping[str, Any], counts: Counts, ranks: Ranks) -> Choice:
    """Returns the first of ON_GPUS whose predicted memory fits into a GPU in every stage; ON_CPU without GPUs.

    If none fits, returns the one without offloading that needs the least memory.

    Args: description: `ContrastiveModel.description` of the model; counts: its numbers of parameters.
    Raises: ConfigError if the number of ranks does not divide the lanes.
    """
    if not ranks.gpu_memory:
        return Choice(ON_CPU, "fp32 on a CPU, since no GPU is used")
    packs, room = packs_per_rank(config, ranks.size), USABLE * ranks.gpu_memory
    needs: dict[str, tuple[float, StageConfig]] = {}
    for name in _candidates(ranks, packs, config.model.tensor_parallel):
        needs[name] = _largest(config, description, counts, ranks, name)
        if needs[name][0] <= room:
            break
    fits = needs[name][0] <= room
    if not fits:  # offloading costs much and would not help enough
        needs.pop(OFFLOADED, None)
        name = min(needs, key=lambda one: needs[one][0])
    needed, stage = needs.pop(name)
    gpus = f"{ranks.size} GPU{'' if ranks.size == 1 else 's'} of {amount(ranks.gpu_memory)}, {ranks.node} on a machine"
    why = f"{counts.total / 1e6:,.0f}M parameters on {gpus}; a GPU needs about {amount(needed)} in stage {stage.name}, "
    why += f"of {amount(room)} ({100 * USABLE:.0f} % of its memory)"
    if needs:
        why += f"; too much: {', '.join(f'{other} {amount(size)}' for other, (size, _) in needs.items())}"
    elif name == "zero1":
        why += f"; a GPU has {packs} packs a step, whose gradients are exchanged once"
    if not fits:
        why += "; lower stages.N.token_budget, set model.checkpoint_every to 1, or use more GPUs if memory runs out"
    return Choice(name, why, fits)


def _candidates(ranks: Ranks, packs: int, tensor: int) -> Sequence[str]:
    """Returns the names in ON_GPUS that these ranks can use.

    Args: packs: of a rank in a step; tensor: `model.tensor_parallel`.
    """
    if ranks.size == 1:
        return ("zero2", OFFLOADED)
    left_out = set() if packs >= SEVERAL_PACKS else {"zero1"}
    if tensor > 1:
        left_out |= {"zero3_node", OFFLOADED}
    if ranks.node in (1, ranks.size) or ranks.size % ranks.node:
        left_out.add("zero3_node")
    return [name for name in ON_GPUS if name not in left_out]


def _largest(
    config: RunConfig, description: Mapping[str, Any], counts: Counts, ranks: Ranks, name: str
) -> tuple[float, StageConfig]:
    """Returns the predicted peak memory of a GPU in bytes in the stage that needs most, and that stage.

    For `checkpoint_every: auto`, recomputation of every block is assumed, the kind with the least memory.
    """
    resolved = resolve_deepspeed(config, ranks.size, read_deepspeed(name), (AUTO, name))
    model, place = PlannedModel(config, description, counts), Placement(ranks.size, ranks.node, resolved)
    kinds = [wanted_recomputation(config, stage) for stage in config.stages]
    needs = [
        peak_of(model, stage, place, 1 if kind == "auto" else kind, evaluates=True).bytes
        for stage, kind in zip(config.stages, kinds, strict=True)
    ]
    needed = max(needs)
    return needed, config.stages[needs.index(needed)]
