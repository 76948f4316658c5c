"""Configuration of the stages of the curriculum."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from univitar_ds.config.section import Checkpointing, DropRate, Fraction, Part, Positive, Section
from univitar_ds.geometry import PATCH, TUBELET, Modality, Resolution

CropScale = Annotated[float, Field(gt=0, le=1)]
CropRatio = Annotated[float, Field(ge=0.1, le=10)]


class ResolutionConfig(Section):
    """Size rule of one modality. Tokens are counted over a whole item: for a video, over all its frames."""

    kind: Literal["native", "fixed"] = Field(
        "native", description="native: keep the aspect ratio, with min_tokens to max_tokens; fixed: a square of size_px"
    )
    min_tokens: Positive = Field(
        576, description="minimum number of tokens of an item; a smaller one is enlarged; 576 as published"
    )
    max_tokens: Positive = Field(
        5832, description="maximum number of tokens of an item, of a video over all frames; a larger one is reduced"
    )
    divisor_px: Positive = Field(
        112,
        description="both sides become multiples of this many pixels, which must be divisible by 14; 112 as published",
    )
    size_px: Positive | None = Field(None, description="side of the square when kind is fixed")

    @model_validator(mode="after")
    def _consistent(self) -> ResolutionConfig:
        if self.kind == "fixed" and (self.size_px is None or self.size_px % PATCH):
            raise ValueError(f"kind fixed needs size_px divisible by {PATCH}, got {self.size_px}")
        if self.kind == "native":
            if self.size_px is not None:
                raise ValueError(f"size_px {self.size_px} belongs to kind fixed; remove it")
            if self.divisor_px % PATCH:
                raise ValueError(f"divisor_px {self.divisor_px} is not divisible by the patch size {PATCH}")
            if self.min_tokens > self.max_tokens:
                raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        return self

    def rule(self) -> Resolution:
        """Returns these settings as a `Resolution`."""
        return Resolution(self.min_tokens, self.max_tokens, self.divisor_px, self.size_px)

    def largest_item(self, frames: int) -> int:
        """Returns the maximum number of tokens of an item with `frames` frames."""
        steps = -(-frames // TUBELET)
        if self.size_px is not None:
            return steps * (self.size_px // PATCH) ** 2
        return max(self.max_tokens, self.min_tokens)


class VideoSampling(Section):
    """Selection of the frames of a video."""

    kind: Literal["uniform", "fps"] = Field(
        "uniform", description="uniform: video_frames frames of each video; fps: `fps` frames/s, at most video_frames"
    )
    fps: Annotated[float, Field(gt=0)] = Field(2.0, description="frames per second if kind is fps")
    jitter: bool = Field(
        False, description="draw each frame at random within its part of the video, instead of the middle frame"
    )


class AugmentConfig(Section):
    """Random changes of the images and videos of a stage, drawn for each sample and epoch; by default none.

    The order is crop, flip, colours, grey. All frames of a video get the same change, and a teacher sees the changed
    pixels. Evaluations use the original pixels.
    """

    crop_scale: tuple[CropScale, CropScale] = Field(
        (1.0, 1.0), description="smallest and largest share of the area that a crop keeps, before the size rules apply"
    )
    crop_ratio: tuple[CropRatio, CropRatio] = Field(
        (1.0, 1.0),
        description="smallest and largest width / height of a crop, relative to that of the image; 1: as the image. "
        "Drawn log-uniformly, and limited so that a crop fits into its image",
    )
    flip: Fraction = Field(
        0.0, description="probability of a horizontal flip; wrong for text in images and captions with left or right"
    )
    jitter_probability: Fraction = Field(
        1.0, description="probability that brightness, contrast, saturation and hue change, in a random order"
    )
    brightness: Fraction = Field(0.0, description="the factor is drawn from 1 - brightness to 1 + brightness")
    contrast: Fraction = Field(0.0, description="the factor is drawn from 1 - contrast to 1 + contrast")
    saturation: Fraction = Field(0.0, description="the factor is drawn from 1 - saturation to 1 + saturation")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.0, description="the hue shift is drawn from -hue to hue; 0.5 is half of the colour circle"
    )
    grey: Fraction = Field(0.0, description="probability that all pixels become grey")

    @property
    def is_off(self) -> bool:
        """Whether no sample is changed."""
        jitters = self.jitter_probability and (self.brightness or self.contrast or self.saturation or self.hue)
        return self.crop_scale[0] == 1 and not (self.flip or self.grey or jitters)

    @model_validator(mode="after")
    def _ranges(self) -> AugmentConfig:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} [{low:g}, {high:g}] has its larger end first; swap them")
        low, high = self.crop_ratio
        if not low <= 1 <= high:
            raise ValueError(f"crop_ratio [{low:g}, {high:g}] does not contain 1, the ratio of the image; widen it")
        return self


class Schedule(Section):
    """Weight of a loss over a stage."""

    kind: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="change of the weight over the samples of the stage; linear, cosine: from start to end"
    )
    start: Annotated[float, Field(ge=0)] = Field(0.0, description="value at the beginning of the stage")
    end: Annotated[float, Field(ge=0)] | None = Field(
        None, description="value of linear and cosine at the end of the stage"
    )

    @model_validator(mode="after")
    def _ends_where_it_moves(self) -> Schedule:
        if self.kind == "constant" and self.end is not None:
            raise ValueError(f"kind constant stays at start {self.start:g}; remove end {self.end:g} or change kind")
        if self.kind != "constant" and self.end is None:
            raise ValueError(f"kind {self.kind} moves from start {self.start:g} to end; add end")
        return self

    @property
    def ever(self) -> bool:
        """Whether the weight is above 0 at any step of the stage."""
        return self.start > 0 or bool(self.end)


class StageConfig(Section):
    """One stage of the curriculum. `samples` counts the items of all ranks and lanes."""

    name: str = Field(description="name of the stage in logs and metrics; stages have different names")
    samples: Positive = Field(description="number of items over all ranks; the step that reaches it is the last")
    image: ResolutionConfig = Field(ResolutionConfig(), description="size rule of images")
    video: ResolutionConfig = Field(ResolutionConfig(), description="size rule of videos")
    video_ratio: Fraction = Field(0.0, description="share of steps whose packs contain videos")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="share of samples by source name; empty: every sample once per epoch"
    )
    video_frames: Annotated[int, Field(ge=2)] = Field(8, description="maximum number of frames of a video; even")
    video_sampling: VideoSampling = Field(VideoSampling(), description="which frames of a video are used")
    augment: AugmentConfig = Field(AugmentConfig(), description="random changes of the pixels; off by default")
    token_budget: Positive = Field(
        16384, description="maximum number of tokens in a pack before patch_dropout; limits memory"
    )
    cost_budget_tflops: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        None,
        description="maximum forward+backward TFLOP of the encoder for a pack; limits time. auto: packs get about the "
        "same predicted time, with a limit computed from the first samples and data.attention_cost",
    )
    lr: Annotated[float, Field(gt=0)] = Field(
        description="learning rate of AdamW after the warm-up; not scaled by the pairs per step"
    )
    warmup_samples: Annotated[int, Field(ge=0)] = Field(
        0, description="number of samples over which the learning rate rises linearly from 0 to lr; below `samples`"
    )
    lr_schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then linear over decay_samples to final_lr_ratio"
    )
    decay_samples: Annotated[int, Field(ge=0)] = Field(0, description="length of the decay if lr_schedule is wsd")
    final_lr_ratio: Fraction = Field(0.0, description="final learning rate of the stage as a share of lr")
    contrastive: Schedule = Field(Schedule(start=1.0), description="weight of the loss of objective.kind")
    distill: Schedule = Field(Schedule(), description="weight of the distillation loss; 0: the teacher is not run")
    frozen: list[Part] = Field(
        default_factory=list, description="parts that are not trained in this stage; vision: the whole encoder"
    )
    checkpoint_every: Checkpointing | None = Field(
        None, description="activation checkpointing in this stage; values as in model.checkpoint_every, its default"
    )
    patch_dropout: DropRate = Field(
        0.0, description="share of each item's tokens that the encoder drops in training; at least one token remains"
    )
    stochastic_depth: DropRate = Field(
        0.0,
        description="probability that an item skips a branch of the last block in training; decreases linearly to 0 at "
        "the first block",
    )

    @model_validator(mode="after")
    def _fits(self) -> StageConfig:
        faults = []
        if self.video_frames % TUBELET:
            faults.append(f"video_frames {self.video_frames} is not a multiple of {TUBELET}")
        if self.warmup_samples >= self.samples:
            faults.append(f"warmup_samples {self.warmup_samples} must be below samples {self.samples}; lower it")
        elif self.warmup_samples + self.decay_samples > self.samples:
            faults.append(
                f"warmup_samples {self.warmup_samples} and decay_samples {self.decay_samples} together exceed "
                f"samples {self.samples}; lower one of them"
            )
        if (self.lr_schedule == "wsd") != (self.decay_samples > 0):
            faults.append(
                f"lr_schedule {self.lr_schedule} with decay_samples {self.decay_samples}: "
                + ("wsd needs decay_samples above 0" if self.lr_schedule == "wsd" else "remove it, or use wsd")
            )
        if not self.contrastive.ever and not self.distill.ever:
            faults.append("contrastive and distill have weight 0 in the whole stage, so nothing is learned; raise one")
        used = {"image": self.video_ratio < 1, "video": self.video_ratio > 0}
        for modality, frames in (("image", 1), ("video", self.video_frames)):
            rule: ResolutionConfig = getattr(self, modality)
            if used[modality] and rule.largest_item(frames) > self.token_budget:
                faults.append(
                    f"{modality}: an item may have {rule.largest_item(frames)} tokens but token_budget is "
                    f"{self.token_budget}; raise token_budget or lower "
                    f"{modality}.{'size_px' if rule.kind == 'fixed' else 'max_tokens'}"
                )
            steps = -(-frames // TUBELET)
            if used[modality] and rule.kind == "native" and steps * (rule.divisor_px // PATCH) ** 2 > rule.max_tokens:
                faults.append(
                    f"{modality}.divisor_px {rule.divisor_px} gives at least "
                    f"{steps * (rule.divisor_px // PATCH) ** 2} tokens an item, above max_tokens {rule.max_tokens}; "
                    "lower divisor_px or raise max_tokens"
                )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def resolution(self, modality: Modality) -> Resolution:
        return (self.image if modality == "image" else self.video).rule()
