"""Chooses the encoder, the processes, the size rules and the token budgets of a drafted run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.stage import ResolutionConfig
from univitar_ds.drafting.facts import Facts
from univitar_ds.drafting.machine import Machine
from univitar_ds.errors import ConfigError
from univitar_ds.geometry import PATCH, TUBELET, Modality
from univitar_ds.model.config import PRESETS
from univitar_ds.planning.memory import Kernels, backward_bytes, kept_bytes
from univitar_ds.planning.sizes import amount

GB = 1e9
_PROCESS_BYTES = 1.5 * GB
"""Memory of a process and its decoding process before the model (measured on a CPU)."""
_CAPTIONED_PAIRS = 40
"""Pairs of a step on a CPU, as in the recipe photos, whose results are measured."""
_STEPS_PER_EPOCH = 5
"""Minimum number of steps per epoch, and of packs of each modality in an epoch of a lane. With fewer, larger ones the
same negatives would repeat, and packs would not be full, because a pack has each sample once (simulated: with 2, up to
an eighth of the packs are less than 90 % full; with 4, 1 of 13,000, but more if lanes take turns with few tars)."""
_SMALLER_PACKS = 0.3
"""Minimum size of packs that are smaller for the sake of few videos, as a share of those without videos."""
_LARGEST_STEP = 32_768
"""Pairs of a step in the full recipes."""


@dataclass(frozen=True)
class Budget:
    """Tokens of a pack, lanes and processes. `checkpointing`: whether every block is recomputed in the backward pass;
    `mean`: expected tokens of an image, or of a video if there are no images; `deepspeed`: the name of the DeepSpeed
    JSON that fits the machine."""

    tokens: int
    lanes: int
    processes: int
    checkpointing: bool
    mean: float
    deepspeed: str

    @property
    def pairs(self) -> int:
        """Expected items of a step."""
        return max(1, round(self.tokens / self.mean)) * self.lanes


@dataclass(frozen=True)
class Basis:
    """The basis of a draft. `size`: name of the encoder; `given`: whether the user has chosen it."""

    facts: Facts
    machine: Machine
    size: str
    given: bool

    @property
    def encoder(self) -> EncoderConfig:
        return PRESETS[self.size]

    @property
    def small(self) -> bool:
        return self.size == "tiny"

    @property
    def on_gpu(self) -> bool:
        return self.machine.gpus > 0

    @property
    def classifies(self) -> bool:
        """Whether the run learns labels, because there are no captions."""
        return not self.facts.captions

    @cached_property
    def image(self) -> ResolutionConfig:
        return image_rule(self)

    @cached_property
    def frames(self) -> int:
        return video_frames(self)

    @cached_property
    def video(self) -> ResolutionConfig:
        return video_rule(self)

    @cached_property
    def budget(self) -> Budget:
        return budget_of(self)

    @cached_property
    def videos(self) -> bool:
        """Whether the run reads videos: only if they fill packs of about the size of those of images, or there are no
        images."""
        count = self.facts.count("video")
        if not self.images or count < _STEPS_PER_EPOCH * processes_of(self):
            return count > 0 and not self.images
        return tokens_of_share(self, "video") >= _SMALLER_PACKS * wanted_tokens(self)

    @property
    def modalities(self) -> list[Modality]:
        """The modalities that the run reads."""
        return [kind for kind, used in (("image", self.images), ("video", self.videos)) if used]

    @property
    def images(self) -> bool:
        return self.facts.count("image") > 0

    @property
    def modality(self) -> Modality:
        """The modality whose items set the budget."""
        return "image" if self.images else "video"


def basis_of(facts: Facts, machine: Machine, size: str | None) -> Basis:
    """Returns the basis of a draft, with the encoder that fits data and machine unless `size` names one."""
    count = facts.samples
    fits = "1b" if count >= 1_000_000_000 else "0.6b" if count >= 100_000_000 else "0.3b"
    fits = fits if machine.gpus and count >= 1_000_000 else "tiny"
    return Basis(facts, machine, size or fits, size is not None)


def processes_of(basis: Basis) -> int:
    """Returns the number of processes: one for a GPU; on a CPU two, or more for many cores; at most a fifth of the
    samples."""
    cores = basis.machine.cores
    wanted = basis.machine.gpus or (min(2, cores) if cores < 16 else min(cores // 8, 8))
    return max(1, min(wanted, basis.facts.samples // _STEPS_PER_EPOCH))


def image_rule(basis: Basis) -> ResolutionConfig:
    """Returns the size rule of images: as published for large encoders, smaller for `tiny` and for small images."""
    least, most, cell = _limits(basis)
    seen = basis.facts.native_tokens("image", 0.95)
    cells = (cell // PATCH) ** 2
    if seen is not None:
        most = min(most, max(4 * cells, math.ceil(seen / cells) * cells))
    low = basis.facts.native_tokens("image", 0.05)
    if low is not None and not basis.small:
        least = min(least, max(4 * cells, math.floor(low / cells) * cells))
    return ResolutionConfig(min_tokens=min(least, most), max_tokens=most, divisor_px=cell)


def _limits(basis: Basis) -> tuple[int, int, int]:
    """Returns (minimum tokens, maximum tokens, divisor in pixels) of images, not adapted to the sizes of the data."""
    if not basis.small:
        return 576, 5832, 112
    return (64, 576, 28) if basis.on_gpu else (16, 144, 14)


def video_frames(basis: Basis) -> int:
    """Returns the maximum number of frames: 8, or 16 for large encoders, but at most the data's 90th percentile."""
    most = 8 if basis.small else 16
    counts = sorted(size.frames for size in basis.facts.media("video"))
    longest = counts[int(0.9 * (len(counts) - 1))] if counts else most
    return max(TUBELET, min(most, longest // TUBELET * TUBELET))


def video_rule(basis: Basis) -> ResolutionConfig:
    """Returns the size rule of videos over all their frames, with a lower maximum for small videos."""
    if not basis.small:
        least, most, cell = 576, 5832, 112
    else:
        least, most, cell = (64, 1024, 28) if basis.on_gpu else (64, 256, 14)
    seen = basis.facts.native_tokens("video", 0.95)
    if seen is not None:
        most = min(most, max(least, math.ceil(seen * basis.frames / TUBELET)))
    return ResolutionConfig(min_tokens=least, max_tokens=most, divisor_px=cell)


def mean_of(basis: Basis, modality: Modality) -> float:
    """Returns the expected tokens of an item."""
    if modality == "image":
        return basis.facts.mean_tokens("image", basis.image.rule())
    return basis.facts.mean_tokens("video", basis.video.rule(), basis.frames)


def largest_item(basis: Basis) -> int:
    """Returns the tokens of the largest item that the size rules allow."""
    rules = [(basis.image, basis.images, 1), (basis.video, basis.videos, basis.frames)]
    return max(rule.largest_item(frames) for rule, used, frames in rules if used)


def tokens_of_share(basis: Basis, modality: Modality) -> float:
    """Returns the tokens of a pack of which an epoch of a process has `_STEPS_PER_EPOCH`."""
    share = max(1, basis.facts.count(modality) // _STEPS_PER_EPOCH) / processes_of(basis)
    return share * mean_of(basis, modality)


def wanted_tokens(basis: Basis) -> float:
    """Returns the tokens of a pack that the images are enough for, or the videos if there are no images."""
    mean = mean_of(basis, basis.modality)
    on_gpu = 16_384.0 if basis.small else 32_768.0
    wanted = on_gpu if basis.on_gpu else _CAPTIONED_PAIRS / processes_of(basis) * mean
    return min(wanted, tokens_of_share(basis, basis.modality))


def budget_of(basis: Basis) -> Budget:
    """Returns the budget of a pack and the lanes.

    Raises: ConfigError if the machine has too little memory for the encoder.
    """
    processes, mean = processes_of(basis), mean_of(basis, basis.modality)
    least = largest_item(basis)
    wanted = min(wanted_tokens(basis), *(tokens_of_share(basis, modality) for modality in basis.modalities))
    wanted = max(least, wanted)
    deepspeed, free = _states(basis, processes)
    per_token = _bytes_per_token(basis, every=0)
    checkpointing = wanted * per_token > free
    if checkpointing:
        per_token = _bytes_per_token(basis, every=1)
    fits = free / per_token
    if fits < least:
        raise _too_large(basis, processes, f"one item of {least:,} tokens needs {amount(least * per_token)} more")
    tokens = max(least, math.ceil(min(wanted, fits) / 10) * 10 if wanted < fits else math.floor(fits / 10) * 10)
    lanes = processes
    if basis.on_gpu and not basis.classifies:
        step = max(1, round(tokens / mean)) * processes
        target = min(_LARGEST_STEP, basis.facts.samples // 50)
        packs = min(tokens_of_share(basis, modality) for modality in basis.modalities) / tokens
        lanes *= max(1, min(8, target // step, int(packs)))
    return Budget(tokens, lanes, processes, checkpointing, mean, deepspeed)


def _bytes_per_token(basis: Basis, every: int) -> float:
    """Returns the bytes of activations per token of a pack: fp32 on a CPU, bf16 on a GPU."""
    encoder, width = basis.encoder, 2 if basis.on_gpu else 4
    kernels: Kernels = "fused" if basis.on_gpu else "plain" if basis.small else "compiled"
    kept = kept_bytes(encoder, every, width=width, kernels=kernels)
    return kept + backward_bytes(encoder, every, width=width, kernels=kernels)


def _states(basis: Basis, processes: int) -> tuple[str, float]:
    """Returns the name of the DeepSpeed JSON, and the bytes of memory of a process for activations.

    Raises: ConfigError if weights and optimizer states take more memory than there is.
    """
    parameters = basis.encoder.parameter_count() * (1.0 if basis.classifies else 1.3)  # the text tower
    if not basis.on_gpu:
        # Weights, gradients and optimizer states, and three copies in the update (`planning.memory`).
        free = 0.6 * basis.machine.memory / processes - _PROCESS_BYTES - 32 * parameters / processes
        if free <= 0:
            raise _too_large(basis, processes, f"weights, gradients and optimizer need {amount(32 * parameters)}")
        return "zero3_cpu", free
    memory = 0.8 * basis.machine.gpu_memory
    whole = 6 * parameters + 12 * parameters / processes  # weights and gradients, and sharded optimizer states
    if whole < 0.3 * memory:
        return "zero2", memory - whole
    shared = 18 * parameters / processes
    if shared < 0.6 * memory:
        return "zero3", memory - shared
    offloaded = 6 * parameters / processes
    if offloaded < 0.6 * memory:
        return "zero3_offload", memory - offloaded
    raise _too_large(basis, processes, f"weights, gradients and optimizer need {amount(18 * parameters)}")


def _too_large(basis: Basis, processes: int, what: str) -> ConfigError:
    machine = basis.machine
    has = f"{machine.gpus} GPUs of {amount(machine.gpu_memory)}" if basis.on_gpu else amount(machine.memory)
    remedy = "give a smaller --size" if not basis.small else "use a machine with more memory"
    return ConfigError(f"encoder {basis.size}: {what}, and this machine has {has} for {processes} processes; {remedy}")
