"""Gathers and frees the weights of ZeRO-3 by a plan, once DeepSpeed has traced the order of the modules.

DeepSpeed (0.19) determines in every step, for each weight of each module, what to gather, to wait for and to free. Here
the weights of each module, and those that are freed after it, are looked up in a plan. Which weights are gathered
together, and when they are freed, is the same as in DeepSpeed. DeepSpeed's own functions run until its trace of a
forward and a backward pass is complete, and after a module has run out of order.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

_PRIVATE = "_PartitionedParameterCoordinator__"
_STEP = f"{_PRIVATE}step_id"
"""Number of modules that have been fetched in this forward and backward pass."""
_ORDER, _PARAMETERS = f"{_PRIVATE}submodule_order", f"{_PRIVATE}param_order"
_QUEUE = f"{_PRIVATE}param_queue"
"""A new object for each forward and backward pass."""
_IN_FLIGHT, _STREAM = f"{_PRIVATE}inflight_param_registry", f"{_PRIVATE}allgather_stream"
_WHOLE, _MOST_WHOLE = f"{_PRIVATE}n_available_params", f"{_PRIVATE}max_n_available_params"
_PREFETCHED, _DISTANCE = f"{_PRIVATE}prefetch_bucket_sz", f"{_PRIVATE}max_reuse_dist_in_numel"
_BACKWARD = f"{_PRIVATE}active_backward_submodules"
_EVENTS, _MOST_EVENTS = f"{_PRIVATE}ongoing_fetch_events", f"{_PRIVATE}max_ongoing_fetch_events"


class _Plan:
    """The weights that a module uses and those that are freed after it, by the module's position in the trace."""

    def __init__(self, modules: Sequence[nn.Module], order: Sequence[Any], distance: int) -> None:
        """Args: modules: in the order of the trace; order: DeepSpeed's entries of weights, in the order in which they
        are prefetched; distance: a weight stays gathered if fewer elements than this are used before its next use."""
        self._modules, self._distance = modules, distance
        self.order = [entry.param for entry in order]
        self._places = [entry.step_id_last_used_at for entry in order]
        self.ends = [bisect.bisect_right(self._places, place) for place in range(len(modules))]
        """By position: number of entries of `order` that are used up to it."""
        own = {module: list({id(p): p for p in _weights(module)}.values()) for module in dict.fromkeys(modules)}
        self.weights = {module: sorted(weights, key=lambda weight: weight.ds_id) for module, weights in own.items()}
        self.counts = {module: _count(module) for module in own}
        self._freed: dict[tuple[nn.Module, int], list[nn.Parameter]] = {}

    def freed(self, module: nn.Module, place: int, cursor: int) -> list[nn.Parameter]:
        """Returns the weights of `module` that are freed after it: those that are not used again soon.

        Args: place: position in the trace; cursor: number of entries of `order` that have been gathered or skipped."""
        key = module, place
        if key not in self._freed:
            passed = {id(p) for p, used in zip(self.order[:cursor], self._places, strict=False) if used > place}
            soon = passed | self._used_soon(place)
            self._freed[key] = [p for p in self.weights[module] if not p.ds_persist and id(p) not in soon]
        return self._freed[key]

    def _used_soon(self, place: int) -> set[int]:
        used, elements = set(), 0
        for module in self._modules[place:]:
            if elements >= self._distance:
                break
            used.update(id(weight) for weight in self.weights[module])
            elements += sum(weight.ds_numel for weight in _weights(module))
        return used


class _Message:
    """Weights that one collective gathers."""

    def __init__(self, handle: Any, weights: Sequence[nn.Parameter]) -> None:
        self.handle, self.weights = handle, weights

    def wait(self, handle_dependency: bool = True) -> None:
        self.handle.wait(handle_dependency=handle_dependency)


class Fetching:
    """Replaces the methods of DeepSpeed's `param_coordinator` that gather and free the weights of a module."""

    @staticmethod
    def can_replace(model: nn.Module, coordinator: Any) -> bool:
        """Whether this class can replace the methods of the coordinator: modules are not gathered as leaves."""
        leaves = any(getattr(module, "_z3_leaf", False) for module in model.modules())
        return not leaves and not coordinator.fast_sharding_for_leaf_module

    def __init__(self, model: nn.Module, offload: Any, accelerator: Any, statuses: Any) -> None:
        """Args: offload, accelerator: DeepSpeed's `parameter_offload` and accelerator; statuses: `ZeroParamStatus`."""
        self._coordinator, self._accelerator, self._statuses = offload.param_coordinator, accelerator, statuses
        self._state = vars(self._coordinator)
        self._weights = list(model.parameters())
        self._plan: _Plan | None = None
        self._plan_of: Any = None
        self._queue: Any = None
        self._cursor = 0
        self._own_fetch, self._own_release = self._coordinator.fetch_sub_module, self._coordinator.release_sub_module
        self._own_free = offload.partition_all_parameters
        self._coordinator.fetch_sub_module, self._coordinator.release_sub_module = self.fetch, self.release
        offload.partition_all_parameters = self.free_all

    def _planned(self, module: nn.Module) -> _Plan | None:
        """Returns the plan; None where DeepSpeed's functions must run."""
        if not self._coordinator.is_complete_trace():
            return None
        order = self._state[_PARAMETERS]
        if self._plan is None or self._plan_of is not order:
            self._plan, self._plan_of = _Plan(self._state[_ORDER], order, self._state[_DISTANCE]), order
        if self._queue is not self._state[_QUEUE]:
            self._queue, self._cursor = self._state[_QUEUE], 0
        if self._plan.counts.get(module) != _count(module):  # external weights were registered after the trace
            self._coordinator._invalidate_trace()
            return None
        return self._plan

    @torch.no_grad()
    def fetch(self, module: nn.Module, forward: bool) -> None:
        """Gathers the weights of a module, and prefetches weights of the next modules."""
        plan = self._planned(module)
        if plan is None:
            self._own_fetch(module, forward)
            return
        weights, statuses = plan.weights[module], self._statuses
        if not forward:
            self._state[_BACKWARD][module.ds_id] = module
        if missing := [weight for weight in weights if weight.ds_status is statuses.NOT_AVAILABLE]:
            self._gather(missing)
        for weight in weights:
            weight.ds_active_sub_modules.add(module.ds_id)
            if weight.ds_status is statuses.INFLIGHT:
                self._wait(weight)
        self._note_recomputed(weights, forward)
        if not self._accelerator.resolves_data_dependency():
            self._accelerator.current_stream().wait_stream(self._state[_STREAM])
        self._cursor = max(self._cursor, plan.ends[self._state[_STEP]])
        self._gather_ahead(plan)
        self._state[_STEP] += 1

    def _gather(self, weights: list[nn.Parameter]) -> None:
        with self._accelerator.stream(self._state[_STREAM]):
            message = _Message(weights[0].all_gather_coalesced(weights), weights)
        self._state[_WHOLE] += sum(weight.ds_numel for weight in weights)
        self._state[_IN_FLIGHT].data.update(dict.fromkeys(weights, message))

    def _wait(self, weight: nn.Parameter) -> None:
        in_flight, events = self._state[_IN_FLIGHT].data, self._state[_EVENTS]
        message = in_flight[weight]
        with self._accelerator.stream(self._state[_STREAM]):
            while events and events[0].query():
                events.popleft()
            if len(events) > self._state[_MOST_EVENTS]:
                events.popleft().synchronize()  # the host must not run further ahead than memory allows
            message.wait()
            if not self._accelerator.handles_memory_backpressure():
                event = self._accelerator.Event()
                event.record()
                events.append(event)
        for other in message.weights:
            in_flight.pop(other, None)

    def _note_recomputed(self, weights: Iterable[nn.Parameter], forward: bool) -> None:
        """Notes frozen weights that a recomputed forward pass has gathered: the module whose backward pass runs frees
        them."""
        running = self._state[_BACKWARD]
        if not forward or not running or torch._C._current_graph_task_id() == -1:
            return
        owner = next(reversed(running.values()))
        for weight in weights:
            if not weight.requires_grad:
                owner.ds_recompute_parameters.add(weight)
                weight.ds_active_sub_modules.add(owner.ds_id)

    def _gather_ahead(self, plan: _Plan) -> None:
        limit = min(self._state[_MOST_WHOLE] - self._state[_WHOLE], self._state[_PREFETCHED])
        chosen: dict[int, nn.Parameter] = {}
        elements = 0
        while self._cursor < len(plan.order) and elements < limit:
            weight = plan.order[self._cursor]
            self._cursor += 1
            if weight.ds_status is self._statuses.NOT_AVAILABLE and weight.ds_id not in chosen:
                chosen[weight.ds_id] = weight
                elements += weight.ds_numel
        if chosen:
            self._gather(list(chosen.values()))

    @torch.no_grad()
    def release(self, module: nn.Module, forward: bool = False) -> None:
        """Frees the weights of a module that has run, except those that are used again soon."""
        plan = self._planned(module)
        if plan is None:
            self._own_release(module, forward)
            return
        weights, freed = plan.weights[module], plan.freed(module, self._state[_STEP], self._cursor)
        if not forward:
            self._state[_BACKWARD].pop(module.ds_id, None)
            if recomputed := module.ds_recompute_parameters:
                weights = [*weights, *recomputed]
                freed = [*freed, *(weight for weight in recomputed if not weight.ds_persist)]
                recomputed.clear()
        for weight in weights:
            weight.ds_active_sub_modules.discard(module.ds_id)
        for weight in freed:
            if not weight.is_external_param:
                self._free(weight)

    def _free(self, weight: nn.Parameter) -> None:
        if weight.ds_status is self._statuses.AVAILABLE and not weight.ds_active_sub_modules:
            weight.partition()
            self._state[_WHOLE] -= weight.ds_numel

    @torch.no_grad()
    def free_all(self) -> None:
        """Frees all weights, before the update changes them."""
        if self._state[_IN_FLIGHT]:
            self._own_free()
            return
        for weight in self._weights:
            weight.ds_active_sub_modules.clear()
            self._free(weight)


def _weights(module: nn.Module) -> list[nn.Parameter]:
    return [
        weight for weight in (*module._parameters.values(), *module._external_params.values()) if weight is not None
    ]


def _count(module: nn.Module) -> int:
    return len(module._parameters) + len(module._external_params)
