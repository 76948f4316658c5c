"""Computes the pairs of a step from the tokens of a pack, the lanes and the number of processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from univitar_ds.config.deepspeed import packs_per_rank
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import ResolutionConfig, StageConfig
from univitar_ds.data.sampler.packing import item_cost, scale_for_dropout
from univitar_ds.data.shards.sources import stage_modalities
from univitar_ds.geometry import PATCH, TUBELET, Modality
from univitar_ds.model.flops import cost_coefficients

TERA = 1e12
Means = Mapping[tuple[str, Modality], float]
"""Expected tokens per item by (name of the stage, modality). Pairs without known data are absent."""


@dataclass(frozen=True)
class PackSize:
    """The packs of one modality of a stage: tokens per item, and items (pairs of media and text) per pack.

    `tokens` and `items` are (minimum, maximum); `mean_tokens` and `mean_items` are expected values, None if items
    differ in size and the sizes of the data are unknown.
    """

    modality: Modality
    tokens: tuple[int, int]
    items: tuple[int, int]
    mean_tokens: float | None
    mean_items: float | None


def pack_sizes(stage: StageConfig, encoder: EncoderConfig, means: Means | None = None) -> list[PackSize]:
    """Returns the sizes of the packs of a stage, images before videos.

    Full packs are assumed: up to `token_budget`, or up to `cost_budget_tflops` where that is the lower limit.

    Args: means: expected tokens per item, if known.
    """
    return [_pack_size(stage, encoder, modality, means or {}) for modality in sorted(stage_modalities(stage))]


def batch_lines(config: RunConfig, world_size: int, encoder: EncoderConfig, means: Means | None = None) -> list[str]:
    """Returns lines of text with the number of pairs in a step and the numbers that it follows from.

    Args: encoder: shape of the encoder, for `cost_budget_tflops`; means: expected tokens per item, if known.
    Raises: ConfigError if `world_size` does not divide the lanes.
    """
    lanes, packs = config.data.lanes, packs_per_rank(config, world_size)
    shared = config.model.tensor_parallel * config.model.sequence_parallel
    readers = world_size // shared
    noun = (
        _plural(readers, "process", "processes")
        if shared == 1
        else _plural(readers, f"group of {shared} processes", f"groups of {shared} processes")
    )
    unit = "items" if config.objective.classifies else "pairs"
    accumulated = "no accumulation" if packs == 1 else f"accumulated by GradCache, one loss over all {unit}"
    if config.objective.classifies and packs > 1:
        accumulated = "their gradients are accumulated"
    lines = [f"a step: {lanes} lanes = {readers} {noun} x {packs} {_plural(packs, 'pack', 'packs')} ({accumulated})"]
    for stage in config.stages:
        for size in pack_sizes(stage, encoder, means):
            items, step = size.items, (size.items[0] * lanes, size.items[1] * lanes)
            mean = None if size.mean_items is None else size.mean_items * lanes
            lines.append(
                f"stage {stage.name}, {size.modality}s: {stage.token_budget:,} tokens a pack / "
                f"{_range(size.tokens, size.mean_tokens)} an item = {_range(items, size.mean_items)} {unit} a pack, "
                f"x {lanes} lanes = {_range(step, mean)} {unit} a step"
            )
    return lines


def pairs_per_step(
    stage: StageConfig, lanes: int, encoder: EncoderConfig, means: Means | None = None
) -> tuple[float, float, float | None]:
    """Returns the (minimum, maximum, expected) number of pairs in a step: means over steps of images and of videos,
    weighted by `video_ratio`. The expected number is None if the sizes of the data are unknown."""
    shares = {"image": 1 - stage.video_ratio, "video": stage.video_ratio}
    sizes = pack_sizes(stage, encoder, means)
    least = sum(shares[size.modality] * size.items[0] for size in sizes) * lanes
    most = sum(shares[size.modality] * size.items[1] for size in sizes) * lanes
    known = all(size.mean_items is not None for size in sizes)
    return least, most, sum(shares[size.modality] * (size.mean_items or 0) for size in sizes) * lanes if known else None


def fewest_steps(stage: StageConfig, lanes: int, encoder: EncoderConfig, means: Means | None = None) -> int:
    """Returns the expected number of steps of a stage; the smallest possible one if item sizes are unknown."""
    _, most, mean = pairs_per_step(stage, lanes, encoder, means)
    return math.ceil(stage.samples / (most if mean is None else mean))


def kept_checkpoints(config: RunConfig, encoder: EncoderConfig, means: Means | None = None) -> int:
    """Returns how many checkpoints of a run are on the disk at most, from its number of steps; see `kept_after`."""
    return kept_after(config, sum(fewest_steps(stage, config.data.lanes, encoder, means) for stage in config.stages))


def kept_after(config: RunConfig, steps: int) -> int:
    """Returns how many checkpoints are on the disk after a number of steps: the newest (`checkpoint.keep`), those of
    `keep_every_steps`, the best, and one that is being written."""
    forever = config.checkpoint.keep_every_steps
    best = 1 if config.evaluation.every_samples else 0
    return config.checkpoint.keep + 1 + best + (steps // forever if forever else 0)


def tokens_of_item(stage: StageConfig, modality: Modality, frame_tokens: float) -> float:
    """Returns the approximate number of tokens of an item. A video is assumed to have `video_frames` frames.

    Args: frame_tokens: tokens of the image, or of one frame, at its native size.
    """
    rule, steps = _rule(stage, modality), _steps(stage, modality)
    if rule.size_px is not None:
        return float(rule.largest_item(steps * TUBELET))
    return min(max(frame_tokens * steps, rule.min_tokens), rule.max_tokens)


def _pack_size(stage: StageConfig, encoder: EncoderConfig, modality: Modality, means: Means) -> PackSize:
    rule, steps = _rule(stage, modality), _steps(stage, modality)
    largest = rule.largest_item(steps * TUBELET)
    smallest = (rule.size_px // PATCH) ** 2 if rule.size_px is not None else min(rule.min_tokens, largest)
    mean = float(largest) if smallest == largest else means.get((stage.name, modality))
    fits = [max(1, int(_items(stage, encoder, tokens))) for tokens in (largest, smallest)]
    expected = (
        None if mean is None else min(_items(stage, encoder, mean), float(fits[1]))
    )  # packs of one size round down
    return PackSize(modality, (smallest, largest), (fits[0], fits[1]), mean, expected)


def _items(stage: StageConfig, encoder: EncoderConfig, tokens: float) -> float:
    """Returns how many items of `tokens` tokens fit into a pack, as a fraction."""
    count = stage.token_budget / tokens
    if isinstance(stage.cost_budget_tflops, float):  # auto leaves packs nearly full
        cost = item_cost(tokens, scale_for_dropout(cost_coefficients(encoder), stage.patch_dropout))
        count = min(count, stage.cost_budget_tflops * TERA / cost)
    return count


def _rule(stage: StageConfig, modality: Modality) -> ResolutionConfig:
    return stage.image if modality == "image" else stage.video


def _steps(stage: StageConfig, modality: Modality) -> int:
    """Returns the tokens along time of an image, or of a video with all its frames."""
    return 1 if modality == "image" else stage.video_frames // TUBELET


def _range(limits: tuple[int, int], mean: float | None) -> str:
    if limits[0] == limits[1]:
        return f"{limits[0]:,}"
    known = "" if mean is None else f" (about {mean:,.0f})"
    return f"{limits[0]:,}-{limits[1]:,}{known}"


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
