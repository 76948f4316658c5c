"""Replacements of the functions that ZeRO-3 runs for each linear layer, module and weight, without DeepSpeed's general
cases. Results are bitwise equal.

DeepSpeed (0.19) writes its autograd functions with `setup_context`, as torch.func needs, for which torch binds the
arguments to a Python signature in each call, and it runs each linear layer in autocast contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Linear(torch.autograd.Function):
    """`nn.functional.linear` that saves the parameter, not its values, which ZeRO-3 can thus free until backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        if bias is None:
            return x.matmul(weight.t())
        if x.dim() == 2:
            return torch.addmm(bias, x, weight.t())
        return x.matmul(weight.t()).add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        whole = not _is_freed(weight)
        if not whole:  # outside of blocks a module's hook may come later than the backward pass of its layers
            weight.all_gather()
        rows = gradient if gradient.dim() == 2 else gradient.reshape(-1, gradient.shape[-1])
        outer = list(range(gradient.dim() - 1))
        found = (
            gradient.matmul(weight) if for_x else None,
            rows.t().matmul(x if x.dim() == 2 else x.reshape(-1, x.shape[-1])) if for_weight else None,
            (gradient.sum(outer) if outer else gradient) if for_bias else None,
        )
        if not whole:
            weight.partition()
        return found


def _is_freed(weight: Tensor) -> bool:
    return getattr(getattr(weight, "ds_status", None), "name", None) == "NOT_AVAILABLE"


class _BeforeBackward(torch.autograd.Function):
    """Identity for an output of a module. Its backward pass first gathers the weights of the module."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, module: nn.Module, gather: Callable[[nn.Module], None]) -> Tensor:
        ctx.module, ctx.gather = module, gather
        # A module may run several times before the first backward pass.
        module.applied_pre_backward_ref_cnt = vars(module).get("applied_pre_backward_ref_cnt", 0) + 1
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.module.applied_pre_backward_ref_cnt > 0:
            ctx.gather(ctx.module)
            ctx.module.applied_pre_backward_ref_cnt -= 1
        return gradient, None, None


class _AfterBackward(torch.autograd.Function):
    """Identity for an input of a module. The backward pass of the last input frees the weights of the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, free: Callable[[nn.Module], None]) -> Tensor:
        ctx.module, ctx.free = module, free
        if x.requires_grad:
            module.ds_grads_remaining += 1
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.module.ds_grads_remaining -= 1
        if ctx.module.ds_grads_remaining == 0:
            ctx.free(ctx.module)
        return gradient, None, None


class Applied:
    """An autograd function with its other arguments, for DeepSpeed, which calls `module.pre_bwd_fn.apply(tensor)`."""

    def __init__(self, function: type[torch.autograd.Function], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def apply(self, x: Tensor) -> Tensor:
        return self._function.apply(x, *self._arguments)


def replace_functions(module: nn.Module, offload: Any) -> None:
    """Replaces the autograd functions that ZeRO-3's hooks apply to the inputs and outputs of a module.

    Args: module: with hooks of ZeRO-3; offload: DeepSpeed's `parameter_offload` of the optimizer."""
    module.pre_bwd_fn = Applied(_BeforeBackward, module, offload.pre_sub_module_backward_function)
    module.post_bwd_fn = Applied(_AfterBackward, module, offload.post_sub_module_backward_function)


class Freeing:
    """Frees the gathered values of a parameter. Called by DeepSpeed as `parameter.partition`."""

    def __init__(self, parameter: nn.Parameter, original: Callable[..., None], accelerator: Any) -> None:
        self._parameter, self._original = parameter, original
        self._record = None if accelerator.is_synchronized_device() else accelerator.current_stream

    def __call__(self, param_list: Any = None, hierarchy: int = 0, **options: Any) -> None:
        parameter = self._parameter
        plain = param_list is None and not options.get("has_been_updated") and options.get("free_data", True)
        if not plain or parameter.ds_active_sub_modules or parameter.ds_status.name != "AVAILABLE":
            self._original(param_list, hierarchy, **options)
            return
        if self._record is not None:
            parameter.data.record_stream(self._record())
        status = type(parameter.ds_status)
        parameter.data = parameter.data.new_empty(0)
        parameter.ds_status = status.NOT_AVAILABLE
