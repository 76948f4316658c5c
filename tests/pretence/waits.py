"""Every place where a training step waits for the device, with the reason. A new one fails `test_step.py`."""

from __future__ import annotations

from typing import NamedTuple

CONTROL = "univitar_ds/training/distributed/process_group.py"
STEP = "univitar_ds/training/step/train_step.py"
ENGINE = "univitar_ds/training/engine/engine.py"
RING = "univitar_ds/objectives/ring.py"
ZERO = "deepspeed/runtime/zero"


class Wait(NamedTuple):
    """`most`: times in a step, or for each of `per`: a pack of the rank, or a parameter of the model."""

    most: int
    reason: str
    per: str = "step"


STEP_WAITS = {
    f"copy from pageable memory {STEP}:_inputs": Wait(
        3, "the pixels, token ids and lengths of a pack lie in shared memory that is not pinned", per="pack"
    ),
    f"read {RING}:total": Wait(1, "the backward pass runs only if the loss is finite"),
    f"copy to the device {RING}:__init__": Wait(1, "ranks exchange their numbers of items before the loss"),
    f"copy to the host {RING}:__init__": Wait(1, "the numbers of items of all ranks are sizes of messages"),
    f"read {STEP}:train_step": Wait(2, "the logs show the scale and bias of the logits"),
    f"read {ENGINE}:grad_norm": Wait(1, "the guard compares the norm of the gradient, and the logs show it"),
    f"copy to the host {ENGINE}:_squares_by_part": Wait(1, "the logs show the norms of the parts, at logged steps"),
    f"read {ENGINE}:_update_average": Wait(2, "the average of the weights asks each of two groups for its updates"),
    f"copy to the device {CONTROL}:gather_numbers": Wait(1, "the numbers of a step are added up over ranks"),
    f"copy to the host {CONTROL}:gather_numbers": Wait(1, "the numbers of a step are added up over ranks"),
    "read deepspeed/runtime/utils.py:is_invalid_grad_norm": Wait(1, "DeepSpeed skips an update that is not finite"),
    "read deepspeed/runtime/utils.py:clip_tensors_by_global_norm": Wait(1, "DeepSpeed clips so with bf16 and ZeRO 1"),
    "copy to the device deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace": Wait(
        2, "DeepSpeed builds the value that replaces a norm that is not finite"
    ),
    f"read {ZERO}/stage_1_and_2.py:has_overflow": Wait(1, "DeepSpeed looks for gradients that are not finite"),
    f"copy to the device {ZERO}/stage3.py:get_grad_norm_direct": Wait(2, "DeepSpeed builds the norm of each group"),
    f"Stream.synchronize {ZERO}/stage3.py:independent_gradient_partition_epilogue": Wait(
        1, "DeepSpeed ends the reduction of gradients of a pack", per="pack"
    ),
    f"Stream.synchronize {ZERO}/stage3.py:_get_fp32_grad_state_partition": Wait(
        1, "DeepSpeed ends the reduction before a part's norm is read, at logged steps; only the first call waits",
        per="parameter",
    ),
    "torch.cuda.synchronize deepspeed/accelerator/cuda_accelerator.py:synchronize": Wait(
        1, "DeepSpeed ends the communication that overlaps the backward pass of a pack", per="pack"
    ),
}  # fmt: skip
"""By place as in `gpu.Record.waits`: what waits, the file and the function."""
