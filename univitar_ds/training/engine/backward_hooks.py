"""Saves and restores counters of ZeRO-3's backward hooks, so that several forward passes may precede their backward
passes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_COUNT = "ds_grads_remaining"
"""Attribute of a module under ZeRO-3: number of gradients of its inputs that are missing before its weights can be
freed. Each forward pass resets it to 0."""


@dataclass(frozen=True)
class HookCounts:
    """The counters after one forward pass; empty except under ZeRO-3.

    Before each backward pass that is not that of the latest forward pass, `restore` must be called. Otherwise the
    counters do not reach 0, and ZeRO-3 keeps all weights of the model in memory until that backward pass ends.
    """

    counts: tuple[tuple[nn.Module, int], ...]

    @classmethod
    def of(cls, model: nn.Module) -> HookCounts:
        """Returns the counters of all modules of `model`, right after a forward pass."""
        modules = model.modules()
        return cls(tuple((module, vars(module)[_COUNT]) for module in modules if _COUNT in vars(module)))

    def restore(self) -> None:
        """Sets the counters of the model. Called before the backward pass that belongs to them."""
        for module, count in self.counts:
            setattr(module, _COUNT, count)
