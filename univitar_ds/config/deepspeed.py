"""Reads the DeepSpeed JSON: precision, ZeRO, buckets and offload. All other settings belong to the run file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from univitar_ds.config.schema import RunConfig
from univitar_ds.divisors import divisors
from univitar_ds.errors import ConfigError
from univitar_ds.regular_files import read_utf8

AUTO = "auto"
"""Value of the key `deepspeed` with which a run chooses a file of `ds_configs/`; see `planning.deepspeed_auto`."""
SHARDING = "sharding_ranks"
"""Key of a DeepSpeed JSON that only this program reads: the number of consecutive ranks that share a training state
under ZeRO-3, or NODE. Without the key, all ranks share one."""
NODE = "node"
"""Value of SHARDING: the ranks of each machine."""
OFFLOADED_OPTIMIZER = "offload_optimizer"
OFFLOADS = (OFFLOADED_OPTIMIZER, "offload_param")
"""Sections of `zero_optimization` that move a part of the training state off the GPUs."""
DISK = "nvme"
"""Value of `device` in these sections for a local disk."""
OWNED_BY_RUN = {
    "optimizer": "optimizer",
    "scheduler": "stages.*.lr",
    "activation_checkpointing": "model.checkpoint_every",
}
"""DeepSpeed sections that the run file replaces, and the key that replaces each."""


def deepspeed_path(name: str) -> Path:
    """Returns the path of a DeepSpeed JSON: `name` if that file exists, else the file of that name in `ds_configs/`.

    Raises: ConfigError if neither file exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = Path(str(resources.files("univitar_ds") / "ds_configs"))
    if (folder / f"{name}.json").is_file():
        return folder / f"{name}.json"
    names = ", ".join(sorted(file.stem for file in folder.glob("*.json")))
    raise ConfigError(f"deepspeed: no file {name!r}; give the path of a JSON, {AUTO}, or one of {names}")


def read_deepspeed(name: str) -> dict[str, Any]:
    """Returns the content of a DeepSpeed JSON. Raises: ConfigError if the file is missing or has no JSON object."""
    path = deepspeed_path(name)
    try:
        content = json.loads(read_utf8(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"deepspeed: cannot read {path}: {error}; correct it, or start from one of univitar_ds/ds_configs"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed: {path} does not contain a JSON object; start from one of univitar_ds/ds_configs")
    return content


def lanes_per_rank(lanes: int, world_size: int) -> int:
    """Returns the number of lanes per rank. Raises: ConfigError if `world_size` does not divide `lanes`."""
    if lanes % world_size:
        raise ConfigError(
            f"data.lanes is {lanes} and cannot be shared evenly by {world_size} ranks; "
            f"run {', '.join(map(str, divisors(lanes)))} ranks, or start a new run with another data.lanes"
        )
    return lanes // world_size


def packs_per_rank(config: RunConfig, world_size: int) -> int:
    """Returns the number of lanes that each rank reads. Ranks that share packs or weights read the same lanes.

    Raises: ConfigError if `world_size` does not fit tensor_parallel, sequence_parallel and the lanes.
    """
    model = config.model
    each = model.tensor_parallel * model.sequence_parallel
    if each == 1:
        return lanes_per_rank(config.data.lanes, world_size)
    keys = f"model.tensor_parallel {model.tensor_parallel} and model.sequence_parallel {model.sequence_parallel}"
    lanes = config.data.lanes
    possible = ", ".join(str(number * each) for number in divisors(lanes))
    if world_size % each:
        raise ConfigError(
            f"{keys} need a multiple of {each} ranks, there are {world_size}; run {possible} ranks, or lower them"
        )
    if lanes % (world_size // each):
        raise ConfigError(
            f"data.lanes is {lanes} and cannot be shared evenly by {world_size // each} groups of {each} ranks "
            f"({keys}); run {possible} ranks, or start a new run with another data.lanes"
        )
    return lanes // (world_size // each)


def sharing_ranks(content: Mapping[str, Any], world_size: int, node: int) -> int:
    """Returns how many ranks share a training state. Args: node: ranks on each machine."""
    value = content.get(SHARDING, world_size)
    return min(world_size, node if value == NODE else value)


def resolve_deepspeed(
    config: RunConfig, world_size: int, content: dict[str, Any], names: tuple[str, str]
) -> dict[str, Any]:
    """Returns the complete DeepSpeed configuration of a run on `world_size` ranks.

    Args:
        content: the DeepSpeed JSON as read.
        names: names of the run file and the JSON in messages.
    Raises: ConfigError if `content` contradicts the run file or has a setting that is not supported; or as
        `packs_per_rank`.
    """
    owned = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": packs_per_rank(config, world_size),
        # DeepSpeed counts each rank's part of a pack as a pack.
        "train_batch_size": config.data.lanes * config.model.sequence_parallel,
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
    }
    run_file, json_file = names
    faults = [
        f"{key} is {content[key]!r} in {json_file} but {value!r} follows from {run_file}; remove it from {json_file}"
        for key, value in owned.items()
        if content.get(key, value) not in (value, "auto")
    ]
    faults += [
        f"{key} is set in {json_file} but belongs to {run_file} ({owner}); remove it from {json_file}"
        for key, owner in OWNED_BY_RUN.items()
        if key in content
    ]
    if content.get("fp16", {}).get("enabled"):
        faults.append(f"fp16 is enabled in {json_file}; bf16 and fp32 are supported: set bf16.enabled")
    faults += _sharding_faults(content, world_size, json_file)
    faults += _tensor_faults(config, content, names)
    faults += _disk_faults(content, json_file)
    if faults:
        raise ConfigError("\n  - ".join(["the two configurations contradict each other:", *faults]))
    quiet = {
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # DeepSpeed's timer waits for the device before every forward
        "zero_allow_untested_optimizer": True,
    }
    return {**quiet, **content, **owned}


def on_disk(content: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed configuration keeps the optimizer states on a local disk."""
    return _offload(content, OFFLOADED_OPTIMIZER) == DISK


def _offload(content: Mapping[str, Any], name: str) -> str:
    """Returns the device to which ZeRO offloads optimizer or parameters."""
    return (content.get("zero_optimization", {}).get(name) or {}).get("device", "none")


def _tensor_faults(config: RunConfig, content: Mapping[str, Any], names: tuple[str, str]) -> Iterator[str]:
    """Yields sentences about settings that tensor parallelism cannot be combined with."""
    ranks, optimizer = config.model.tensor_parallel, config.optimizer.kind
    if ranks == 1:
        return
    run_file, json_file = names
    if optimizer != "adamw":
        yield (
            f"optimizer.kind is {optimizer} with model.tensor_parallel {ranks} in {run_file}, but a rank has only "
            "slices of the matrices; set it to adamw, or remove model.tensor_parallel"
        )
    if config.model.fp8:
        yield (
            f"model.fp8 is true with model.tensor_parallel {ranks} in {run_file}, whose layers are those of "
            "Megatron-Core; remove one of them"
        )
    zero = content.get("zero_optimization", {})
    where = f"with model.tensor_parallel {ranks} in {run_file}"
    others = {SHARDING: content.get(SHARDING), "zero_hpz_partition_size": zero.get("zero_hpz_partition_size", 1) > 1}
    for name in (name for name, given in others.items() if given):
        yield f"{name} is set in {json_file} {where}, whose ranks already share weights; remove one of them"
    for name in OFFLOADS:
        if _offload(content, name) != "none":
            yield f"{name} is set in {json_file} {where}; they have not been tried together, remove one of them"


def _disk_faults(content: Mapping[str, Any], json_file: str) -> Iterator[str]:
    """Yields sentences about a training state on a disk that cannot be used."""
    zero = content.get("zero_optimization", {})
    if _offload(content, "offload_param") == DISK:
        yield (
            f"offload_param.device is nvme in {json_file}; only the optimizer can be on a disk: set it to cpu, or "
            "remove offload_param"
        )
    if not on_disk(content):
        return
    where, section = f"{OFFLOADED_OPTIMIZER}.device is nvme in {json_file}", zero[OFFLOADED_OPTIMIZER]
    if zero.get("stage") != 3:
        yield f"{where} with ZeRO stage {zero.get('stage', 0)}; it needs stage 3: set the stage, or the device to cpu"
    path = section.get("nvme_path")
    if not isinstance(path, str) or not path:
        yield f"{where} without nvme_path; name a folder on a local disk there"
    for key in ("pipeline_read", "pipeline_write"):
        if section.get(key):
            yield f"{where} with {key}, while checkpoints need files that are written completely; remove {key}"


def _sharding_faults(content: Mapping[str, Any], world_size: int, json_file: str) -> Iterator[str]:
    """Yields sentences about a value of SHARDING that cannot be used."""
    value = content.get(SHARDING)
    if value is None:
        return
    where, zero = f"{SHARDING} is {value!r} in {json_file}", content.get("zero_optimization", {})
    if value != NODE and (type(value) is not int or value < 1):
        yield f"{where}; give {NODE!r} or a number of ranks"
    elif value != NODE and world_size % value:
        yield f"{where}, which does not divide {world_size} ranks; give a divisor or {NODE!r}"
    if zero.get("stage") != 3:
        yield f"{where} with ZeRO stage {zero.get('stage', 0)}; it needs stage 3, remove one of them"
    for name in OFFLOADS:
        if _offload(content, name) != "none":
            yield f"{where} with {name}, which reads gradients before they are summed over groups; remove one of them"
    if zero.get("zero_hpz_partition_size", 1) > 1:
        yield f"{where} with zero_hpz_partition_size, which keeps weights within a machine too; remove one of them"
