"""Mean size of the items of a stage: from its size rule, the user or the manifests, or else assumed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.shards.sources import find_shards, stage_modalities
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import ConfigError, UserError
from univitar_ds.geometry import PATCH, TUBELET, Modality
from univitar_ds.planning.counts.batch import Means, tokens_of_item
from univitar_ds.planning.counts.samples import expected_tokens
from univitar_ds.planning.forecast.cluster import value


@dataclass(frozen=True)
class Items:
    """Items of one modality of a stage.

    `tokens`: mean per item; `attended`: mean number of tokens that a token attends to; `sizes`: number of different
    sizes in a pack; `source`: of the mean: "one size", "given", "manifests" or "assumed"; `share`: of the steps that
    read this modality.
    """

    modality: Modality
    tokens: float
    attended: float
    sizes: int
    source: str
    share: float


def on_this_machine(config: RunConfig) -> bool:
    """Whether all sources of a run are on this machine, so that a plan may read them."""
    return not any("://" in source.path for source in config.data.sources)


def known_means(config: RunConfig) -> Means:
    """Returns the mean tokens per item from the manifests of the sources; {} if a source is not on this machine, or
    cannot be read."""
    if not on_this_machine(config):
        return {}
    with suppress(UserError, OSError):
        return expected_tokens(config, find_shards(config.data.sources, StorageSettings.of(config.data)))
    return {}


def items_of(stage: StageConfig, means: Means, given: int | None) -> list[Items]:
    """Returns the items of a stage, images before videos.

    Args: means: mean tokens per item, if known; given: mean tokens of an image at native size, as the user gives it.
    Raises: ConfigError if `given` is outside the limits of the stage.
    """
    shares: dict[Modality, float] = {"image": 1 - stage.video_ratio, "video": stage.video_ratio}
    return [_items(stage, modality, means, given, shares[modality]) for modality in sorted(stage_modalities(stage))]


def _items(stage: StageConfig, modality: Modality, means: Means, given: int | None, share: float) -> Items:
    rule = stage.image if modality == "image" else stage.video
    if rule.size_px is not None:
        steps = 1 if modality == "image" else stage.video_frames // TUBELET
        tokens = float(steps * (rule.size_px // PATCH) ** 2)
        return Items(modality, tokens, tokens, 1, "one size", share)
    if given is not None and modality == "image" and not rule.min_tokens <= given <= rule.max_tokens:
        raise ConfigError(
            f"--tokens-per-item {given} is outside of {rule.min_tokens} to {rule.max_tokens} tokens, the limits of "
            f"stage {stage.name}; give a mean within them"
        )
    frame = value("native_tokens") if given is None else given
    source = "assumed" if given is None else "given"
    mean = tokens_of_item(stage, modality, frame)
    if given is None and (known := means.get((stage.name, modality))) is not None:
        mean, source = known, "manifests"
    mean = min(max(mean, rule.min_tokens), rule.max_tokens)
    attended = min(value("attended") * mean, float(rule.max_tokens))
    return Items(modality, mean, max(mean, attended), int(value("sizes")), source, share)
