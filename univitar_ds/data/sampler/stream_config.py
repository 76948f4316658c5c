"""The configuration of a stream: shards, sizes, budgets, weights and policy for bad samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from univitar_ds.config.data import DataConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.media.augment import Augment
from univitar_ds.data.media.frame_sampling import Sampling
from univitar_ds.data.media.prober import Prober, probe_each
from univitar_ds.data.sampler.bad_samples import BadPolicy
from univitar_ds.data.sampler.packing import predicted_time, scale_for_dropout
from univitar_ds.data.shards.index_cache import IndexCache
from univitar_ds.data.shards.samples import SizeRule
from univitar_ds.data.shards.sources import ShardGroup, SourceShard, groups_of, stage_modalities
from univitar_ds.geometry import Modality

Held = Literal["readable", "unreadable", "nothing"]
"""Whether a group has a readable sample of a modality, only unreadable ones, or none."""


@dataclass(frozen=True)
class StreamConfig:
    """All settings, except the lane, that determine the packs of one modality.

    `augment` is applied to every sample, `weights` are the stage's weights by source, `cost` the coefficients of
    `packing.item_cost`. With `balance_time` these predict time, and `balance.balanced` sets the cost budget. `probe`
    reads sizes that are not in metadata. All lanes share the last three fields: indexes of shards, which both
    modalities share too, warnings logged so far, and cached results of `held_by` by group.
    """

    shards: Sequence[SourceShard]
    lanes: int
    seed: int
    size: SizeRule
    token_budget: int
    pool_samples: int
    policy: BadPolicy
    augment: Augment | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    cost: tuple[float, float] = (0.0, 0.0)
    cost_budget: float | None = None
    balance_time: bool = False
    probe: Prober = probe_each
    index_cache: IndexCache = field(default_factory=IndexCache, compare=False)
    warned: set[str] = field(default_factory=set, compare=False)
    held: dict[str, Held] = field(default_factory=dict, compare=False)

    @property
    def modality(self) -> Modality:
        return self.size.modality

    @cached_property
    def groups(self) -> list[ShardGroup]:
        return groups_of(self.shards, self.modality, self.weights)

    @cached_property
    def group_of(self) -> dict[int, str]:
        """The name of each shard's group."""
        return {shard: group.name for group in self.groups for shard in group.shards}

    def is_first_warning(self, what: str) -> bool:
        """Returns whether no lane has logged this warning yet, and records that it is logged now."""
        first = self.policy.warns and what not in self.warned
        self.warned.add(what)
        return first


def stream_config(
    shards: Sequence[SourceShard],
    *,
    data: DataConfig,
    stage: StageConfig,
    lanes: int,
    seed: int,
    cost: tuple[float, float] = (0.0, 0.0),
    warns: bool = True,
) -> dict[Modality, StreamConfig]:
    """Returns the configuration of each modality that a stage reads.

    Args: cost: FLOPs, see `packing.item_cost`; warns: whether the lanes log warnings."""
    tflops = stage.cost_budget_tflops
    balance_time = tflops == "auto"
    if balance_time:
        cost = predicted_time(cost, data.attention_cost)
    index_cache = IndexCache()
    return {
        modality: StreamConfig(
            shards=shards,
            lanes=lanes,
            seed=seed,
            size=SizeRule(
                modality,
                stage.resolution(modality),
                stage.video_frames if modality == "video" else 1,
                stage.token_budget,
                data.max_image_px,
                Sampling(**stage.video_sampling.model_dump()),
                data.max_video_s,
                data.max_sample_mb,
            ),
            token_budget=stage.token_budget,
            pool_samples=data.pool_samples,
            policy=bad_policy(data, warns),
            augment=None if stage.augment.is_off else Augment(**stage.augment.model_dump()),
            weights=stage.weights,
            cost=scale_for_dropout(cost, stage.patch_dropout),
            cost_budget=None if tflops is None or tflops == "auto" else tflops * 1e12,
            balance_time=balance_time,
            index_cache=index_cache,
        )
        for modality in stage_modalities(stage)
    }


def bad_policy(data: DataConfig, warns: bool = True) -> BadPolicy:
    return BadPolicy(data.on_bad, data.max_bad_per_thousand, data.max_bad_in_a_row, warns)
