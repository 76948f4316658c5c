"""Predicts the evaluations during training: their number, their items, and how long training waits for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from univitar_ds.config.schema import RunConfig
from univitar_ds.data.shards.sources import find_shards, stage_modalities
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import UserError
from univitar_ds.geometry import Modality
from univitar_ds.model.flops import BACKWARD, cost_coefficients
from univitar_ds.planning.forecast.cluster import Cluster, value
from univitar_ds.planning.forecast.resources import cpu_seconds
from univitar_ds.planning.forecast.stage import StagePlan
from univitar_ds.planning.forecast.step_load import PlannedModel
from univitar_ds.planning.sizes import encoder_of
from univitar_ds.planning.step_time import FP32, link_rate


@dataclass(frozen=True)
class Evaluations:
    """The evaluations during training.

    `count`: number of evaluations; `items`: items of one evaluation by modality; `source`: of these numbers,
    "manifests" or "assumed"; `parts`: seconds of one evaluation by part; `kinds`: number of kinds of weights that are
    evaluated, 2 with an average.
    """

    count: int
    items: Mapping[Modality, int]
    source: str
    parts: Mapping[str, float]
    kinds: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def hours(self) -> float:
        return self.count * self.seconds / 3600


def evaluated_items(config: RunConfig) -> dict[Modality, int]:
    """Returns the number of samples in `evaluation.sources` by modality; {} if a source is not on this machine or has
    no manifest."""
    sources, counts = config.evaluation.sources, Counter[Modality]()
    if any("://" in source.path for source in sources):
        return {}
    with suppress(UserError, OSError):
        for shard in find_shards(sources, StorageSettings.of(config.data)) if sources else ():
            if shard.modality is None or shard.expected is None:
                return {}
            counts[shard.modality] += shard.expected
    return dict(counts)


def evaluations(model: PlannedModel, stages: Sequence[StagePlan], cluster: Cluster) -> Evaluations | None:
    """Returns the evaluations of a run during training; None if it has none.

    Each GPU embeds its share of the items with one kind of weights after the other, while further items are decoded.
    The embedding of captions and prompts is not counted.
    """
    config = model.config
    every = config.evaluation.every_samples
    if not every or not config.evaluation.sources:
        return None
    known = {modality: count for modality, count in model.evaluated.items() if _stage_of(config, stages, modality)}
    assumed: Modality = "image" if _stage_of(config, stages, "image") else "video"
    items = known or {assumed: int(value("evaluation_items"))}
    kinds = model.evaluated_kinds
    computed = decoded = 0.0
    for modality, count in items.items():
        own = _stage_of(config, stages, modality)
        assert own is not None
        share = math.ceil(count / cluster.ranks)
        rate = own.mfu * cluster.gpu.peak.value
        computed += kinds * share * _forward_flops(model, own, modality) / rate
        decoded += share * cpu_seconds(config, own.name, modality) / max(1, config.data.workers)
    whole = FP32 * model.counts.total * kinds
    gathered = 2 * whole / link_rate(cluster.gpu, cluster.ranks, cluster.per_node) if cluster.ranks > 1 else 0.0
    parts = {
        "gathering the weights": gathered,
        "embedding": max(computed, decoded),
        "start and figures": value("evaluation_start"),
    }
    count = sum(stage.samples for stage in config.stages) // every
    return Evaluations(count, items, "manifests" if known else "assumed", parts, kinds)


def _stage_of(config: RunConfig, stages: Sequence[StagePlan], modality: Modality) -> StagePlan | None:
    """Returns the last stage that trains on a modality; an evaluation uses its sizes. None if no stage does."""
    pairs = zip(reversed(stages), reversed(config.stages), strict=True)
    return next((own for own, stage in pairs if modality in stage_modalities(stage)), None)


def _forward_flops(model: PlannedModel, stage: StagePlan, modality: Modality) -> float:
    """Returns the FLOPs of the encoder's forward pass for an item of a stage."""
    linear, square = cost_coefficients(encoder_of(model.description))
    one = next(one for one in stage.items if one.modality == modality)
    return one.tokens * (linear + square * one.attended) / (1 + BACKWARD)
