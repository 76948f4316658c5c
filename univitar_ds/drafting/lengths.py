"""Chooses the stages of a drafted run: their samples, rates, warm-up and intervals."""

from __future__ import annotations

from dataclasses import dataclass

from univitar_ds.drafting.sizes import Basis, mean_of
from univitar_ds.geometry import PATCH
from univitar_ds.model.flops import cost_coefficients
from univitar_ds.screen import duration

ONE_STAGE = 10_000
"""Below this number of samples a run has one stage."""
CPU_HOURS = 1.0
"""Maximum length of a run on a CPU, unless another is given."""
_CORE_SHARE, _GPU_FLOPS = 0.55, 1e14
"""Share of a core's speed in large matrix products with which `tiny` trains (measured: 0.58 in packs of 2,640 tokens,
by the CPU time of all processes, so with decoding; less in small packs), and FLOP/s of a GPU (assumed)."""
_WARMUP = 0.08
_EPOCHS = ((100_000, 30), (1_000_000, 15), (10_000_000, 5), (100_000_000, 2))
"""Epochs by number of samples: small data needs many passes, and overfits after them."""


@dataclass(frozen=True)
class Length:
    """The length of a run. `epochs`: the same as passes over the data; `why`: the reason, for a comment."""

    samples: int
    epochs: float
    why: str


@dataclass(frozen=True)
class Stage:
    """A drafted stage. `side`: side of squares in pixels, None for native sizes; `why`: the reason, for a comment."""

    name: str
    samples: int
    side: int | None
    video_ratio: float
    lr: float
    warmup: int
    final_lr_ratio: float
    why: str


def length_of(basis: Basis, hours: float | None) -> Length:
    """Returns the length of a run: more epochs for fewer samples, but no more than fit into `hours`."""
    count = basis.facts.samples
    epochs = next((epochs for most, epochs in _EPOCHS if count < most), 1)
    samples, rate = epochs * count, samples_per_second(basis)
    least = 4 * basis.budget.pairs
    limit = hours or (None if basis.on_gpu else CPU_HOURS)
    takes = f"about {duration(samples / rate)}" + (" (assumed, not measured)" if basis.on_gpu else " on idle cores")
    if limit is None or samples <= limit * 3600 * rate:
        why = f"{epochs} epochs of {count:,} samples, {takes}; more epochs of little data overfit"
        return Length(max(samples, least), epochs, why)
    fits = max(round(limit * 3600 * rate), least)
    asked = "--hours" if hours else "for a run on a CPU"
    why = f"{fits / count:.2g} epochs in {limit:g} h ({asked}); {epochs} epochs would take {takes}"
    return Length(fits, fits / count, why)


def samples_per_second(basis: Basis) -> float:
    """Returns the estimated number of samples that all processes together train on in a second."""
    linear, square = cost_coefficients(basis.encoder)
    tokens = _mean_sample(basis)
    machine = basis.machine
    speed = machine.gpus * _GPU_FLOPS if basis.on_gpu else machine.cores * _CORE_SHARE * machine.core_flops
    repeated = 4 / 3 if basis.budget.lanes > basis.budget.processes or basis.budget.checkpointing else 1.0
    return speed / (repeated * (linear * tokens + square * tokens**2))


def _mean_sample(basis: Basis) -> float:
    """Returns the expected tokens of a sample of any modality."""
    total = sum(basis.facts.count(kind) for kind in basis.modalities)
    return sum(basis.facts.count(kind) * mean_of(basis, kind) for kind in basis.modalities) / total


def video_ratio(basis: Basis) -> float:
    """Returns the share of video steps for which each video is used as often as each image."""
    if not basis.videos:
        return 0.0
    if not basis.images:
        return 1.0
    steps = {kind: basis.facts.count(kind) * mean_of(basis, kind) for kind in ("image", "video")}
    return min(0.95, max(0.02, round(steps["video"] / sum(steps.values()), 2)))


def stages_of(basis: Basis, length: Length) -> list[Stage]:
    """Returns the stages of a run.

    Small data and data without large images get one stage with native sizes. Otherwise the first stage has squares,
    the second native sizes, and a third also videos.
    """
    rate, ratio = (1e-3 if basis.small else 5e-4), video_ratio(basis)
    side = (112 if not basis.on_gpu else 168) if basis.small else 224
    gains = basis.images and mean_of(basis, "image") > 1.2 * (side // PATCH) ** 2
    if basis.facts.samples < ONE_STAGE or not gains:
        why = (
            f"one stage: a curriculum is not worth it for fewer than {ONE_STAGE:,} samples"
            if basis.facts.samples < ONE_STAGE
            else f"one stage: squares of {side} px would not be cheaper than the native sizes"
        )
        return [_stage("native", length.samples, None, ratio, (rate, _WARMUP, 0.05), why)]
    parts = [("fixed", 0.6), ("native", 0.3), ("video", 0.1)] if ratio else [("fixed", 0.7), ("native", 0.3)]
    rates = {"fixed": (1e-3, _WARMUP, 0.1), "native": (3e-4, 0.02, 0.1), "video": (1e-4, 0.02, 0.0)}
    whys = {
        "fixed": f"first squares of {side} px, where a sample costs less",
        "native": "then native sizes",
        "video": "videos in the last stage only, as published",
    }
    return [
        _stage(
            name,
            max(2, round(share * length.samples)),
            side if name == "fixed" else None,
            min(0.5, 5 * ratio) if name == "video" else 0.0,
            rates[name],
            whys[name],
        )
        for name, share in parts
    ]


def _stage(
    name: str, samples: int, side: int | None, ratio: float, rates: tuple[float, float, float], why: str
) -> Stage:
    """Returns a stage. Args: rates: learning rate; shares of the samples for warm-up, and of the rate at the end."""
    lr, warmup, final = rates
    return Stage(name, samples, side, ratio, lr, min(round(warmup * samples), samples - 1), final, why)


def checkpoint_steps(basis: Basis, length: Length) -> int:
    """Returns the steps between checkpoints: about five minutes or a quarter of the run, within 10 to 1,000 steps.

    The last one within the run is about half an interval before its end, where one more is written, so that this does
    not wait for the other.
    """
    seconds = basis.budget.pairs / samples_per_second(basis)
    steps = length.samples / basis.budget.pairs
    every = max(10.0, min(1000.0, 300 / seconds, steps / 4))
    return max(1, round(steps / (max(0, round(steps / every - 0.5)) + 0.5)))
