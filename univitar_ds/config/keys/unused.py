"""Finds keys of a run file that were set but have no effect because of another key.

Reports only keys whose value differs from the default. The data and the machine are not considered.
Each section has a function, which yields (key, reason).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.model import ModelConfig, ObjectiveConfig
from univitar_ds.config.paths import absolute
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.section import Section
from univitar_ds.config.stage import StageConfig
from univitar_ds.geometry import MODALITIES
from univitar_ds.plugins import OPTIMIZERS

UnusedKeys = Iterator[tuple[str, str]]
"""Keys without effect, as (key, reason)."""


def unused_parts(config: RunConfig) -> list[str]:
    """Returns a sentence for each key that was set without effect, section by section."""
    found = [
        *_model(config),
        *_data(config),
        *(each for number, stage in enumerate(config.stages) for each in _stage(f"stages.{number}", stage)),
        *_objective(config.objective, config.stages),
        *_optimizer(config),
        *_evaluation(config),
        *_logging(config),
    ]
    return [f"{key} is set but not used: {why}" for key, why in found]


def _given(place: str, section: Section, *names: str) -> Iterator[str]:
    """Yields the keys `names` that were set to another value than the default, as dotted names below `place`."""
    for name in names:
        default = type(section).model_fields[name].get_default(call_default_factory=True)
        if name in section.model_fields_set and getattr(section, name) != default:
            yield f"{place}.{name}" if place else name


def _because(keys: Iterator[str], why: str) -> UnusedKeys:
    return ((key, why) for key in keys)


def _reads(stages: Sequence[StageConfig], modality: str) -> bool:
    return any(stage.video_ratio > 0 if modality == "video" else stage.video_ratio < 1 for stage in stages)


def _model(config: RunConfig) -> UnusedKeys:
    model: ModelConfig = config.model
    text = model.text
    if model.init_from is not None:
        yield from _because(_given("model", model, "layer_scale_init"), "model.init_from brings its own values")
    if all(stage.checkpoint_every is not None for stage in config.stages):
        yield from _because(_given("model", model, "checkpoint_every"), "every stage sets its own checkpoint_every")
    if config.objective.classifies:
        names = ("embed_dim", "logit_scale_init", "logit_bias_init", "text")
        yield from _because(_given("model", model, *names), "objective.kind classification has no text tower")
        return
    if config.objective.kind == "softmax":
        yield from _because(_given("model", model, "logit_bias_init"), "a bias cancels under objective.kind softmax")
    if model.init_part == "model":
        names = ("hidden_size", "layers", "heads", "intermediate_size", "vocab_size")
        yield from _because(_given("model.text", text, *names), "model.init_from brings its own text tower")
        starts = _given("model", model, "logit_scale_init", "logit_bias_init")
        yield from _because(starts, "model.init_from brings its own values")
    if text.path is not None:
        shape = _given("model.text", text, "hidden_size", "layers", "heads", "intermediate_size")
        yield from _because(shape, "model.text.path brings its own text tower")
    if text.tokenizer is not None or text.path is not None:
        name = "path" if text.tokenizer is None else "tokenizer"
        yield from _because(_given("model.text", text, "vocab_size"), f"the vocabulary is that of model.text.{name}")


def _data(config: RunConfig) -> UnusedKeys:
    data = config.data
    sources = [*data.sources, *config.evaluation.sources]
    places = [place for source in sources for place in (source.path, source.class_names) if place is not None]
    if not any("://" in place for place in places):
        names = type(data.s3).model_fields if config.checkpoint.folder is None else ()
        yield from _because(_given("data.s3", data.s3, *names), "no source is at s3://")
        names = tuple(name for name in type(data.cache).model_fields if name != "folder" or not _holds_packed(config))
        yield from _because(_given("data.cache", data.cache, *names), "no source is at s3://")
    for number, source in enumerate(data.sources):
        yield from _split(f"data.sources.{number}", source)
    if data.workers == 0:
        names = ("prefetch_packs", "worker_restarts")
        yield from _because(_given("data", data, *names), "data.workers 0 starts no decoding process")
    if data.on_bad == "fail":
        names = ("max_bad_per_thousand", "max_bad_in_a_row")
        yield from _because(_given("data", data, *names), "data.on_bad fail ends the run at the first bad sample")
    if not _reads(config.stages, "video"):
        names = ("decode_timeout_s", "max_video_s")
        yield from _because(_given("data", data, *names), "video_ratio is 0 in every stage")


def _holds_packed(config: RunConfig) -> bool:
    """Whether a source is in `data.cache.folder`, where the run has packed it."""
    folder = config.data.cache.folder
    sources = [*config.data.sources, *config.evaluation.sources]
    return folder is not None and any(PurePath(source.path).is_relative_to(absolute(folder)) for source in sources)


def _split(place: str, source: SourceConfig) -> UnusedKeys:
    if source.path.endswith(".tar"):
        yield from _because(_given(place, source, "split"), "only a folder packed by data pack has splits, not a tar")


def _stage(place: str, stage: StageConfig) -> UnusedKeys:
    if stage.video_ratio == 0:
        names = ("video", "video_frames", "video_sampling")
        yield from _because(_given(place, stage, *names), "the stage's video_ratio is 0")
    elif stage.video_sampling.kind == "uniform":
        sampling = stage.video_sampling
        yield from _because(
            _given(f"{place}.video_sampling", sampling, "fps"), "only kind fps uses it, and kind is uniform"
        )
    if stage.video_ratio == 1:
        yield from _because(_given(place, stage, "image"), "the stage's video_ratio is 1")
    for modality in MODALITIES:
        rule = getattr(stage, modality)
        if rule.kind == "fixed" and _reads([stage], modality):
            names = ("min_tokens", "max_tokens")
            yield from _because(_given(f"{place}.{modality}", rule, *names), "kind fixed uses size_px")
    augment = stage.augment
    if augment.crop_scale[0] == 1:
        yield from _because(_given(f"{place}.augment", augment, "crop_ratio"), "crop_scale 1 keeps the whole image")
    if not (augment.brightness or augment.contrast or augment.saturation or augment.hue):
        why = "brightness, contrast, saturation and hue are 0"
        yield from _because(_given(f"{place}.augment", augment, "jitter_probability"), why)
    if stage.lr_schedule == "constant":
        yield from _because(_given(place, stage, "final_lr_ratio"), "lr_schedule constant stays at lr")
    if "vision" in stage.frozen and stage.distill.ever:
        yield (
            f"{place}.distill",
            "the encoder is frozen in this stage, so only the distillation heads learn from the teacher",
        )
    if "vision" in stage.frozen and "patch_embedding" in stage.frozen:
        yield f"{place}.frozen patch_embedding", "vision is frozen too and contains it"


def _objective(objective: ObjectiveConfig, stages: Sequence[StageConfig]) -> UnusedKeys:
    teacher = objective.teacher
    if objective.classifies:
        names = ("chunk", "grad_cache_keep", "same_caption_positive")
        yield from _because(_given("objective", objective, *names), "only the contrastive losses use it")
    else:
        names = tuple(type(objective.classification).model_fields)
        given = _given("objective.classification", objective.classification, *names)
        yield from _because(given, f"objective.kind is {objective.kind}")
    if not any(stage.contrastive.ever for stage in stages):
        names = ("kind",) if objective.classifies else ("kind", "chunk", "same_caption_positive")
        yield from _because(_given("objective", objective, *names), "contrastive is 0 in every stage")
    if teacher is None:
        return
    if not any(stage.distill.ever for stage in stages):
        yield "objective.teacher", "no stage distills from it; give stages.N.distill a weight, or remove the teacher"
        return
    if all(not stage.augment.is_off for stage in stages if stage.distill.ever):
        why = "with stages.N.augment, the teacher sees other pixels in each epoch, so cached features rarely match"
        yield from _because(_given("objective.teacher", teacher, "cache"), why)
    for part in ("patch", "pooled"):
        if not getattr(teacher, f"{part}_weight"):
            loss = _given("objective.teacher", teacher, f"{part}_loss")
            yield from _because(loss, f"objective.teacher.{part}_weight is 0")


def _optimizer(config: RunConfig) -> UnusedKeys:
    optimizer = config.optimizer
    why = f"optimizer.kind is {optimizer.kind}"
    if optimizer.kind != "muon":
        yield from _because(_given("optimizer.muon", optimizer.muon, *type(optimizer.muon).model_fields), why)
    if optimizer.kind in OPTIMIZERS:
        yield from _because(_given("optimizer", optimizer, "options"), f"{why}, which is not from a plugin")
    else:
        given = _given("optimizer", optimizer, "betas", "eps")
        yield from _because(given, f"{why}, whose arguments are optimizer.options")
    if all("vision" in stage.frozen for stage in config.stages):
        decay = _given("optimizer", config.optimizer, "layer_decay")
        yield from _because(decay, "the encoder is frozen in every stage")
    if config.guard.spike_deviations is None:
        names = ("window_steps", "min_steps")
        yield from _because(
            _given("guard", config.guard, *names), "guard.spike_deviations is null, so nothing counts as a spike"
        )


def _evaluation(config: RunConfig) -> UnusedKeys:
    evaluation = config.evaluation
    if not evaluation.sources:
        names = ("token_budget", "every_samples", "best", "image_templates", "video_templates")
        yield from _because(_given("evaluation", evaluation, *names), "evaluation.sources is empty")
        return
    if not evaluation.every_samples:
        why = "without evaluation.every_samples, only the last checkpoint is evaluated"
        yield from _because(_given("evaluation", evaluation, "best"), why)
    if config.objective.classifies:
        names = ("image_templates", "video_templates")
        yield from _because(_given("evaluation", evaluation, *names), "a classifier is not evaluated zero-shot")
    for modality in () if config.objective.classifies else MODALITIES:
        if not _reads(config.stages, modality):
            templates = _given("evaluation", evaluation, f"{modality}_templates")
            yield from _because(templates, f"no stage reads {modality}s, so they are not evaluated")
    for number, source in enumerate(evaluation.sources):
        place = f"evaluation.sources.{number}"
        yield from _split(place, source)
        templates = _given(place, source, "templates")
        why = "they make captions for training; zero-shot uses evaluation.image_templates and video_templates"
        yield from _because(templates, why)


def _logging(config: RunConfig) -> UnusedKeys:
    if not config.logging.tensorboard:
        shown = _given("logging", config.logging, "images_every_steps")
        yield from _because(shown, "images are shown in TensorBoard, and logging.tensorboard is false")
