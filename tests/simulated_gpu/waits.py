"""Every place where a run waits for the device, but for its start, with the reason. A new one fails `test_step.py`."""

from __future__ import annotations

from typing import NamedTuple

CONTROL = "univitar_ds/training/distributed/process_group.py"
UPLOAD = "univitar_ds/training/step/upload.py"
SNAPSHOT = "univitar_ds/training/step/feature_snapshot.py"
EXCHANGE = "univitar_ds/objectives/exchange.py"
STEP = "univitar_ds/training/step/train_step.py"
ENGINE = "univitar_ds/training/engine/engine.py"
NORM = "univitar_ds/training/engine/device_waits.py"
BUCKETS = "univitar_ds/training/engine/lean/gradient_buckets.py"
FETCHING = "univitar_ds/training/engine/lean/weight_fetching.py"
ZERO = "deepspeed/runtime/zero"
EVALUATION = "univitar_ds/evaluation"


class Wait(NamedTuple):
    """A place that may wait. `most`: times in a phase of the run, such as a step, or for each `per`: pack of the rank,
    collective or copy of the phase."""

    most: int
    reason: str
    per: str = "phase"


STEP_WAITS = {
    f"copy to the host {EXCHANGE}:__init__": Wait(1, "the numbers of items of all ranks are sizes of messages"),
    f"read {EXCHANGE}:total": Wait(1, "a loss that is not finite gets a gradient that is not finite"),
    f"copy to the host {STEP}:_suspects": Wait(1, "only if the update is skipped: its event names the samples"),
    **{
        f"copy {place}": Wait(1, "only if the update is skipped: the names of the samples of all ranks")
        for place in (
            f"to the device {CONTROL}:_encoded",
            f"to the device {CONTROL}:_lengths",
            f"to the host {CONTROL}:_lengths",
            f"to the host {CONTROL}:gather_json",
        )
    },
    f"copy to the host {NORM}:_read": Wait(1, "the norm of the gradient decides whether the parameters change"),
    f"copy to the host {SNAPSHOT}:copy_some": Wait(1, "only in a step whose pack is shown in TensorBoard"),
    f"copy to the host {CONTROL}:gather_numbers": Wait(1, "the numbers of a step are added up over ranks"),
    f"copy from pageable memory {UPLOAD}:__call__": Wait(
        1, "without decoding processes, as in these runs, pixels lie in memory that is not registered", per="pack"
    ),
    "torch.cuda.synchronize deepspeed/accelerator/cuda_accelerator.py:synchronize": Wait(
        1, "DeepSpeed waits for the weights of a module that it gathers one by one, outside of blocks"
    ),
    f"Stream.synchronize {ZERO}/partition_parameters.py:wait": Wait(
        40, "only with ZeRO-3 on one GPU, where `auto` takes ZeRO-2: DeepSpeed waits for the weights of each module"
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
# Between steps, in evaluations and in checkpoints ranks agree by small messages, which the host reads.
MESSAGES = {
    f"copy to the host {CONTROL}:{function}": Wait(1, "the host reads what ranks send", per="collective")
    for function in (
        "gather_numbers",
        "all_ranks_or_none",
        "gather_json",
        "gather_json_to_main",
        "scatter_json",
        "_decoded",
        "_lengths",
    )
} | {
    f"copy to the device {CONTROL}:{function}": Wait(1, "what a rank sends is made on the host", per="collective")
    for function in ("_encoded", "_lengths", "broadcast_json", "scatter_json")
}
EVALUATION_WAITS = {
    **MESSAGES,
    f"copy to the device {EVALUATION}/during_training.py:_model": Wait(2, "the positions of texts, for each model"),
    f"copy to the device {EVALUATION}/embed.py:embed_by_each": Wait(1, "pixels of a pack", per="pack"),
    f"copy to the device {EVALUATION}/embed.py:<listcomp>": Wait(2, "texts of a pack, for each model", per="pack"),
    f"copy to the host {EVALUATION}/embed.py:embed_by_each": Wait(2, "embeddings, which are kept there", per="pack"),
    f"copy to the host {EVALUATION}/embed.py:<listcomp>": Wait(2, "embeddings of texts, as those of items", per="pack"),
    f"copy to the device {EVALUATION}/shares.py:_rows": Wait(1, "embeddings are kept on the host", per="collective"),
    f"copy to the host {EVALUATION}/shares.py:_rows": Wait(1, "rank 0 computes figures there", per="collective"),
}
SAVE_WAITS = {
    **MESSAGES,
    "Stream.synchronize univitar_ds/training/checkpoint/staging.py:copy": Wait(1, "the next step changes the tensors"),
    f"copy to the host {ENGINE}:<dictcomp>": Wait(1, "the checkpoint has the number of updates"),
}
LOAD_WAITS = {
    **MESSAGES,
    "copy to the device univitar_ds/formats/elastic.py:_fill": Wait(
        1, "tensors are copied from mapped files, which are not registered", per="copy"
    ),
    "copy to the device univitar_ds/training/engine/optim.py:counted_updates": Wait(
        1, "the number of updates of a tensor of the optimizer", per="copy"
    ),
    f"copy to the host {ENGINE}:<dictcomp>": Wait(1, "the number of updates, for the average of the weights"),
}
WAITS = {
    "step": STEP_WAITS,
    "between": MESSAGES,
    "evaluation": EVALUATION_WAITS,
    "save": SAVE_WAITS,
    "load": LOAD_WAITS,
}
"""Allowed waits by phase of the run and by place, as in `gpu.Record.waits`: "kind file:function"."""
