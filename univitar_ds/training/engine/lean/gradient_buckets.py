"""Reduces the gradients of ZeRO-3 over ranks with little work on the host for each parameter.

DeepSpeed (0.19) runs a dozen functions and eight operations of torch for each gradient: it copies the gradient to a
buffer, splits it, converts and adds this rank's share, and computes its norm. Here the gradients of a bucket are
concatenated once, and the shares of all of them are added, and their norms computed, together. Buckets hold the same
parameters and sums have the same order as in DeepSpeed, so results are bitwise equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

SHARES = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
"""Gradient of each parameter's share by the parameter's `ds_id`: views of one flat tensor."""
_REDUCE = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
"""Method that DeepSpeed calls at the end of a backward pass to reduce the gradients that are left in its buckets."""


def rows_by_rank(flat: Tensor, ranks: int) -> Tensor:
    """Returns a flat tensor as a row for each rank, padded at the end; a view where the ranks divide it."""
    missing = math.ceil(flat.numel() / ranks) * ranks - flat.numel()
    return (nn.functional.pad(flat, (0, missing)) if missing else flat).view(ranks, -1)


class GradientBuckets:
    """Replaces the hooks of DeepSpeed's ZeRO-3 optimizer on gradients, and its norm. Built after the optimizer."""

    @staticmethod
    def can_replace(optimizer: Any) -> bool:
        """Whether the optimizer sums gradients in the way that this class does."""
        others = ("offload_optimizer", "zenflow", "use_muon", "leaf_parameters", "all2all_process_group")
        return (
            not any(getattr(optimizer, name, None) for name in others)
            and optimizer.reduce_scatter
            and optimizer.sequence_parallel_size == 1
            and optimizer.model_parallel_group is None
            and not (optimizer.postscale_gradients and optimizer.gradient_predivide_factor != 1.0)
            and len({id(parameter.ds_process_group) for parameter in _trained(optimizer)}) == 1
        )

    def __init__(self, optimizer: Any, comm: ModuleType, accelerator: Any) -> None:
        """Args: comm, accelerator: DeepSpeed's."""
        self._optimizer, self._comm, self._accelerator = optimizer, comm, accelerator
        trained = _trained(optimizer)
        self._group = trained[0].ds_process_group
        self._ranks, self._rank = comm.get_world_size(self._group), comm.get_rank(self._group)
        shares = getattr(optimizer, SHARES)
        # Views without the padding, which stays zero. Kept on the optimizer, whose tensors `free_engine` empties.
        optimizer.own_gradients = {p.ds_id: self._own(shares[p.ds_id], p) for p in trained}
        self._bucket: list[nn.Parameter] = []
        self._elements = 0
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks = [parameter.register_post_accumulate_grad_hook(self._add) for parameter in trained]
        for bucket in optimizer.ipg_buckets.values():
            bucket.buffer = None  # gradients are not copied into it
        setattr(optimizer, _REDUCE, lambda dtype: self._reduce())
        optimizer.get_grad_norm_direct = self._norm

    def _own(self, share: Tensor, parameter: nn.Parameter) -> Tensor:
        length = min(share.numel(), parameter.ds_numel - self._rank * share.numel())
        return share.narrow(0, 0, max(0, length))

    def _add(self, parameter: nn.Parameter) -> None:
        """Called by torch when the gradient of a parameter is complete."""
        if self._bucket and self._elements + parameter.ds_numel > self._optimizer.reduce_bucket_size:
            self._reduce()
        self._bucket.append(parameter)
        self._elements += parameter.ds_numel

    @torch.no_grad()
    def _reduce(self) -> None:
        """Adds this rank's shares of the bucket's gradients, averaged over the ranks, and frees the gradients."""
        if not self._bucket:
            return
        parameters = sorted(self._bucket, key=lambda parameter: parameter.ds_id)  # the same order on all ranks
        self._bucket, self._elements = [], 0
        rows = [rows_by_rank(parameter.grad.reshape(-1), self._ranks) for parameter in parameters]
        sizes = [row.shape[1] for row in rows]
        joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        del rows
        for parameter in parameters:
            parameter.grad = None
        self._limit_memory()
        stream = self._optimizer.reduce_and_partition_stream
        if not self._accelerator.resolves_data_dependency():
            stream.wait_stream(self._accelerator.current_stream())
        with self._accelerator.stream(stream):
            summed = self._scatter(joined.to(self._optimizer.communication_data_type))
            self._add_shares(parameters, summed, sizes)
            if not self._accelerator.is_synchronized_device():
                joined.record_stream(stream)
            if not self._accelerator.handles_memory_backpressure():
                event = self._accelerator.Event()
                event.record()
                self._optimizer.param_reduce_events.append(event)

    def _limit_memory(self) -> None:
        """Waits for the oldest bucket if too many are in flight, as DeepSpeed does: the host must not run far ahead."""
        events = self._optimizer.param_reduce_events
        while events and events[0].query():
            events.popleft()
        if len(events) > self._optimizer.max_param_reduce_events:
            events.popleft().synchronize()

    def _scatter(self, rows: Tensor) -> Tensor:
        """Returns this rank's row of the mean over ranks. Writes into `rows` (ranks, n)."""
        rows.div_(self._ranks)
        own = rows[self._rank]
        self._comm.reduce_scatter_fn(own, rows.view(-1), group=self._group, async_op=False)
        return own

    def _add_shares(self, parameters: Sequence[nn.Parameter], summed: Tensor, sizes: Sequence[int]) -> None:
        shares = [self._optimizer.own_gradients[parameter.ds_id] for parameter in parameters]
        parts = [
            part if len(part) == len(share) else part[: len(share)]
            for part, share in zip(summed.to(shares[0].dtype).split(sizes), shares, strict=True)
        ]
        if self._optimizer.micro_step_id == 0:  # of the first pack of a step
            torch._foreach_copy_(shares, parts)
        else:
            torch._foreach_add_(shares, parts)

    def _norm(self, gradients: Sequence[Tensor], params: Sequence[nn.Parameter], norm_type: float = 2.0) -> Tensor:
        """Returns the norm of gradients over all ranks; -1 if it is not finite, which DeepSpeed checks."""
        dtype = torch.float64 if self._accelerator.is_fp64_supported() else torch.float32
        norms = torch.stack(torch._foreach_norm(list(gradients), norm_type, dtype=dtype))
        total = norms.pow(norm_type).sum()
        self._comm.all_reduce(total, op=self._comm.ReduceOp.SUM, group=self._group)
        total = total ** (1.0 / norm_type)
        return torch.where(total.isfinite(), total, torch.full((), -1.0, device=total.device))


def _trained(optimizer: Any) -> list[nn.Parameter]:
    return [parameter for group in optimizer.fp16_groups for parameter in group if parameter.requires_grad]
