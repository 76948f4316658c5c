"""The run file: everything that changes the result of a run, checked where it is declared.

One YAML is one run. What changes only how fast or in how much memory it runs (ZeRO stage, precision,
buckets, offload) belongs to the DeepSpeed JSON that `deepspeed` names; see `config/deepspeed.py`.
The unit of a number is the suffix of its name: `_samples`, `_steps`, `_px`, `_tokens`. Paths may hold `~` and
`$VARIABLES`; a relative one starts in the folder where the run was started. See `config/paths.py`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.model import ModelConfig, ObjectiveConfig
from univitar_ds.config.paths import PathText
from univitar_ds.config.section import Fraction, Positive, Section, check_templates
from univitar_ds.config.stage import StageConfig


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
        None,
        description="decay of an average of the weights, e.g. 0.9999, which is evaluated and exported instead",
    )


class GuardConfig(Section):
    """How a bad step is handled: the run returns to the last checkpoint and continues after the data that caused it."""

    max_rollbacks: Annotated[int, Field(ge=0)] = Field(3, description="per run; one more ends the run")
    spike_deviations: Annotated[float, Field(gt=0)] | None = Field(
        20.0, description="a loss or gradient norm so many robust deviations above its recent median; null: never"
    )
    window_steps: Annotated[int, Field(ge=8)] = Field(
        64, description="steps of the same stage and modality over which the median is taken"
    )
    min_steps: Annotated[int, Field(ge=4)] = Field(32, description="steps before anything counts as a spike")

    @model_validator(mode="after")
    def _window_holds_enough(self) -> GuardConfig:
        if self.min_steps > self.window_steps:
            raise ValueError(f"min_steps {self.min_steps} exceeds window_steps {self.window_steps}")
        return self


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every_steps: Positive = 200
    keep: Positive = 2


class EvaluationConfig(Section):
    """What is measured on held-out data after training."""

    sources: list[SourceConfig] = Field(default_factory=list, description="empty: nothing is evaluated")
    token_budget: Positive = 8192
    image_templates: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["{}"], description="sentences for zero-shot; an image's label replaces {}"
    )
    video_templates: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["{}"], description="the same for the label of a video"
    )

    @model_validator(mode="after")
    def _templates_hold_the_label(self) -> EvaluationConfig:
        check_templates(self.image_templates + self.video_templates)
        return self


class LoggingConfig(Section):
    """What is written while training."""

    every_steps: Positive = 10
    tensorboard: bool = True
    images_every_steps: Annotated[int, Field(ge=0)] = Field(
        200, description="interval of TensorBoard images of a pack and its patch features as colours; 0: none"
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak of one rank, for MFU; absent: measured once at the start"
    )


class RunConfig(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: PathText = Field("runs", description="folder that holds the run's folder")
    seed: Annotated[int, Field(ge=0)] = 0
    deterministic: bool = Field(
        False, description="the same step gives the same bits on GPUs too; attention's backward pass is slower"
    )
    deepspeed: PathText = Field("zero3_cpu", description="a name from ds_configs/ or the path of a JSON")
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
            raise ValueError(f"stages {names} distill without a teacher; set objective.teacher.path or remove distill")
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
