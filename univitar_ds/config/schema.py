"""The run file: everything that changes the result of a run, checked where it is declared.

One YAML is one run. What changes only how fast or in how much memory it runs (ZeRO stage, precision,
buckets, offload) lives in the DeepSpeed JSON that `deepspeed` names; see `config/deepspeed.py`.
The unit of a number is the suffix of its name: `_samples`, `_steps`, `_px`, `_tokens`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from univitar_ds.geometry import PATCH, TUBELET, Resolution

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DropRate = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
EncoderSize = Literal["tiny", "0.3b", "0.6b", "1b"]
Modality = Literal["image", "video"]
Part = Literal["text", "vision", "patch_embedding"]


class Section(BaseModel):
    """A part of the run file: unknown keys are faults, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_templates(templates: list[str]) -> None:
    """Raises: ValueError for sentences without one place for the label."""
    bad = [text for text in templates if text.count("{}") != 1]
    if bad:
        raise ValueError(f"a template holds the label once, as {{}}; these do not: {bad}")


class TextConfig(Section):
    """The text tower: a CLIP-style causal transformer from scratch, or weights from a local folder."""

    path: str | None = Field(None, description="folder of a transformers text model and its tokenizer.json")
    hidden_size: Positive = 256
    layers: Positive = 4
    heads: Positive = 4
    intermediate_size: Positive = 1024
    context_length: Annotated[int, Field(ge=4)] = Field(48, description="longest caption in text tokens")
    vocab_size: Annotated[int, Field(ge=260)] = Field(
        8192, description="upper limit when the tokenizer is trained; 256 bytes and 4 marks are the least"
    )
    tokenizer: str | None = Field(None, description="tokenizer.json; trained on the captions when absent")
    frozen: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> TextConfig:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by heads {self.heads}")
        return self


class ModelConfig(Section):
    """Both towers and what joins them."""

    encoder: EncoderSize = "tiny"
    init_from: str | None = Field(None, description="folder of a released or exported encoder to start from")
    layer_scale_init: Annotated[float, Field(gt=0)] = 0.1
    attention: Literal["auto", "flash", "flash2", "flash3", "flash4", "varlen", "sdpa"] = Field(
        "auto", description="flash: the best flash-attn installed, or its version; varlen: torch; sdpa: item by item"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="token-wise operations compiled on a CPU; auto: for encoders that gain more than compiling costs",
    )
    checkpoint_every: Annotated[int, Field(ge=0)] = Field(
        0, description="activation checkpointing: 0 none, 1 every block, k every k-th block"
    )
    pool_heads: Positive = Field(4, description="heads of the attention pooling")
    embed_dim: Positive = 256
    logit_scale_init: Annotated[float, Field(gt=0)] = 10.0
    logit_bias_init: float = -10.0
    text: TextConfig = TextConfig()


class SourceConfig(Section):
    """Shards to read: a folder packed by `univitar-ds data pack`, one tar, or a brace range of tars, local or s3://."""

    path: str
    split: str | None = Field("train", description="split of a packed folder; not used for bare tars")
    name: str | None = Field(None, description="what stages.N.weights calls it; the last part of the path when absent")
    templates: list[str] = Field(
        default_factory=list, description="captions for samples that have a label only, which goes in at {}"
    )

    @model_validator(mode="after")
    def _templates_hold_the_label(self) -> SourceConfig:
        check_templates(self.templates)
        return self

    @property
    def label(self) -> str:
        """What `stages.N.weights` calls the source."""
        return self.name or self.path.rstrip("/").rpartition("/")[2]


class S3Config(Section):
    """How s3:// is reached. Credentials come from where boto3 looks: environment, profiles, instance roles."""

    endpoint_url: str | None = Field(None, description="of a store other than AWS, e.g. http://127.0.0.1:9000")
    profile: str | None = Field(None, description="a profile of ~/.aws/config")
    region: str | None = None
    idle_timeout_s: Annotated[float, Field(gt=0)] = Field(20.0, description="a connection silent for longer is redone")
    give_up_s: Annotated[float, Field(gt=0)] = Field(300.0, description="a request refused for so long ends the run")
    prefetch_shards: Annotated[int, Field(ge=0)] = Field(1, description="shards fetched ahead in each lane")


class CacheConfig(Section):
    """Local copies of remote shards."""

    folder: str | None = Field(None, description="kept between runs and shared by processes; absent: private, removed")
    limit_gb: Annotated[float, Field(gt=0)] = Field(20.0, description="the shards unused for longest go first")


class DataConfig(Section):
    """Where samples come from and how they are read."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    lanes: Positive = Field(4, description="independent streams of packs; the world size must divide it")
    workers: Annotated[int, Field(ge=0)] = Field(1, description="decoding processes per rank; 0 decodes in line")
    prefetch_packs: Positive = Field(4, description="packs decoded ahead per rank")
    pool_samples: Positive = Field(192, description="samples a lane looks ahead over when it fills a pack")
    max_image_px: Positive = Field(100_000_000, description="a frame with more pixels is a bad sample")
    decode_timeout_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="longest decoding of one clip, in seconds of CPU"
    )
    max_sample_mb: Positive = Field(1024, description="a sample with more bytes is bad")
    max_clip_s: Annotated[float, Field(gt=0)] = Field(3600.0, description="a longer clip is a bad sample")
    on_bad: Literal["skip", "fail"] = Field("skip", description="what an unreadable sample does to the run")
    max_bad_per_thousand: Annotated[int, Field(ge=0)] = Field(
        100, description="more unreadable samples of a thousand in one lane end the run"
    )
    max_bad_in_a_row: Positive = Field(64, description="more unreadable samples in a row end the run")
    worker_restarts: Annotated[int, Field(ge=0)] = Field(
        10, description="how often a decoding process that died is started again"
    )
    accept_changed_sources: bool = Field(
        False, description="resume although the shards differ from those of the checkpoint"
    )
    s3: S3Config = S3Config()
    cache: CacheConfig = CacheConfig()
    log_samples: bool = Field(False, description="write samples-rank*.jsonl: step, lane and sample keys")


class ResolutionConfig(Section):
    """Size rule of one modality. `min_tokens` and `max_tokens` hold for a whole item, clips included."""

    kind: Literal["native", "fixed"] = "native"
    min_tokens: Positive = 576
    max_tokens: Positive = 5832
    divisor_px: Positive = 112
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
        return Resolution(self.min_tokens, self.max_tokens, self.divisor_px, self.size_px)

    def largest_item(self, frames: int) -> int:
        """Most tokens an item of `frames` frames can have."""
        steps = -(-frames // TUBELET)
        if self.size_px is not None:
            return steps * (self.size_px // PATCH) ** 2
        return max(self.max_tokens, self.min_tokens)


class ClipSampling(Section):
    """Which frames of a clip are seen."""

    kind: Literal["uniform", "fps"] = Field(
        "uniform", description="uniform: clip_frames over the whole clip; fps: so many a second, at most clip_frames"
    )
    fps: Annotated[float, Field(gt=0)] = Field(2.0, description="frames a second when kind is fps")
    jitter: bool = Field(False, description="each frame is drawn within its part of the clip, not its middle")


class Schedule(Section):
    """The weight of a loss over a stage."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    start: Annotated[float, Field(ge=0)] = 0.0
    end: Annotated[float, Field(ge=0)] | None = Field(
        None, description="what linear and cosine have reached when the stage is over"
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
        """Whether the weight is above 0 at some time of the stage."""
        return self.start > 0 or bool(self.end)


class StageConfig(Section):
    """One leg of the curriculum. Its length is counted in items over all ranks and lanes."""

    name: str
    samples: Positive
    image: ResolutionConfig = ResolutionConfig()
    video: ResolutionConfig = ResolutionConfig()
    video_ratio: Fraction = Field(0.0, description="share of steps that are all clips")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="share of samples by source name; empty: every sample once an epoch"
    )
    clip_frames: Annotated[int, Field(ge=2)] = Field(8, description="most frames taken from a clip; even")
    clip_sampling: ClipSampling = ClipSampling()
    token_budget: Positive = Field(16384, description="most tokens in a pack, those of patch_dropout too: memory")
    cost_budget_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="most forward+backward TFLOP of the encoder in a pack: time"
    )
    lr: Annotated[float, Field(gt=0)]
    warmup_samples: Annotated[int, Field(ge=0)] = 0
    lr_schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then linear over decay_samples to final_lr_ratio"
    )
    decay_samples: Annotated[int, Field(ge=0)] = Field(0, description="length of the fall when lr_schedule is wsd")
    final_lr_ratio: Fraction = Field(0.0, description="learning rate at the stage's end, of its peak")
    contrastive: Schedule = Field(Schedule(start=1.0), description="weight of the contrastive loss")
    distill: Schedule = Field(Schedule(), description="weight of the distillation; 0: the teacher is not run")
    frozen: list[Part] = Field(
        default_factory=list, description="parts that do not learn in this stage; vision is the whole encoder"
    )
    checkpoint_every: Annotated[int, Field(ge=0)] | None = Field(
        None, description="activation checkpointing in this stage; absent: model.checkpoint_every"
    )
    patch_dropout: DropRate = Field(
        0.0, description="share of each item's tokens that the encoder does not see in training; one always stays"
    )
    stochastic_depth: DropRate = Field(
        0.0, description="how probably the last block adds nothing to an item in training; 0 at the first, even between"
    )

    @model_validator(mode="after")
    def _fits(self) -> StageConfig:
        faults = []
        if self.clip_frames % TUBELET:
            faults.append(f"clip_frames {self.clip_frames} is not a multiple of {TUBELET}")
        if self.warmup_samples >= self.samples:
            faults.append(f"warmup_samples {self.warmup_samples} must be below samples {self.samples}")
        if (self.lr_schedule == "wsd") != (self.decay_samples > 0):
            faults.append(
                f"lr_schedule {self.lr_schedule} with decay_samples {self.decay_samples}: "
                + ("wsd needs decay_samples above 0" if self.lr_schedule == "wsd" else "they belong to wsd")
            )
        if self.warmup_samples + self.decay_samples > self.samples:
            faults.append(
                f"warmup_samples {self.warmup_samples} and decay_samples {self.decay_samples} together exceed "
                f"samples {self.samples}"
            )
        if not self.contrastive.ever and not self.distill.ever:
            faults.append("contrastive and distill both weigh 0 throughout: nothing is learned; raise one")
        used = {"image": self.video_ratio < 1, "video": self.video_ratio > 0}
        for modality, frames in (("image", 1), ("video", self.clip_frames)):
            rule: ResolutionConfig = getattr(self, modality)
            if used[modality] and rule.largest_item(frames) > self.token_budget:
                faults.append(
                    f"{modality}: an item may have {rule.largest_item(frames)} tokens but token_budget is "
                    f"{self.token_budget}; raise token_budget or lower {modality}.max_tokens"
                )
            steps = -(-frames // TUBELET)
            if used[modality] and rule.kind == "native" and steps * (rule.divisor_px // PATCH) ** 2 > rule.max_tokens:
                faults.append(
                    f"{modality}.divisor_px {rule.divisor_px} gives at least "
                    f"{steps * (rule.divisor_px // PATCH) ** 2} tokens an item, above max_tokens {rule.max_tokens}"
                )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def resolution(self, modality: Modality) -> Resolution:
        return (self.image if modality == "image" else self.video).rule()


class TeacherConfig(Section):
    """A frozen vision model whose features the encoder is to match, and how."""

    path: str = Field(
        description="folder or hub name of a DINOv2, DINOv3, SigLIP or SigLIP 2 model, or folder of an exported encoder"
    )
    dtype: Literal["bf16", "fp32"] = "bf16"
    patch_loss: Literal["cosine", "smooth_l1"] = "cosine"
    pooled_loss: Literal["cosine", "smooth_l1"] = "cosine"
    patch_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="times the weight of the stage")
    pooled_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="times the weight of the stage")
    partitioned: bool = Field(False, description="each rank holds its share of the weights; else all of them")
    cache: str | None = Field(
        None, description="folder for features, 2 to 4 bytes times the teacher's width a token; nothing is evicted"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TeacherConfig:
        if self.partitioned and self.cache is not None:
            raise ValueError(
                f"cache {self.cache} lets ranks skip the teacher at different steps, which partitioned cannot follow; "
                "choose one"
            )
        if not self.patch_weight and not self.pooled_weight:
            raise ValueError("patch_weight and pooled_weight are both 0; raise one or remove the teacher")
        return self


class ObjectiveConfig(Section):
    """The contrastive objective, and the distillation beside it."""

    kind: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="sigmoid for the recipe; softmax settles faster with a few dozen items a step"
    )
    chunk: Positive = Field(1024, description="texts compared at a time: memory of the loss")
    same_caption_positive: bool = Field(False, description="identical captions in one step count as positives")
    teacher: TeacherConfig | None = Field(None, description="what stages.N.distill weighs")


class OptimizerConfig(Section):
    """AdamW; the learning rate belongs to the stage."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="each block of the encoder learns at this share of the rate of the block above it"
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="of an average of the weights, e.g. 0.9999; it is evaluated and exported in their place"
    )


class GuardConfig(Section):
    """What is done about a step that went wrong: back to the last checkpoint, and on behind the data that did it."""

    max_rollbacks: Annotated[int, Field(ge=0)] = Field(3, description="in a run; one more ends it")
    spike_deviations: Annotated[float, Field(gt=0)] | None = Field(
        20.0, description="a loss or gradient norm so many robust deviations above its recent median; null: never"
    )
    window_steps: Annotated[int, Field(ge=8)] = Field(
        64, description="steps of the same stage and modality that a median is taken of"
    )
    min_steps: Annotated[int, Field(ge=4)] = Field(32, description="of them, before anything counts as a spike")

    @model_validator(mode="after")
    def _window_holds_enough(self) -> GuardConfig:
        if self.min_steps > self.window_steps:
            raise ValueError(f"min_steps {self.min_steps} exceeds window_steps {self.window_steps}")
        return self


class CheckpointConfig(Section):
    """When state is saved and how many saves are kept."""

    every_steps: Positive = 200
    keep: Positive = 2


class EvaluationConfig(Section):
    """What is measured on held-out data once training has ended."""

    sources: list[SourceConfig] = Field(default_factory=list, description="empty: nothing is evaluated")
    token_budget: Positive = 8192
    image_templates: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["{}"], description="sentences that zero-shot puts a picture's label in, at {}"
    )
    video_templates: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["{}"], description="the same for the label of a clip"
    )

    @model_validator(mode="after")
    def _templates_hold_the_label(self) -> EvaluationConfig:
        check_templates(self.image_templates + self.video_templates)
        return self


class LoggingConfig(Section):
    """What is written while training."""

    every_steps: Positive = 10
    tensorboard: bool = True
    pictures_every_steps: Annotated[int, Field(ge=0)] = Field(
        200, description="items of a pack and their patch features as colours, in TensorBoard; 0: none"
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of one rank, for MFU; measured once at the start when absent"
    )


class RunConfig(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: str = Field("runs", description="folder that holds the run's folder")
    seed: Annotated[int, Field(ge=0)] = 0
    deepspeed: str = Field("zero3_cpu", description="a name from ds_configs/ or the path of a JSON")
    model: ModelConfig = ModelConfig()
    data: DataConfig
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _stage_names_differ(self) -> RunConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages need different names, got {names}")
        return self

    @model_validator(mode="after")
    def _distillation_has_a_teacher(self) -> RunConfig:
        names = [stage.name for stage in self.stages if stage.distill.ever]
        if names and self.objective.teacher is None:
            raise ValueError(f"stages {names} distill, but from whom? set objective.teacher.path or remove distill")
        return self

    @model_validator(mode="after")
    def _weights_name_sources(self) -> RunConfig:
        labels = [source.label for source in self.data.sources]
        faults = []
        for stage in self.stages:
            if not stage.weights:
                continue
            unknown = sorted(set(stage.weights) - set(labels))
            if unknown:
                faults.append(f"stage {stage.name}: weights name {unknown}, the sources are {labels}")
            if not any(stage.weights.values()):
                faults.append(f"stage {stage.name}: all weights are 0; give at least one source a share")
            if len(set(labels)) < len(labels):
                faults.append(f"stage {stage.name} has weights, so sources need different names, got {labels}")
        if faults:
            raise ValueError("; ".join(faults))
        return self
