"""A model with given gradients without rounding errors, so that runs on any number of ranks can be compared bit for
bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.training import ds_config
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.formats.elastic import MASTER
from univitar_ds.training.checkpoint.sharded import load_checkpoint, save_checkpoint
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.engine.engine import build_engine

STEPS, MIDDLE = 50, 20
SHAPES = {"wide": (10, 24), "tall": (31, 8), "square": (12, 12), "vector": (9,)}
KINDS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {},
    "bf16 zero1": {"stage": 1, "bf16": True},
    "bf16 zero3": {"bf16": True},
    "offload": {"offload": True},
}
FAST = ("zero2", "zero3", "bf16 zero1")
"""Configurations with different optimizer classes of DeepSpeed. The other ones are for slow tests."""
Parts = dict[str, tuple[int, dict[str, Tensor]]]
"""By trained parameter: start of a rank's part, and its values by kind."""


def drawn(seed, shape):
    """Random numbers that bfloat16 represents exactly, so that no run rounds them."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().float()


class Weight(nn.Module):
    """A weight whose gradient does not depend on it."""

    def __init__(self, seed, shape):
        super().__init__()
        self.seed, self.step = seed, 0
        self.weight = nn.Parameter(drawn(seed, shape) / 4)

    def forward(self, x):
        shape = getattr(self.weight, "ds_shape", self.weight.shape)
        return x + (self.weight * drawn(1000 * self.seed + self.step, shape).to(self.weight.dtype)).float().sum()


class Block(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.parts = nn.ModuleDict({name: Weight(seed + n, shape) for n, (name, shape) in enumerate(SHAPES.items())})
        self.lookup = nn.Embedding(5, 4)
        self.lookup.requires_grad_(False)

    def forward(self, x):
        for part in self.parts.values():
            x = part(x)
        return x


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.ModuleList(Block(10 * n) for n in range(1, 4))
        self.vision = nn.ModuleDict({"embeddings": Weight(91, (6, 6)), "encoder": nn.ModuleDict({"layers": layers})})
        self.head = Weight(92, (7, 5))

    def forward(self, x):
        x = self.vision["embeddings"](x)
        for block in self.vision["encoder"]["layers"]:
            x = block(x)
        return self.head(x)


def at(model, step):
    for module in model.modules():
        if isinstance(module, Weight):
            module.step = step


def rate(step):
    return 1e-2 * (1 + step % 3)


def train(engine, first, last, skipped=()):
    """Trains the steps from `first` to `last`. Before each one in `skipped`, a step has a gradient that is not finite
    on the last rank."""
    for step in range(first, last):
        at(engine.module, step)
        for fault in ([float("nan")] if step in skipped else []) + [1.0]:
            engine.zero_grad(rate(step))
            factor = fault if engine.world.rank == engine.world.size - 1 else 1.0
            engine.backward(engine(torch.zeros(())) / engine.world.size * factor)
            engine.step()
            assert engine.updated == (fault == 1.0)


def scale_of(name: str) -> float:
    """The factor of a parameter's learning rate with a layer decay of 0.5."""
    block = int(name.split(".")[3]) if "layers" in name else 3 if name.startswith("head") else -1
    return 0.5 ** (3 - block)


def trained(
    world: World,
    cfg: OptimizerConfig,
    settings: dict[str, Any],
    source: Path | None = None,
    save_to: Path | None = None,
) -> Parts:
    """Trains from step 0, or from the checkpoint `source` at MIDDLE, to STEPS, with some skipped updates."""
    content = ds_config(1, **settings) | {"gradient_clipping": 0.0}
    engine = build_engine(Towers(), cfg, content, world)
    if source is None:
        train(engine, 0, MIDDLE, skipped=[0, 3])
    else:
        load_checkpoint(engine, source)
    if save_to is not None:
        save_checkpoint(engine, save_to, MIDDLE, {}, {}, keep=1)
    train(engine, MIDDLE, STEPS, skipped=[MIDDLE])
    assert engine.optimizer_state()["updates"] == STEPS
    parts = {
        piece.name: (piece.start, {kind: value.clone() for kind, value in piece.tensors.items()})
        for piece in engine.pieces()
        if piece.length and MASTER in piece.tensors
    }
    engine.close()
    return parts


def assert_whole(answers: list[Parts], wanted: dict[str, dict[str, Tensor]], what: str, copies: int = 1) -> None:
    """Checks that the parts of all ranks together are `wanted`, by parameter and kind."""
    seen = dict.fromkeys(wanted, 0)
    for answer in answers:
        for name, (start, tensors) in answer.items():
            assert tensors.keys() == wanted[name].keys(), f"{name} of {what}"
            for kind, values in tensors.items():
                part = wanted[name][kind].flatten()[start : start + len(values)]
                assert values.dtype == part.dtype
                assert torch.equal(values, part), f"{kind} of {name} of {what} on {len(answers)} ranks"
            seen[name] += len(tensors[MASTER])
    assert seen == {name: copies * tensors[MASTER].numel() for name, tensors in wanted.items()}
