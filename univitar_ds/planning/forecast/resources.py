"""Predicts host memory, cores for the loader, checkpoints, and what is read from the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from univitar_ds.config.deepspeed import on_disk
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.collate import AHEAD
from univitar_ds.geometry import pixel_bytes
from univitar_ds.planning.counts.batch import kept_after
from univitar_ds.planning.forecast.cluster import Cluster, value
from univitar_ds.planning.forecast.stage import StagePlan
from univitar_ds.planning.forecast.step_load import Placement, PlannedModel, group_size, held_by_rank
from univitar_ds.planning.sizes import checkpoint_bytes

FP32 = 4


@dataclass(frozen=True)
class HostNeeds:
    """Needs of one machine.

    `memory`: bytes of host memory by part; `cores`: cores that decoding keeps busy, in addition to one core for each
    rank; `workers`: decoding processes that a rank needs; `given`: `data.workers` of the run file.
    """

    memory: Mapping[str, float]
    cores: float
    workers: int
    given: int

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    `bytes`: of one checkpoint; `seconds`: to write one; `pause`: seconds for which training waits at a save; `count`:
    checkpoints that are written; `disk`: bytes of those that are kept; `hours`: for which training waits at all saves.
    """

    bytes: float
    seconds: float
    pause: float
    count: int
    disk: float
    hours: float


@dataclass(frozen=True)
class Reading:
    """What a whole run reads: samples, bytes and requests to the store. `remote`: whether a source is at s3://."""

    samples: float
    bytes: float
    requests: float
    remote: bool


def offloaded_bytes(model: PlannedModel, place: Placement) -> float:
    """Returns the bytes of the largest training state that a rank keeps in host memory."""
    return max(held_by_rank(model, stage, place).host for stage in model.config.stages)


def host_needs(model: PlannedModel, stages: Sequence[StagePlan], cluster: Cluster, place: Placement) -> HostNeeds:
    """Returns the host memory and cores that each machine needs, in the stage that needs most."""
    data, per_node = model.config.data, cluster.per_node
    readers = cluster.ranks // group_size(model.config)
    packs = max(1, data.lanes // readers)
    ahead = max(data.prefetch_packs or max(AHEAD, packs), data.workers)
    slots = ahead + max(packs, 2) + 1
    pixels = max(pixel_bytes(stage.token_budget, video=stage.video_ratio > 0) for stage in model.config.stages)
    busy = max(
        sum(one.share * cpu_seconds(model.config, own.name, one.modality) for one in own.items)
        * own.pairs / readers / own.step_s
        for own in stages
    )  # fmt: skip
    saved = max(checkpoint_bytes(model.config, stage, model.counts, place.resolved) for stage in model.config.stages)
    memory = {
        "processes": per_node * (value("rank_bytes") + value("cuda_bytes")),
        "decoding processes": per_node * max(1, data.workers) * value("worker_bytes"),
        "pixels of packs": per_node * slots * pixels,
        "model while it is built": per_node * model.counts.total * FP32,
        "offloaded training state": per_node * offloaded_bytes(model, place),
        "copy of the checkpoint": 0.0 if on_disk(place.resolved) else per_node * saved / place.sharing,
    }
    return HostNeeds(
        {name: size for name, size in memory.items() if size}, per_node * busy, max(1, -int(-busy // 1)), data.workers
    )


def checkpoints(model: PlannedModel, stages: Sequence[StagePlan], cluster: Cluster, place: Placement) -> Checkpoints:
    """Returns size, time and number of a run's checkpoints.

    Machines that share a training state each write a part of it. With `checkpoint.asynchronous`, training waits for the
    copy to host memory, for an earlier save that is still being written, and at the end for the last save.
    """
    config = model.config
    size = max(checkpoint_bytes(config, stage, model.counts, place.resolved) for stage in config.stages)
    writers = min(cluster.nodes, max(1, place.sharing // cluster.per_node))
    every = config.checkpoint.every_steps
    ends = list(accumulate(own.steps for own in stages))
    count = ends[-1] // every + sum(end % every > 0 for end in ends)  # the end of a stage has a checkpoint too
    kept = kept_after(config, ends[-1])
    seconds = size / writers / value("write_rate")
    pause = size / place.sharing / value("copy_rate") if config.checkpoint.asynchronous else seconds
    late = sum(own.steps // every * max(0.0, seconds - pause - every * own.step_s) for own in stages)
    waits = count * pause + (late + seconds if config.checkpoint.asynchronous else 0.0)
    return Checkpoints(size, seconds, pause, count, size * kept, waits / 3600)


def reading(config: RunConfig, stages: Sequence[StagePlan]) -> Reading:
    """Returns what a run reads: each sample as often as it is seen, and each shard with one request each time."""
    samples = sum(stage.samples for stage in config.stages)
    size = 0.0
    for own, stage in zip(stages, config.stages, strict=True):
        pairs = {one.modality: one.share / one.tokens for one in own.items}
        images = pairs.get("image", 0.0) / sum(pairs.values())
        size += stage.samples * (images * value("image_bytes") + (1 - images) * value("video_bytes"))
    remote = any(source.path.startswith("s3://") for source in config.data.sources)
    return Reading(samples, size, size / value("shard_bytes"), remote)


def cpu_seconds(config: RunConfig, stage: str, modality: str) -> float:
    """Returns the seconds of a core to read, decode and resize an item of a stage."""
    if modality == "image":
        return value("image_cpu")
    frames = next(one.video_frames for one in config.stages if one.name == stage)
    return value("video_cpu") * frames / value("decoded_frames")
