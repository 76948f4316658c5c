"""The schema of the run file: all settings of a run except those of DeepSpeed. Each section checks its own values.

One YAML file describes one run. DeepSpeed's settings for ZeRO stage, precision, buckets and offload belong in the JSON
that `deepspeed` names; see `config/deepspeed.py`. The name of a setting with a unit usually ends in the unit:
`_samples`, `_steps`, `_px`, `_tokens`. Paths may contain `~` and `$VARIABLES`. Relative paths are relative to the
working directory in which the run was started. See `config/paths.py`.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.model import ModelConfig, ObjectiveConfig
from univitar_ds.config.paths import PathText
from univitar_ds.config.section import NAME_LIMIT, NAME_PATTERN, Positive, Section, check_templates
from univitar_ds.config.stage import StageConfig
from univitar_ds.config.watch import ProfileConfig, WatchdogConfig
from univitar_ds.errors import shortened
from univitar_ds.plugins import OBJECTIVES, OPTIMIZERS


class MuonConfig(Section):
    """Settings of Muon, with the names of torch.optim.Muon. Learning rate, weight decay and layer decay are AdamW's."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="decay rate of the mean of gradients")
    nesterov: bool = Field(True, description="Nesterov momentum: the last gradient has an additional share in the mean")
    ns_steps: Annotated[int, Field(ge=1, le=20)] = Field(
        5, description="Newton-Schulz iterations, which make the update of a matrix nearly orthogonal"
    )
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="scaling of an update by the shape of its matrix; only match_rms_adamw suits AdamW's learning "
        "rates",
    )
    lr_scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="factor of the stage's learning rate for Muon; AdamW uses the learning rate itself"
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="precision of the iterations and of the collectives that gather matrices; bf16 as in torch"
    )


class OptimizerConfig(Section):
    """Settings of the optimizer. The learning rate is a setting of the stage."""

    kind: Annotated[str, Field(pattern=NAME_PATTERN, max_length=NAME_LIMIT)] = Field(
        "adamw",
        description="adamw; muon: Muon on the matrices of blocks, AdamW on all else; or a name that a plugin registers",
        json_schema_extra={"examples": list(OPTIMIZERS)},
    )
    muon: MuonConfig = Field(MuonConfig(), description="settings of kind muon beside those of AdamW")
    options: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="arguments of a plugin's optimizer, by name"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.98),
        description="decay rates of the two moments; with 0.98 a jump of the gradient fades within about 50 steps",
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="added to the root of the second moment")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="decoupled decay of matrices; vectors (norms, biases, LayerScale, logit scale) have none"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="layer-wise decay: ratio of a block's learning rate to that of the block above; 1: none"
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="maximum 2-norm of the gradient over all ranks; a larger gradient is scaled down; null: off"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay (e.g. 0.9999) of a moving average of the weights; the average is evaluated and exported",
    )


class GuardConfig(Section):
    """Handling of bad steps. A loss or gradient that is not finite skips the update. After a spike, or too many skipped
    updates, the run returns to the last checkpoint and skips the data that were read since."""

    max_skipped_in_a_row: Annotated[int, Field(ge=0)] = Field(
        5,
        description="steps in a row whose update may be skipped because their loss or gradient is not finite; one more "
        "causes a rollback; 0: the first one does",
    )
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(3, description="maximum per run; one more ends the run")
    spike_deviations: Annotated[float, Field(gt=0)] | None = Field(
        20.0,
        description="a loss or gradient norm more than this many deviations (1.4826 * MAD) above its recent median is "
        "a spike; null: off",
    )
    window_steps: Annotated[int, Field(ge=8)] = Field(
        64, description="steps of the same stage and modality over which the median is taken"
    )
    min_steps: Annotated[int, Field(ge=4)] = Field(
        32, description="minimum number of steps before a value counts as a spike"
    )

    @model_validator(mode="after")
    def _window_holds_enough(self) -> GuardConfig:
        if self.min_steps > self.window_steps:
            raise ValueError(f"min_steps {self.min_steps} exceeds window_steps {self.window_steps}")
        return self


class CheckpointConfig(Section):
    """Interval and number of checkpoints."""

    every_steps: Positive = Field(
        200, description="steps between checkpoints; one is also written at the end of a stage and when asked to stop"
    )
    keep: Positive = Field(
        2, description="number of newest checkpoints that are kept; 2: one stays if the disk fails while one is written"
    )
    folder: PathText | None = Field(
        None,
        description="s3://BUCKET/PREFIX: checkpoints are written to and read from PREFIX/<name of the run> there, with "
        "the access of data.s3; null: the run's folder",
    )
    keep_every_steps: Positive | None = Field(
        None,
        description="checkpoints whose step is a multiple of this stay for good, beside the newest ones; a multiple of "
        "every_steps; null: none",
    )
    asynchronous: bool = Field(
        True,
        description="train on while a checkpoint is written, from a copy in host memory that takes as much as the "
        "training state of a process; false: wait until it is written",
    )

    @model_validator(mode="after")
    def _place_is_a_store_and_kept_ones_are_written(self) -> CheckpointConfig:
        if self.folder is not None and not re.match("s3://[^/]", self.folder):
            raise ValueError(
                f"folder is {shortened(self.folder)}, expected s3://BUCKET/PREFIX; checkpoints on a disk are in the "
                "run's folder, whose place is output"
            )
        if self.keep_every_steps is not None and self.keep_every_steps % self.every_steps:
            raise ValueError(
                f"keep_every_steps {self.keep_every_steps} is not a multiple of every_steps {self.every_steps}, so "
                f"most of those checkpoints are never written; choose a multiple, for example {10 * self.every_steps}"
            )
        return self


class EvaluationConfig(Section):
    """Settings of the evaluation on held-out data, after training and while it runs."""

    sources: list[SourceConfig] = Field(default_factory=list, description="empty: no evaluation")
    every_samples: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="training samples between two evaluations during training, on all ranks; null or 0: only after "
        "training",
    )
    best: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None,
        description="figure by which checkpoints/best is chosen among the evaluated ones, as it is called in "
        "metrics.jsonl, such as eval/zero-shot_top-1_image; null: the mean top-1 accuracy, without one the mean R@1",
    )
    token_budget: Positive = Field(
        8192, description="maximum number of tokens in a pack of the evaluation; limits memory, changes no result"
    )
    image_templates: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["{}"],
        description="prompt templates for zero-shot classification; an image's label replaces {}",
    )
    video_templates: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["{}"],
        description="prompt templates for zero-shot classification; a video's label replaces {}",
    )

    @model_validator(mode="after")
    def _templates_hold_the_label(self) -> EvaluationConfig:
        check_templates(self.image_templates + self.video_templates)
        return self


class TrackerConfig(Section):
    """Settings that a run has in an experiment tracker."""

    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")] = Field(
        "univitar", description="project that the run belongs to; it is created if it does not exist"
    )
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="name of the run in the tracker; absent: the run's name"
    )
    group: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="group of runs that are compared, such as the seeds of an experiment"
    )


class WandbConfig(TrackerConfig):
    """Settings of Weights & Biases. The API key is not a setting; it comes from `wandb login` or WANDB_API_KEY."""

    entity: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="user or team that owns the project; absent: the default of the account"
    )
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: files only, which `wandb sync` uploads later"
    )
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(
        default_factory=list, description="labels of the run"
    )
    notes: str | None = Field(None, description="description of the run")


class LoggingConfig(Section):
    """Settings of the logs that are written during training."""

    every_steps: Positive = Field(10, description="steps between lines in metrics.jsonl and TensorBoard")
    tensorboard: bool = Field(True, description="write the metrics and images for TensorBoard too, in tb/")
    images_every_steps: Annotated[int, Field(ge=0)] = Field(
        200, description="steps between TensorBoard images of a pack with its patch features as colours; 0: none"
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="peak TFLOP/s of one rank, for MFU; absent: published for the GPU, or measured at first",
    )
    profile: ProfileConfig | None = Field(
        None, description="trace steps with PyTorch's profiler, for Perfetto, into profile/; absent: none"
    )
    memory_history: bool = Field(
        False,
        description="record the Python stack of every allocation on a GPU, for the snapshot of a GPU that runs out of "
        "memory",
    )
    wandb: WandbConfig | None = Field(
        None, description="log to Weights & Biases too (extra `wandb`); {}: with all defaults; absent: no"
    )
    trackio: TrackerConfig | None = Field(
        None, description="log to Trackio on this machine too (extra `trackio`); {}: with all defaults; absent: no"
    )


class RunConfig(Section):
    """All settings of a run."""

    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=NAME_LIMIT)] = Field(
        description="name of the run and of its folder in `output`: letters, digits, dots, underscores and dashes"
    )
    output: PathText = Field("runs", description="folder in which the run's folder is created")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(
        0, description="determines initial weights, order of samples, drawn frames and dropping; the same on all ranks"
    )
    deterministic: bool = Field(
        False, description="bitwise reproducible steps on GPUs too; attention's backward pass is slower"
    )
    deepspeed: PathText = Field(
        "auto",
        description="a name from ds_configs/, the path of a JSON, or auto: ZeRO stage and precision are chosen at "
        "every start, from the model, the GPUs and their memory",
    )
    plugins: list[Annotated[PathText, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Python files (losses.py) and installed modules (my_package.losses) that every process of a run "
        "imports, with objectives, optimizers, readers of sources and callbacks",
    )
    model: ModelConfig = Field(ModelConfig(), description="both towers and their joint embedding")
    data: DataConfig = Field(description="sources, lanes and the limits of reading")
    stages: Annotated[list[StageConfig], Field(min_length=1)] = Field(
        description="curriculum, one entry per stage: length, sizes, budgets, learning rate, weights of the losses"
    )
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="loss, and the teacher of the distillation")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW or Muon; the learning rate is stages.N.lr")
    guard: GuardConfig = Field(GuardConfig(), description="handling of steps with a bad loss or gradient")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="interval and number of checkpoints")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="held-out data, and when it is evaluated")
    logging: LoggingConfig = Field(LoggingConfig(), description="metrics, TensorBoard, MFU")
    watchdog: WatchdogConfig = Field(WatchdogConfig(), description="limits after which a run counts as hung")

    @property
    def loaded_data(self) -> DataConfig:
        """`data` for the loader.

        For a classifier, sources without templates get the template "{}": a sample with only a label is complete then,
        and its label is its caption.
        """
        if not self.objective.classifies:
            return self.data
        sources = [source.model_copy(update={"templates": source.templates or ["{}"]}) for source in self.data.sources]
        return self.data.model_copy(update={"sources": sources})

    @model_validator(mode="after")
    def _stage_names_differ(self) -> RunConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages need different names, got {names}")
        return self

    @model_validator(mode="after")
    def _plugins_differ(self) -> RunConfig:
        twice = sorted({entry for entry in self.plugins if self.plugins.count(entry) > 1})
        if twice:
            raise ValueError(f"plugins has {', '.join(twice)} twice; keep one")
        if self.objective.kind not in OBJECTIVES and not self.plugins:
            raise ValueError(
                f"objective.kind {self.objective.kind} is none of {', '.join(OBJECTIVES)}, and plugins is empty; "
                "choose one of them, or name in plugins the plugin that registers it"
            )
        if self.optimizer.kind not in OPTIMIZERS and not self.plugins:
            raise ValueError(
                f"optimizer.kind {self.optimizer.kind} is neither {' nor '.join(OPTIMIZERS)}, and plugins is "
                "empty; choose one of them, or name in plugins the plugin that registers it"
            )
        return self

    @model_validator(mode="after")
    def _distillation_has_a_teacher(self) -> RunConfig:
        names = [stage.name for stage in self.stages if stage.distill.ever]
        if names and self.objective.teacher is None:
            raise ValueError(f"stages {names} distill without a teacher; set objective.teacher.path or remove distill")
        return self

    @model_validator(mode="after")
    def _parts_of_a_source_are_apart(self) -> RunConfig:
        shares: dict[str, float | None] = {}
        for source in (*self.data.sources, *self.evaluation.sources):
            path = source.path.rstrip("/") if "://" in source.path else os.path.abspath(source.path)
            share = shares.setdefault(path, source.hold_out)
            if share != source.hold_out:
                one, other = ("null" if value is None else value for value in (share, source.hold_out))
                raise ValueError(
                    f"the sources at {shortened(source.path)} have hold_out {one} and {other}, so samples that are "
                    "trained on could be evaluated; give all of them the same hold_out"
                )
        for source in self.evaluation.sources:
            if source.hold_out is not None and source.split == "train":
                raise ValueError(
                    f"the source to evaluate at {shortened(source.path)} has hold_out and split train, the part to "
                    "train on; give it split: test"
                )
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
                faults.append(f"stage {stage.name}: weights has unknown sources {unknown}; the sources are {labels}")
            if not any(stage.weights.values()):
                faults.append(f"stage {stage.name}: all weights are 0; give at least one source a share")
            if len(set(labels)) < len(labels):
                faults.append(f"stage {stage.name} has weights, so sources need different names, got {labels}")
        if faults:
            raise ValueError("; ".join(faults))
        return self
