"""Matrix products of the towers' blocks in 8-bit floating point, with torchao.

Inputs, weights and gradients of a product are rounded to 8 bits with a scale for each tensor, from its largest absolute
value. The parameters keep their names, shapes and types in ZeRO, the optimizer and checkpoints. On a CPU the rounding
is emulated, which is slower than training without fp8.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch
from torch import nn

from univitar_ds.errors import ConfigError
from univitar_ds.extras import extra
from univitar_ds.training.distributed.process_group import uses_cuda
from univitar_ds.training.engine.zero3 import blocks_of

CAPABILITY = (8, 9)
"""Minimum CUDA compute capability for 8-bit products: L40S, H100 and newer."""
MULTIPLE = 16
"""Both sizes of a layer's weight must be multiples of this, a requirement of torch._scaled_mm."""


def check_fp8() -> None:
    """Checks that torchao is installed and that the GPU, if there is one, supports 8-bit products.

    Raises: InstallationError without torchao; ConfigError if the GPU does not support them."""
    with extra("fp8"):
        if find_spec("torchao") is None:  # an import would take seconds
            raise ModuleNotFoundError(name="torchao")
    if uses_cuda() and (found := torch.cuda.get_device_capability()) < CAPABILITY:
        raise ConfigError(
            f"model.fp8 is true and {torch.cuda.get_device_name()} has compute capability {'.'.join(map(str, found))}; "
            f"8-bit products need {'.'.join(map(str, CAPABILITY))} (L40S, H100) or newer; set model.fp8=false"
        )


def use_fp8(model: nn.Module) -> None:
    """Replaces linear layers in all blocks of a model, if both sizes of a layer are multiples of MULTIPLE. Must be
    called before DeepSpeed wraps the model.

    Raises: as `check_fp8`; ConfigError if no layer has sizes that are multiples of MULTIPLE.
    """
    check_fp8()
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns about optional libraries that are not used here
    with extra("fp8"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    # Padding: the gradient of a weight sums over the tokens of a pack, whose number need not be a multiple of 16.
    settings = Float8LinearConfig(emulate=not uses_cuda(), pad_inner_dim=True)
    fitting = 0
    for block in blocks_of(model):
        fitting += sum(_fits(module) for module in block.modules())
        convert_to_float8_training(block, config=settings, module_filter_fn=lambda module, name: _fits(module))
    if not fitting:
        raise ConfigError(
            f"model.fp8 is true and no linear layer of a block has sizes that are multiples of {MULTIPLE}; set "
            "model.fp8=false"
        )


def _fits(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    return not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
