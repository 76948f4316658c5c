"""Every place where a training step waits for the device, with the reason. A new one fails `test_step.py`."""

CONTROL = "univitar_ds/training/distributed/process_group.py"
STEP = "univitar_ds/training/step/train_step.py"
ENGINE = "univitar_ds/training/engine/engine.py"
RING = "univitar_ds/objectives/ring.py"
ZERO = "deepspeed/runtime/zero"

STEP_WAITS = {
    f"copy from pageable memory {STEP}:_inputs": (
        3, "the pixels, token ids and lengths of a pack lie in shared memory that is not pinned"
    ),
    f"read {RING}:total": (1, "the backward pass runs only if the loss is finite"),
    f"copy to the device {RING}:__init__": (1, "ranks exchange their numbers of items before the loss"),
    f"copy to the host {RING}:__init__": (1, "the numbers of items of all ranks are sizes of messages"),
    f"read {STEP}:train_step": (2, "the logs show the scale and bias of the logits"),
    f"read {ENGINE}:grad_norm": (1, "the guard compares the norm of the gradient, and the logs show it"),
    f"copy to the host {ENGINE}:_squares_by_part": (1, "the logs show the norms of the parts, at logged steps"),
    f"read {ENGINE}:_update_average": (4, "the average of the weights asks each group how many updates it had"),
    f"copy to the device {CONTROL}:gather_numbers": (1, "the numbers of a step are added up over ranks"),
    f"copy to the host {CONTROL}:gather_numbers": (1, "the numbers of a step are added up over ranks"),
    "read deepspeed/runtime/utils.py:is_invalid_grad_norm": (1, "DeepSpeed skips an update that is not finite"),
    "read deepspeed/runtime/utils.py:clip_tensors_by_global_norm": (1, "DeepSpeed clips in bf16 under ZeRO 1"),
    "copy to the device deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace": (
        2, "DeepSpeed builds the value that replaces a norm that is not finite"
    ),
    f"read {ZERO}/stage_1_and_2.py:has_overflow": (1, "DeepSpeed looks for gradients that are not finite"),
    "torch.cuda.synchronize deepspeed/accelerator/cuda_accelerator.py:synchronize": (
        2, "DeepSpeed waits at the begin and end of an update that overlaps communication"
    ),
}  # fmt: skip
"""By place as in `gpu.Record.waits`: how often in a step at most, and why. The first is for each pack of a rank."""
PER_PACK = {f"copy from pageable memory {STEP}:_inputs"}
