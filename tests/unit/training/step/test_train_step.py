"""The order of a step, on an engine that only records its calls."""

import gc
import weakref

import pytest
import torch

from tests.support.standin import StandIn, pack
from univitar_ds.config.model import ObjectiveConfig
from univitar_ds.objectives.exchange import Exchange
from univitar_ds.training.distributed.groups import Groups
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.step import train_step


class Written:
    """An engine of one rank without an optimizer."""

    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    groups = Groups.alone(world)
    updated, grad_norm = True, 1.0

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.module = calls, StandIn()

    def zero_grad(self, lr: float, *, read_gradient: bool) -> None:
        self.calls.append("begin")

    def __call__(self, *inputs):
        self.calls.append("embed")
        return self.module(*inputs)

    def backward(self, surrogate: torch.Tensor) -> None:
        surrogate.backward()
        self.calls.append("backward")

    def step(self, report: torch.Tensor | None = None) -> None:
        self.calls.append("step")
        self.reported = [] if report is None else report.tolist()


@pytest.mark.parametrize("kind", train_step.LOSSES)
def test_ranks_exchange_their_numbers_of_items_before_they_embed_and_only_then(monkeypatch, kind):
    calls: list[str] = []
    exchange = Exchange.__init__
    monkeypatch.setattr(
        Exchange, "__init__", lambda *args, **named: calls.append("exchange") or exchange(*args, **named)
    )
    packs = [pack(0, 0), pack(0, 1)]
    result = train_step.train_step(
        Written(calls), packs, train_step.StepSettings(0.1), ObjectiveConfig(kind=kind, chunk=5)
    )
    again = ["embed", "backward", "step"]
    assert calls == ["begin", "exchange", "embed", "embed", "backward", "step", *again]
    assert result.items == sum(len(pack.caption_ids) for pack in packs) > 0


class Counting(Written):
    """Also counts the graphs that are in memory while a pack is embedded with gradient."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__(calls)
        self.graphs, self.most = weakref.WeakSet(), 0

    def __call__(self, *inputs):
        pixels = inputs[0].float().requires_grad_(torch.is_grad_enabled())
        outputs = super().__call__(pixels, *inputs[1:])
        if torch.is_grad_enabled():
            self.graphs.add(pixels)  # the graph holds it
            gc.collect()
            self.most = max(self.most, len(self.graphs))
        return outputs


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_kept_packs_run_once_and_the_gradient_keeps_its_bits(keep):
    """Also the order of the packs in its sums, and no more graphs are in memory at a time than were asked for."""
    packs = [pack(0, lane) for lane in range(3)]

    def gradient(keep: int):
        engine = Counting([])
        settings = train_step.StepSettings(0.1, keep=keep)
        result = train_step.train_step(engine, packs, settings, ObjectiveConfig(chunk=5))
        return engine, result, {name: p.grad for name, p in engine.module.named_parameters()}

    _, wanted, gradients = gradient(0)
    engine, result, mine = gradient(keep)
    assert engine.calls.count("embed") == 6 - min(keep, 3)
    assert engine.calls.count("backward") == engine.calls.count("step") == 3
    assert engine.most == min(max(keep, 1), 3)
    assert result == wanted
    assert all(grad is None or torch.equal(mine[name], grad) for name, grad in gradients.items())


def test_the_first_pack_is_embedded_at_its_stated_place():
    """The images in the logs show it."""
    packs = [pack(0, lane) for lane in range(3)]
    for keep in (0, 1, 3):
        seen = []
        engine = Written([])
        engine.module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[2]))
        train_step.train_step(engine, packs, train_step.StepSettings(0.1, keep=keep), ObjectiveConfig(chunk=5))
        assert seen[train_step.encoded_before_first(3)] is packs[0].grid_thw
