"""Optimizers of plugins. They update each element of a tensor on its own, so that they work on any shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from univitar_ds.errors import PluginError
from univitar_ds.plugins import Moment, Optimizer, Plugin, calling


class ElementwiseOptimizer(torch.optim.Optimizer):
    """Calls the optimizer of a plugin for each flat tensor."""

    def __init__(self, groups: list[dict[str, Any]], name: str, plugin: Plugin, rule: Optimizer) -> None:
        """Args: groups: see `optim.parameter_groups`; name: of the optimizer, for messages; plugin: that registers it;
        rule: the optimizer."""
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self._name, self._plugin, self._rule = name, plugin, rule

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates all parameters that have a gradient. Raises: PluginError if the plugin raises."""
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self._update(master, group)

    def _update(self, master: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[master]
        state["step"] += 1
        with calling(self._plugin, f"step of the optimizer {self._name}"):
            self._rule.step(
                master.data,
                master.grad,
                {name: state[name] for name in self._rule.moments},
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                step=int(state["step"]),
            )


def new_moment(moment: Moment, like: Tensor) -> Tensor:
    """Returns the initial value of a moment, with the shape of the weights `like`."""
    return torch.full_like(like, moment.initial, dtype=getattr(torch, moment.dtype))


def check_elementwise(rule: Optimizer) -> None:
    """Checks that an optimizer gives the same results on a whole tensor and on three parts of it, in two updates of
    random weights.

    Raises: PluginError if the results differ, weights are not finite, or `step` replaces a moment.
    """
    whole, parts = _after_two_updates(rule, [60]), _after_two_updates(rule, [1, 22, 37])
    if not whole["weights"].isfinite().all():
        raise PluginError("two updates of 60 random weights with gradients near 1 are not finite")
    for name, values in whole.items():
        if not torch.equal(values, parts[name]):
            raise PluginError(
                f"{name} of 60 elements differ if they are updated in three parts; each element must be updated on its "
                "own, without a norm or a mean, since ranks have different parts"
            )


@torch.no_grad()
def _after_two_updates(rule: Optimizer, sizes: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, sum(sizes), generator=generator)
    results = []
    for weights, *gradients in zip(*(values.split(sizes) for values in drawn), strict=True):
        weights = weights.clone()
        moments = {name: new_moment(moment, weights) for name, moment in rule.moments.items()}
        given = dict(moments)
        for step, gradient in enumerate(gradients, 1):
            rule.step(weights, gradient.clone(), moments, lr=1e-3, weight_decay=0.1, step=step)
        if moments.keys() != given.keys() or any(moments[name] is not tensor for name, tensor in given.items()):
            raise PluginError("step replaces a moment in the dict; write into the tensor, as moment.mul_(0.9)")
        results.append({"weights": weights, **{f"moment {name}": value for name, value in moments.items()}})
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}
