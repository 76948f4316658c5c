"""The arms of bench_recipe.py: what each run trains on, as a run file, and how many tokens it is expected to take.

A pack has one modality and is filled up to the token budget. So the tokens of a sample, averaged over a run, follow
from the sizes of the data, the size rules and the share of steps with videos. Arms that are compared at equal tokens
are configured from these expected values, and the table shows the tokens that the runs have counted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from univitar_ds.config.load import read_yaml, recipe_path
from univitar_ds.geometry import Resolution, token_count

DESIGN = 2
"""Version of the arms. Rows of another version are not compared with those of this one."""
SHARES = (0.2, 0.2, 0.6)
"""Share of the samples in each stage of the curriculum. The last stage has all videos."""
VIDEO_SHARE = 0.4
"""Share of the steps with videos in the arms `fixed` and `curriculum`."""
VIDEO_RATIO = 0.3
"""Share of the steps with videos in the arms of one native stage that do not vary it."""
FRAMES = 8
"""Frames of a video. Those of the scenes have at least as many."""
FILL = 0.985
"""Share of a token budget that packs of native sizes fill, measured; only the expected tokens depend on it."""
MARGIN = 0.05
"""Maximum difference of the tokens of two arms that are compared at equal tokens."""
TEACHER_TIMES = 4
"""Length of the teacher's training, in lengths of the arms'."""
TEACHER_SEED = 100
"""Seed of the teacher and of the scenes that it is trained on: similar data, but no common samples."""

Size = tuple[int, int]
Shape = Literal["fixed", "square", "native", "curriculum"]


@dataclass(frozen=True)
class Data:
    """Packed data with the splits train and test, and the (height, width) of the items of train in pixels."""

    name: str
    shards: Path
    images: tuple[Size, ...]
    videos: tuple[Size, ...]
    recipe: str = "demo"
    """Recipe with the text tower and the templates that fit the data."""


@dataclass(frozen=True)
class Arm:
    """One configuration. Its run has `samples` samples, or as many as take the tokens of the arm `tokens_of`."""

    shape: Shape
    video_ratio: float = VIDEO_RATIO
    objective: str = "softmax"
    lanes: int = 1
    distilled: bool = False
    logit_bias: float | None = None
    """Bias of the logits at the start; None: that of the model."""
    tokens_of: str | None = None


ARMS = {
    "fixed": Arm("fixed", VIDEO_SHARE),
    "curriculum": Arm("curriculum", VIDEO_SHARE),
    "curriculum-tokens": Arm("curriculum", VIDEO_SHARE, tokens_of="fixed"),
    "native": Arm("native"),
    "square": Arm("square"),
    "video-0": Arm("native", 0.0),
    "video-0.1": Arm("native", 0.1),
    "video-0.6": Arm("native", 0.6),
    "sigmoid": Arm("native", objective="sigmoid"),
    "sigmoid-bias": Arm("native", objective="sigmoid", logit_bias=-3.0),
    "softmax-4": Arm("native", lanes=4),
    "sigmoid-4": Arm("native", objective="sigmoid", lanes=4),
    "distilled": Arm("curriculum", VIDEO_SHARE, distilled=True),
}
TEACHER = Arm("native", 0.5, lanes=2)
PHOTO_ARMS = ("fixed", "curriculum", "curriculum-tokens", "native", "square", "sigmoid", "softmax-4", "sigmoid-4")
"""Arms on photos: none with videos, and none with a teacher, because there are no other photos to train it on."""

_SQUARE_PX = {"image": 112, "video": 70}
_NATIVE_LEAST = {"image": 16, "video": 32}
_CURRICULUM = {
    "image": {"min_tokens": 16, "max_tokens": 100, "divisor_px": 14},
    "video": {"min_tokens": 32, "max_tokens": 144, "divisor_px": 14},
}
_FIXED = {"image": {"kind": "fixed", "size_px": 140}, "video": {"kind": "fixed", "size_px": 84}}
_SMALL = {"image": {"kind": "fixed", "size_px": 84}}
_FRAMES = {"image": 1, "video": FRAMES}


@dataclass(frozen=True)
class Plan:
    """Length of an arm's run, and its stages as in a run file."""

    samples: int
    steps: float
    """Expected number of steps."""
    tokens: float
    """Expected number of tokens."""
    stages: list[dict[str, Any]] = field(repr=False)


def plan(arm: Arm, data: Data, samples: int) -> Plan:
    """Returns the stages of an arm. Args: samples: of an arm that is not to have the tokens of another one."""
    if arm.tokens_of is not None:
        wanted = plan(ARMS[arm.tokens_of], data, samples).tokens
        here = _planned(arm, data, samples)
        samples = round(samples * wanted / here.tokens)
    return _planned(arm, data, samples)


def run_file(name: str, arm: Arm, data: Data, samples: int, seed: int, teacher: Path | None = None) -> dict[str, Any]:
    """Returns the run file of an arm: the recipe of the data with other stages. Its `output` is to be set."""
    config = read_yaml(recipe_path(data.recipe))
    planned = plan(arm, data, samples)
    config |= {
        "name": name,
        "seed": seed,
        "stages": planned.stages,
        "checkpoint": {"every_steps": max(math.ceil(planned.steps / 8), 1), "keep": 100},
        "logging": {"images_every_steps": 0},
    }
    config["objective"] = {"kind": arm.objective, "same_caption_positive": True}
    if arm.logit_bias is not None:
        config["model"]["logit_bias_init"] = arm.logit_bias
    if arm.distilled:
        config["objective"]["teacher"] = {"path": str(teacher)}
    config["data"] |= {"sources": [{"path": str(data.shards), "split": "train"}], "lanes": arm.lanes}
    config["evaluation"] |= {"sources": [{"path": str(data.shards), "split": "test"}]}
    return config


def mean_tokens(rule: dict[str, Any], sizes: Sequence[Size], frames: int) -> float:
    """Returns the mean number of tokens of items. Args: rule: `image` or `video` of a stage."""
    resolution = Resolution(
        rule.get("min_tokens", 1), rule.get("max_tokens", 1), rule.get("divisor_px", 14), rule.get("size_px")
    )
    return sum(token_count(resolution.grid(*size, frames)) for size in sizes) / len(sizes)


@functools.cache
def native_like(tokens: int, sizes: tuple[Size, ...], modality: Literal["image", "video"]) -> dict[str, Any]:
    """Returns the native size rule whose mean number of tokens is nearest to `tokens`."""
    rules = (
        {"min_tokens": _NATIVE_LEAST[modality], "max_tokens": most, "divisor_px": 14}
        for most in range(max(tokens, _NATIVE_LEAST[modality]), 3 * tokens)
    )
    return min(rules, key=lambda rule: abs(mean_tokens(rule, sizes, _FRAMES[modality]) - tokens))


def _planned(arm: Arm, data: Data, samples: int) -> Plan:
    stages = list(_stages(arm, data, samples))
    counts = [_of_step(stage, data) for stage in stages]
    steps = [stage["samples"] / (items * arm.lanes) for stage, (items, _) in zip(stages, counts, strict=True)]
    tokens = [count * each * arm.lanes for count, (_, each) in zip(steps, counts, strict=True)]
    return Plan(samples, sum(steps), sum(tokens), stages)


def _of_step(stage: dict[str, Any], data: Data) -> tuple[float, float]:
    """Returns the expected numbers of items and of tokens in a pack, averaged over the steps of a stage."""
    items, tokens = 0.0, 0.0
    ratio = stage.get("video_ratio", 0.0)
    for modality, sizes, share in (("image", data.images, 1 - ratio), ("video", data.videos, ratio)):
        if not share:
            continue
        each = mean_tokens(stage[modality], sizes, _FRAMES[modality])
        budget = stage["token_budget"]
        count = budget // each if "size_px" in stage[modality] else budget * FILL / each
        items, tokens = items + share * count, tokens + share * count * each
    return items, tokens


def _stages(arm: Arm, data: Data, samples: int) -> Iterator[dict[str, Any]]:
    demo = read_yaml(recipe_path("demo"))["stages"][0]
    common = {key: demo[key] for key in ("video_frames", "token_budget", "lr", "final_lr_ratio")}
    warmup = samples // 10
    ratio = arm.video_ratio if data.videos else 0.0
    if arm.shape != "curriculum":
        sizes = _sizes(arm.shape, data)
        yield {
            "name": arm.shape, "samples": samples, "video_ratio": ratio, "warmup_samples": warmup, **sizes, **common
        }  # fmt: skip
        return
    first, second, third = (round(samples * share) for share in SHARES)
    constant_lr = {**common, "lr_schedule": "constant"}
    constant_lr.pop("final_lr_ratio")
    last = {"video_ratio": round(ratio / SHARES[2], 3)}
    stages = [
        {"name": "small", "samples": first, "warmup_samples": warmup, **_SMALL, **constant_lr},
        {"name": "native", "samples": second, **_CURRICULUM, **constant_lr},
        {"name": "video", "samples": third, **last, **_CURRICULUM, **common},
    ]
    weights = [{"start": 1.0}, {"start": 0.5}, {"kind": "cosine", "start": 0.5, "end": 0.0}]
    for stage, weight in zip(stages, weights, strict=True):
        yield {**stage, "distill": weight} if arm.distilled else stage


def _sizes(shape: Shape, data: Data) -> dict[str, Any]:
    """Returns the size rules of an arm of one stage. Native and square items have the same mean number of tokens."""
    if shape == "fixed":
        return _FIXED
    square = {modality: {"kind": "fixed", "size_px": px} for modality, px in _SQUARE_PX.items()}
    if shape == "square":
        return square
    rules = {}
    for modality, sizes in (("image", data.images), ("video", data.videos)):
        if sizes:
            tokens = round(mean_tokens(square[modality], sizes, _FRAMES[modality]))
            rules[modality] = native_like(tokens, sizes, modality)
    return rules
