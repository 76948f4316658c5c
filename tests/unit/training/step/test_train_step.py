"""The order of a step, on an engine that only writes down what it is asked."""

import pytest
import torch

from tests.support.standin import StandIn, pack
from univitar_ds.config.model import ObjectiveConfig
from univitar_ds.objectives.exchange import Exchange
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.step import train_step


class Written:
    """An engine of one rank without an optimizer."""

    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
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

    def step(self) -> None:
        self.calls.append("step")


@pytest.mark.parametrize("kind", train_step.LOSSES)
def test_ranks_exchange_their_numbers_of_items_before_they_embed_and_only_then(monkeypatch, kind):
    calls: list[str] = []
    exchange = Exchange.__init__
    monkeypatch.setattr(Exchange, "__init__", lambda *args: calls.append("exchange") or exchange(*args))
    packs = [pack(0, 0), pack(0, 1)]
    result = train_step.train_step(
        Written(calls), packs, train_step.StepSettings(0.1), ObjectiveConfig(kind=kind, chunk=5)
    )
    assert calls == ["begin", "exchange", "embed", "embed", *["embed", "backward", "step"] * 2]
    assert result.items == sum(len(pack.caption_ids) for pack in packs) > 0
