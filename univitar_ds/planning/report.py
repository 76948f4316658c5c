"""The report of `train --dry-run` as text: data, steps, parameters, memory, checkpoints, and initial weights."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from univitar_ds.config.deepspeed import AUTO, sharing_ranks
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.keys.unused import unused_parts
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import ResolutionConfig, Schedule, StageConfig
from univitar_ds.drafting.machine import this_machine
from univitar_ds.errors import ConfigError
from univitar_ds.planning import sizes
from univitar_ds.planning.checks import Inputs, existing_parent, given_tokenizer
from univitar_ds.planning.counts.batch import (
    Means,
    batch_lines,
    fewest_steps,
    kept_after,
    kept_checkpoints,
    pairs_per_step,
)
from univitar_ds.planning.counts.samples import expected_tokens, source_lines
from univitar_ds.planning.deepspeed_auto import ranks_of
from univitar_ds.planning.forecast.dry_run import planned, step_lines
from univitar_ds.planning.sizes import amount
from univitar_ds.training.engine.optim import trained_parts


@dataclass(frozen=True)
class Plan:
    """A run to be reported: its inputs, folder, number of ranks and model.

    `description`: of the model, as `ContrastiveModel.description`; `classes`: number of classes, None if the model is
    not a classifier; `done`: steps and samples in the last checkpoint, None for a new run.
    """

    inputs: Inputs
    run: Path
    world_size: int
    description: Mapping[str, Any]
    classes: int | None = None
    done: tuple[int, int] | None = None

    @property
    def config(self) -> RunConfig:
        return self.inputs.config

    @property
    def encoder(self) -> EncoderConfig:
        return sizes.encoder_of(self.description)


def report(plan: Plan) -> str:
    """Returns the report of a run, in sections.

    Raises: ConfigError if the disk has too little space for the checkpoints; UserError if the model cannot be built.
    """
    config = plan.config
    means = expected_tokens(config, plan.inputs.shards)
    width = None if plan.inputs.teacher is None else plan.inputs.teacher.width
    counts = sizes.count_parameters(config, plan.description, teacher_width=width, classes=plan.classes)
    sections = {
        "run": list(_run(plan)),
        "sources": [*source_lines(plan.inputs.shards, config.data.sources), *_evaluation(plan)],
        "batch": batch_lines(config, plan.world_size, plan.encoder, means),
        "stages": [line for stage in config.stages for line in _stage(config, stage, plan.encoder, means)],
        "parameters": list(_parameters(counts, plan.classes)),
        "memory of a rank": list(_memory(plan, counts)),
        "a step": list(step_lines(*planned(plan.inputs, plan.description, counts, plan.world_size), means)),
        "checkpoints": list(_checkpoints(plan, counts, means)),
        "starts from": list(_starts(plan)),
    }
    if unused := unused_parts(config):
        sections["set but not used"] = [line.replace(" is set but not used", "") for line in unused]
    lines = [line for title, body in sections.items() for line in [title, *(f"  {line}" for line in body), ""]]
    verb = "starts" if plan.done is None else "continues"
    return "\n".join([*lines, f"Nothing was written. The same command without --dry-run {verb} the run."])


def _run(plan: Plan) -> Iterator[str]:
    config, zero = plan.config, plan.inputs.resolved["zero_optimization"]["stage"]
    state = "a new run" if plan.done is None else f"continues at step {plan.done[0]:,}, {plan.done[1]:,} samples"
    yield f"{config.name}: {state} in {plan.run}"
    precision = "bf16" if sizes.compute_width(plan.inputs.resolved) == 2 else "fp32"
    plural = "" if plan.world_size == 1 else "es"
    choice = plan.inputs.choice
    name = config.deepspeed if choice is None else f"{AUTO}: {choice.name}"
    yield f"{plan.world_size} process{plural}, ZeRO-{zero}, {precision} ({name}), seed {config.seed}"
    if choice is not None:
        yield choice.line


def _evaluation(plan: Plan) -> Iterator[str]:
    found = source_lines(plan.inputs.evaluation, plan.config.evaluation.sources)
    yield from (f"evaluation: {line}" for line in found)
    if not plan.config.evaluation.sources:
        yield "evaluation: none (evaluation.sources is empty)"


def _stage(config: RunConfig, stage: StageConfig, encoder: EncoderConfig, means: Means) -> Iterator[str]:
    lanes = config.data.lanes
    least, most, mean = pairs_per_step(stage, lanes, encoder, means)
    fewest = fewest_steps(stage, lanes, encoder, means)
    steps = math.ceil(stage.samples / (least if mean is None else mean))
    length = f"{'' if least == most else 'about '}{steps:,} steps"
    if fewest < steps:
        length = f"{fewest:,}-{steps:,} steps (item sizes are unknown: not in the manifests)"
    tokens = steps * lanes * stage.token_budget
    yield f"{stage.name}: {stage.samples:,} samples, {length}, up to {steps * lanes:,} packs and {tokens:,} tokens"
    if stage.video_ratio < 1:
        yield f"    images: {_sizes(stage.image)}"
    if stage.video_ratio > 0:
        yield (
            f"    videos: {_sizes(stage.video)}, up to {stage.video_frames} frames, "
            f"{100 * stage.video_ratio:g} % of the steps"
        )
    decay = f", decay over {stage.decay_samples:,}" if stage.decay_samples else ""
    last = stage.lr if stage.lr_schedule == "constant" else stage.final_lr_ratio * stage.lr
    yield f"    lr {stage.lr:g}, {stage.lr_schedule} to {last:g}, warm-up {stage.warmup_samples:,} samples{decay}"
    yield f"    trains {', '.join(trained_parts(config, stage)) or 'nothing'}"
    losses = f"{config.objective.kind} {_schedule(stage.contrastive)}, distillation {_schedule(stage.distill)}"
    yield f"    weights of the losses: {losses}"


def _sizes(rule: ResolutionConfig) -> str:
    if rule.size_px is not None:
        return f"squares of {rule.size_px} px"
    return f"native, {rule.min_tokens:,}-{rule.max_tokens:,} tokens an item, sides in multiples of {rule.divisor_px} px"


def _schedule(schedule: Schedule) -> str:
    return f"{schedule.start:g}" + ("" if schedule.end is None else f" to {schedule.end:g} ({schedule.kind})")


def _parameters(counts: sizes.Counts, classes: int | None) -> Iterator[str]:
    for part, count in counts.by_part.items():
        yield f"{part:<16} {count:>15,}"
    yield f"{'total':<16} {counts.total:>15,}" + (f"  ({classes:,} classes)" if classes is not None else "")


def _memory(plan: Plan, counts: sizes.Counts) -> Iterator[str]:
    config, resolved = plan.config, plan.inputs.resolved
    node = ranks_of(plan.world_size, this_machine(), os.environ).node
    tensor = config.model.tensor_parallel
    ranks, counts = plan.world_size // tensor, counts.split(tensor)
    sharing = sharing_ranks(resolved, ranks, node)
    used = [(sizes.memory_of_rank(config, stage, counts, sharing, resolved), stage.name) for stage in config.stages]
    memory, name = max(used, key=lambda entry: entry[0].device + entry[0].host)
    groups = f", in {ranks // sharing} groups" if sharing < ranks else ""
    plural = "" if sharing == 1 else "s"
    yield f"{sizes.RULE[resolved['zero_optimization']['stage']]} over {sharing} rank{plural}{groups}"
    for part, size in memory.parts.items():
        where = "  (on the disk)" if part in memory.stored else "  (in host memory)" if part in memory.offloaded else ""
        yield f"{part:<16} {amount(size):>15}{where}"
    total = f"{'total':<16} {amount(memory.device):>15}"
    total += f", and {amount(memory.host)} of host memory" if memory.offloaded else ""
    yield total + (f", {amount(memory.disk)} of a disk" if memory.stored else "")
    where = f" (in stage {name})" if len(config.stages) > 1 else ""
    yield f"between steps{where}; a step adds activations, buffers, gathered weights and a teacher:"


def _checkpoints(plan: Plan, counts: sizes.Counts, means: Means) -> Iterator[str]:
    """Raises: ConfigError if the disk has too little space for the checkpoints of a new run."""
    config = plan.config
    size = max(sizes.checkpoint_bytes(config, stage, counts, plan.inputs.resolved) for stage in config.stages)
    keep = config.checkpoint.keep
    if config.checkpoint.folder is not None:
        yield (
            f"{amount(size)} each, every {config.checkpoint.every_steps:,} steps; {keep} kept in "
            f"{config.checkpoint.folder}"
        )
        return
    free = shutil.disk_usage(existing_parent(plan.run)).free
    yield (
        f"{amount(size)} each, every {config.checkpoint.every_steps:,} steps; {keep} kept, so up to "
        f"{amount(size * (keep + 1))} while one is written; {amount(free)} are free"
    )
    count = kept_checkpoints(config, plan.encoder, means)
    needed = size * count
    if config.evaluation.every_samples:
        yield f"the best one is kept too, {amount(size)} in addition"
    if (every := config.checkpoint.keep_every_steps) is not None:
        more = count - kept_after(config, 0)
        yield f"one every {every:,} steps is never removed, {more:,} in addition, {amount(needed)} at the end"
    if plan.done is None and free < needed:
        raise ConfigError(
            f"{count} checkpoints need {amount(needed)} and {amount(free)} are free in {plan.run.parent}; "
            "free some space there, name another output=..., lower checkpoint.keep or raise keep_every_steps"
        )


def _starts(plan: Plan) -> Iterator[str]:
    config, start = plan.config, plan.inputs.start
    if plan.done is not None:
        yield f"the last checkpoint in {plan.run}"
    elif start is None:
        yield "encoder: randomly initialized"
    else:
        part = "the whole model" if config.model.init_part == "model" else "the encoder"
        yield f"model.init_from: {part} of {start.path} ({start.format})"
    if plan.done is None and not config.objective.classifies:
        yield _text(config)
    teacher = config.objective.teacher
    if teacher is not None and plan.inputs.teacher is not None:
        shape = plan.inputs.teacher
        about = f"{shape.kind}, width {shape.width}, patches of {shape.patch} px, {teacher.dtype}"
        yield f"teacher: {teacher.path} ({about})"


def _text(config: RunConfig) -> str:
    text = config.model.text
    if config.model.init_part == "model":
        return "text tower and tokenizer: those of model.init_from"
    tower = f"weights of {text.path}" if text.path is not None else "randomly initialized"
    given = given_tokenizer(config)
    if given is not None:
        return f"text tower: {tower}; tokenizer {given}"
    return f"text tower: {tower}; a tokenizer of at most {text.vocab_size:,} tokens is trained on the captions"
