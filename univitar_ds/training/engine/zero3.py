"""Reduces the host time of ZeRO-3, and makes it independent of the number of ranks.

DeepSpeed (0.19) slices every parameter and every gradient for every rank in Python, and runs four hooks around every
module. Here a block is gathered and released as a whole, and its inner modules have no hooks of DeepSpeed. Parameters
and gradients are split for all ranks at once, as matrices with a row for each rank, and the package `lean` reduces the
work for each parameter. Partitions and checkpoints stay those of DeepSpeed. Results are equal up to rounding: with
fewer hooks the sums of a backward pass can have another order. `benchmarks/bench_host.py` measures the host time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from univitar_ds.training.engine.lean.gradient_buckets import GradientBuckets, rows_by_rank
from univitar_ds.training.engine.lean.hooks import Freeing, Linear, replace_functions
from univitar_ds.training.engine.lean.weight_fetching import Fetching

OTHER_WAYS = (
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "use_all_reduce_for_fetch_params",
    "zenflow",
    "allgather_sequential",
)
"""Settings of ZeRO-3 with which DeepSpeed gathers in another way. With any of them nothing is replaced."""


class Blocks:
    """The blocks of a model, which ZeRO-3 gathers as a whole: the modules in its outermost `nn.ModuleList`s."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks = list(blocks_of(model))
        self._hooks = [(hooks, set(hooks)) for block in self._blocks for hooks in _hooks_inside(block)]
        """Hooks of each module inside of a block, and the keys of those that are not DeepSpeed's."""

    def parameters(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """Yields (block, parameter) for each parameter of each block, to be registered as external parameters."""
        return ((block, parameter) for block in self._blocks for parameter in block.parameters())

    def remove_inner_hooks(self) -> None:
        """Removes the hooks that the modules inside of blocks have received since this object was created."""
        for hooks, others in self._hooks:
            for key in hooks.keys() - others:
                del hooks[key]


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules in the outermost `nn.ModuleList`s of a model."""
    for child in module.children():
        if isinstance(module, nn.ModuleList):
            yield child
        else:
            yield from blocks_of(child)


def _hooks_inside(block: nn.Module) -> Iterator[dict[int, Any]]:
    for module in block.modules():
        if module is not block:
            yield module._forward_pre_hooks
            yield module._forward_hooks


def cut_for_all_ranks(engine: Any) -> None:
    """Replaces DeepSpeed's gathering of parameters and reduction of gradients in a ZeRO-3 engine.

    Does nothing with settings under which DeepSpeed gathers in another way: offloaded parameters, hpZ, OTHER_WAYS.
    """
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import linear, stage3
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import nvtx

    zero = engine._config.zero_config
    offloaded = zero.offload_param is not None and str(zero.offload_param.device.value) != "none"
    if offloaded or zero.zero_hpz_partition_size > 1 or any(getattr(zero, name, None) for name in OTHER_WAYS):
        return
    model, optimizer, accelerator = engine.module, engine.optimizer, get_accelerator()
    offload = optimizer.parameter_offload
    nvtx.enable_nvtx = False  # ranges of DeepSpeed's functions for Nsight, at two microseconds for each weight
    stage3.reduce_scatter_coalesced = reduce_scatter
    linear.LinearFunctionForZeroStage3 = Linear
    for module in model.modules():
        replace_functions(module, offload)
    for parameter in model.parameters():
        parameter.all_gather_coalesced = _Gathering(parameter.all_gather_coalesced)
        parameter.partition = Freeing(parameter, parameter.partition, accelerator)
    if Fetching.can_replace(model, offload.param_coordinator):
        Fetching(model, offload, accelerator, ZeroParamStatus)
    if GradientBuckets.can_replace(optimizer):
        GradientBuckets(optimizer, comm, accelerator)


class _Gathering:
    """Gathers several parameters in one collective. Called by DeepSpeed as `parameter.all_gather_coalesced`."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __call__(self, params: Iterable[nn.Parameter], safe_mode: bool = False, quantize: bool = False) -> Any:
        from deepspeed import comm
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, _dist_allgather_fn, get_allgather_dtype

        params = sorted(params, key=lambda parameter: parameter.ds_id)  # the same order on all ranks
        shares = [parameter.ds_tensor for parameter in params]
        dtypes = {get_allgather_dtype(parameter, parameter.ds_tensor) for parameter in params}
        if len(params) < 2 or safe_mode or quantize or dtypes != {shares[0].dtype}:
            return self._original(params, safe_mode=safe_mode, quantize=quantize)
        group = params[0].ds_process_group
        ranks, rank = comm.get_world_size(group), comm.get_rank(group)
        if ranks == 1 or any(parameter.ds_process_group is not group for parameter in params):
            return self._original(params)
        for parameter in params:
            if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(f"a parameter is gathered twice: {parameter.ds_summary()}")
            parameter.ds_status = ZeroParamStatus.INFLIGHT
        gathered = shares[0].new_empty(ranks, sum(share.numel() for share in shares))
        own = gathered[rank]
        torch.cat(shares, out=own)
        return _Gathered(_dist_allgather_fn(own, gathered.view(-1), group), params, gathered)


class _Gathered:
    """Parameters that a collective is gathering. DeepSpeed calls `wait` once for each; the first call sets them all."""

    def __init__(self, work: Any, params: Sequence[nn.Parameter], gathered: Tensor) -> None:
        self._work, self._params, self._gathered = work, params, gathered

    def wait(self, handle_dependency: bool = True) -> None:
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if self._gathered is None:
            return
        self._work.wait()
        sizes = [parameter.ds_tensor.numel() for parameter in self._params]
        for parameter, part in zip(self._params, self._gathered.split(sizes, dim=1), strict=True):
            # Not `reshape`: of shares with one element each it would return a column of `gathered`, with its stride.
            parameter.data = part.contiguous().view(-1)[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        if not get_accelerator().is_synchronized_device():
            self._gathered.record_stream(get_accelerator().current_stream())
        self._gathered = None


def reduce_scatter(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """Averages tensors over the ranks of `group` and returns this rank's share of each, flat and without padding.

    A share has ceil(numel / ranks) elements, the last shares may have fewer. May write into the tensors, as DeepSpeed's
    `reduce_scatter_coalesced` does, which it replaces.
    """
    from deepspeed import comm

    ranks, rank = comm.get_world_size(group), comm.get_rank(group)
    rows = [rows_by_rank(tensor.view(-1), ranks) for tensor in tensors]
    buffer = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
    buffer.div_(ranks)
    own = buffer[rank]
    comm.reduce_scatter_fn(own, buffer.view(-1), group=group, async_op=False)
    shares = own.split([row.shape[1] for row in rows])
    return [
        share[: max(0, min(share.numel(), tensor.numel() - rank * share.numel()))]
        for share, tensor in zip(shares, tensors, strict=True)
    ]
