"""Every place where a training step waits for the device, with the reason. A new one fails `test_step.py`."""

from __future__ import annotations

from typing import NamedTuple

CONTROL = "univitar_ds/training/distributed/process_group.py"
UPLOAD = "univitar_ds/training/step/upload.py"
SNAPSHOT = "univitar_ds/training/step/feature_snapshot.py"
EXCHANGE = "univitar_ds/objectives/exchange.py"
NORM = "univitar_ds/training/engine/device_waits.py"
BUCKETS = "univitar_ds/training/engine/lean/gradient_buckets.py"
FETCHING = "univitar_ds/training/engine/lean/weight_fetching.py"
ZERO = "deepspeed/runtime/zero"


class Wait(NamedTuple):
    """A place that may wait. `most`: times in a step, or for each `per`: pack of the rank, or collective of the
    step."""

    most: int
    reason: str
    per: str = "step"


STEP_WAITS = {
    f"copy to the host {EXCHANGE}:__init__": Wait(1, "the numbers of items of all ranks are sizes of messages"),
    f"read {EXCHANGE}:total": Wait(1, "a loss that is not finite gets a gradient that is not finite"),
    f"copy to the host {NORM}:_read": Wait(1, "the norm of the gradient decides whether the parameters change"),
    f"copy to the host {SNAPSHOT}:copy_some": Wait(1, "only in a step whose pack is shown in TensorBoard"),
    f"copy to the host {CONTROL}:gather_numbers": Wait(1, "the numbers of a step are added up over ranks"),
    f"copy from pageable memory {UPLOAD}:__call__": Wait(
        1, "without decoding processes, as in these runs, pixels lie in memory that is not registered", per="pack"
    ),
    "torch.cuda.synchronize deepspeed/accelerator/cuda_accelerator.py:synchronize": Wait(
        1, "DeepSpeed waits for the weights of a module that it gathers one by one, outside of blocks"
    ),
    f"Event.synchronize {BUCKETS}:_limit_memory": Wait(
        1, "the host waits for the gradients of three buckets ago, which keeps the memory in bounds", per="collective"
    ),
    f"Event.synchronize {FETCHING}:_wait": Wait(
        1, "the host waits for the weights of three fetches ago, which keeps the memory in bounds", per="collective"
    ),
    f"Event.synchronize {ZERO}/partitioned_param_coordinator.py:_fetch_sub_module_impl": Wait(
        1, "the same in the first steps, in which DeepSpeed records the order of the modules", per="collective"
    ),
}
"""Allowed waits by place, as in `gpu.Record.waits`: "kind file:function"."""
