"""Activation checkpointing of a block, whole or selective.

A whole block keeps its input only, and runs forward again in the backward pass. A selective one also keeps the results
of matrix products and attention: in the backward pass the block runs forward again, takes these results from memory
where it would compute them, and so computes norms, rotary positions and gates only.

torch's `create_selective_checkpoint_contexts` cannot be used: it counts every operation, and ZeRO-3 gathers weights in
the second pass with other operations than in the first. Here only the operations that are kept are counted.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::mkldnn_linear"}
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
}
"""Operations of the attention back ends. flash-attn 4 registers no operation, so its result is recomputed."""
KEPT = frozenset(PRODUCTS | ATTENTION)
"""Operations whose results a selective block keeps."""

Results = dict[Any, deque[Any]]
"""Results of each kept operation, in the order of its calls."""


def run_checkpointed(block: nn.Module, *inputs: Any, selective: bool) -> Tensor:
    """Runs a block without keeping its activations, and again in the backward pass.

    The block must not draw random numbers: the random state is not saved and restored.
    """
    options = {"context_fn": _contexts} if selective else {}
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Returns the contexts of the first and of the second forward pass of a block."""
    results: Results = defaultdict(deque)
    return _Keep(results), _Take(results)


class _Mode(TorchDispatchMode):
    """Base class of the modes that handle every operation of a block."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self.results = results

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Returns True: compiled operations stay compiled, and contain no operation whose result is kept."""
        return True


class _Keep(_Mode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **kwargs or {})
        if operation.name().partition(".")[0] in KEPT:
            # Detached: the second pass builds the graph.
            self.results[operation].append(torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, result))
        return result


class _Take(_Mode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.name().partition(".")[0] not in KEPT:
            return operation(*args, **kwargs or {})
        if not self.results[operation]:
            raise RuntimeError(
                f"the second forward pass of a block calls {operation} more often than the first did; a block with "
                "checkpoint_every: selective must do the same in both. Set checkpoint_every: 1"
            )
        return self.results[operation].popleft()  # frees it when the backward pass has used it
