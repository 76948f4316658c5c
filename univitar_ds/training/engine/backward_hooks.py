"""Counters of ZeRO-3's backward hooks, for several forward passes whose backward passes are still to come."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_COUNT = "ds_grads_remaining"
"""How many gradients of a module's inputs are missing until its weights can be released. ZeRO-3 keeps one number for
each module, which each forward pass starts at 0."""


@dataclass(frozen=True)
class HookCounts:
    """The counters as they are after one forward pass; empty except under ZeRO-3.

    Without `restore` before the backward pass of any but the last forward pass, the counters do not reach 0, and
    ZeRO-3 keeps all weights of the model in memory until that backward pass ends.
    """

    counts: tuple[tuple[nn.Module, int], ...]

    @classmethod
    def of(cls, model: nn.Module) -> HookCounts:
        """Returns the counters of all modules of `model`, right after a forward pass."""
        modules = model.modules()
        return cls(tuple((module, vars(module)[_COUNT]) for module in modules if _COUNT in vars(module)))

    def restore(self) -> None:
        """Sets the counters. Called before the backward pass that belongs to them."""
        for module, count in self.counts:
            setattr(module, _COUNT, count)
