"""Writes the run file of `univitar-ds init`: a commented YAML, in which every chosen number has its reason."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

import yaml

from univitar_ds.config.data import DataConfig
from univitar_ds.config.load import check_config
from univitar_ds.config.paths import written
from univitar_ds.config.stage import ResolutionConfig
from univitar_ds.data.shards.hold_out import HELD_OUT
from univitar_ds.data.storage.base import S3
from univitar_ds.data.tools.survey import Counts, Survey
from univitar_ds.drafting.facts import Facts, facts_of
from univitar_ds.drafting.lengths import Length, Stage, checkpoint_steps, length_of, stages_of, video_ratio
from univitar_ds.drafting.machine import Machine
from univitar_ds.drafting.sizes import Basis, basis_of, mean_of, tokens_of_share, wanted_tokens
from univitar_ds.drafting.text import text_of
from univitar_ds.geometry import Modality
from univitar_ds.planning.sizes import amount

TEMPLATE = "a photo of a {}"
"""Caption of a sample that has only a label."""
_SOFTMAX_BELOW = 1024
"""Pairs per step below which softmax converges faster than the sigmoid loss."""
_NOT_MEASURED = "evaluation: {sources: []}"
_ONE_PAIR = "# TOO FEW SAMPLES: a step has one pair, and the contrastive loss of one pair is 0. Add samples."
_PARTS_OF_EPOCH = 4
"""The shuffle buffer is at most a lane's epoch divided by this. With half of an epoch of 132 photos, one or two packs
of 400 were less than 90 % full, with a quarter none."""
_WIDTH = 120
_PLAIN = re.compile(r"[A-Za-z0-9_./-]*[A-Za-z_/][A-Za-z0-9_./-]*")


def draft(
    surveys: Sequence[Survey],
    machine: Machine,
    *,
    size: str | None = None,
    hours: float | None = None,
    s3: Mapping[str, str] | None = None,
) -> str:
    """Returns the text of a run file for sources that were surveyed.

    Args: size: name of the encoder; None: chosen from data and machine; hours: maximum length of the run; None: no
        limit on GPUs, an hour on a CPU; s3: keys of `data.s3`.
    Raises: DataError if there is too little to train on; ConfigError if the machine is too small for the encoder.
    """
    basis = basis_of(facts_of(surveys), machine, size)
    length = length_of(basis, hours)
    stages = stages_of(basis, length)
    sections = [
        _head(basis, length),
        _model(basis),
        _data(basis, s3 or {}),
        _stages(basis, length, stages),
        _objective(basis),
        _checkpoint(basis, length),
        _evaluation(basis),
    ]
    text = "".join(f"{_fitted(line)}\n" for lines in sections for line in lines)
    check_config(yaml.safe_load(text), "the drafted run file")
    return text


def is_measured(text: str) -> bool:
    """Returns whether a drafted run is evaluated on held-out data."""
    return _NOT_MEASURED not in text.splitlines()


def has_one_pair(text: str) -> bool:
    """Returns whether a step of a drafted run has one pair, from which nothing is learned."""
    return _ONE_PAIR in text.splitlines()


def processes(text: str) -> int:
    """Returns the number of processes for which a run file was drafted."""
    found = re.search(r"--nproc (\d+)", text)
    return int(found[1]) if found else 1


def run_name(path: str) -> str:
    """Returns a name for a run on the source `path`: the name of its folder, file or prefix."""
    path = path.rstrip("/")
    place = path if "://" in path else os.path.abspath(path or "/")
    last = place.rpartition("/")[2]
    last = place.rpartition("/")[0].rpartition("/")[2] if "{" in last else last.rpartition(".")[0] or last
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("._-")[:60] or "run"


def _quoted(text: str) -> str:
    """Returns a text as YAML: plain where that is safe in a flow mapping, else in double quotes."""
    if _PLAIN.fullmatch(text) and yaml.safe_load(text) == text:
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=1 << 30).strip()


def _fitted(line: str) -> str:
    """Returns a line; a comment that would make it too long is moved to a line above it."""
    key, mark, comment = line.rpartition("  # ")
    if len(line) <= _WIDTH or not mark:
        return line
    return f"{' ' * (len(key) - len(key.lstrip()))}# {comment}\n{key}"


def _head(basis: Basis, length: Length) -> Iterator[str]:
    facts, machine = basis.facts, basis.machine
    schema = Path(str(resources.files("univitar_ds"))) / "recipes" / "run.schema.json"
    yield f"# yaml-language-server: $schema={schema}"
    yield "# Drafted by univitar-ds init from the data and the machine. Change what you know better:"
    yield "# `univitar-ds config KEY` describes a key. Numbers are choices of this draft, unless marked as published."
    for survey in facts.training:
        yield f"# {json.dumps(survey.path)}: {_contents(survey)}"
    if basis.budget.pairs < 2 and not basis.classifies:
        yield _ONE_PAIR
    gpus = f"{machine.gpus} GPUs of {amount(machine.gpu_memory)}" if basis.on_gpu else "no GPU"
    assumed = " (assumed: this machine has fewer)" if machine.assumed else ""
    yield f"# Machine: {machine.cores} cores, {amount(machine.memory)} of memory, {gpus}{assumed}."
    yield f"# Save it as run.yaml, then: univitar-ds train --config run.yaml --nproc {basis.budget.processes}"
    if not all(survey.packed for survey in facts.training):
        yield "# The first start packs the files into runs/; with --dry-run it only prints what it would do."
    yield f"name: {_quoted(run_name(facts.training[0].path))}  # its folder is runs/NAME; another name starts a new run"
    here = {
        "zero3_cpu": "fp32 on a CPU",
        "zero2": "bf16, optimizer and gradients shared",
        "zero3": "bf16, weights, gradients and optimizer shared",
        "zero3_offload": "bf16, the optimizer in host memory",
    }
    yield f"deepspeed: auto  # by model, GPUs and their memory at every start; here {here[basis.budget.deepspeed]}"


def _contents(survey: Survey) -> str:
    """Returns a sentence about the contents of a source."""
    about = "" if survey.exact else "about "
    parts = []
    for split, kinds in _found(survey).items():
        numbers = {f"{kind}s" if count != 1 else kind: count for kind, count in kinds.items() if count}
        counted = ", ".join(f"{about}{count:,} {kind}" for kind, count in numbers.items())
        parts.append(f"{split}: {counted}" if split is not None else counted)
    captions = sum(bool(texts.captions) for texts in survey.texts)
    of = f"{captions} of {len(survey.texts)} seen have captions"
    return f"{survey.title}; {'; '.join(parts)}; {of}" + (f"; {len(survey.labels)} labels" if survey.labels else "")


def _found(survey: Survey) -> Counts:
    """Returns the counts of a source as it is, without the parts into which the run divides it."""
    if survey.hold_out is None:
        return survey.counts
    return {None: Counter(dict(survey.counts[survey.training])) + Counter(dict(survey.counts[HELD_OUT]))}


def _model(basis: Basis) -> Iterator[str]:
    count = f"{basis.encoder.parameter_count() / 1e6:.1f}M parameters"
    if basis.given:
        why = "as asked for (--size)"
    elif not basis.on_gpu:
        why = "larger ones (--size) need GPUs"
    elif basis.small:
        why = f"{basis.facts.samples:,} samples are few for a larger one from scratch (model.init_from: a trained one)"
    else:
        why = f"for {basis.facts.samples:,} samples"
    yield "model:"
    yield f"  encoder: {_quoted(basis.size)}  # {count}; {why}"
    if basis.small:
        yield "  layer_scale_init: 1.0  # as in all recipes of tiny; 0.1 (published) is for deep encoders"
    if basis.on_gpu and (not basis.small or basis.budget.checkpointing):
        yield "  checkpoint_every: auto  # in each stage the least recomputation that fits into the memory of the GPUs"
    elif basis.budget.checkpointing:
        yield "  checkpoint_every: 1  # activations of a pack would not fit into memory; costs a second forward pass"
    if not basis.small:
        yield "  pool_heads: 16  # as the heads of the encoder"
    if basis.classifies:
        return
    text = text_of(basis)
    yield f"  embed_dim: {text.hidden_size}  # as wide as the text tower"
    shape = f"hidden_size: {text.hidden_size}, layers: {text.layers}, heads: {text.heads}"
    yield f"  # About {text.captions:,} different captions: a larger tower would overfit them."
    yield f"  # context_length: 95 % of the captions have at most {text.longest} words."
    yield f"  text: {{{shape}, intermediate_size: {text.intermediate_size}, context_length: {text.context_length},"
    yield f"         vocab_size: {text.vocab_size}}}"


def _data(basis: Basis, s3: Mapping[str, str]) -> Iterator[str]:
    budget = basis.budget
    yield "data:"
    yield "  sources:"
    for survey in basis.facts.training:
        some = not basis.classifies and not basis.facts.has_captions(survey) and survey.labels
        templates = f", templates: [{json.dumps(TEMPLATE)}]" if some else ""
        comment = "  # samples with only a label get this caption" if some else ""
        yield f"    - {{{_source(survey, survey.training)}{templates}}}{comment}"
    packs = budget.lanes // budget.processes
    each = "one for each process" if packs == 1 else f"{packs} for each process (one loss over all of them)"
    others = [str(n) for n in range(1, budget.lanes + 1) if budget.lanes % n == 0]
    shared = f"; {', '.join(others)} processes can share them" if len(others) > 1 else ""
    yield f"  lanes: {budget.lanes}  # packs of a step, {each}{shared}"
    cores = basis.machine.cores / budget.processes
    workers = max(1, min(8, int(cores) - 1))
    available = "there is 1 core" if cores == 1 else f"there are {cores:.3g} cores"
    yield f"  workers: {workers}  # decoding processes of each process, for which {available}"
    fewest: Modality = min(basis.modalities, key=basis.facts.count)
    per_lane = basis.facts.count(fewest) // budget.lanes
    if per_lane < _PARTS_OF_EPOCH * DataConfig.model_fields["pool_samples"].default:
        # A buffer of more than an epoch waits for its last samples, and packs before an epoch's end are not full.
        samples = max(1, per_lane // _PARTS_OF_EPOCH)
        yield f"  pool_samples: {samples}  # a quarter of a lane's epoch of {fewest}s, so that packs are full"
    if s3:
        yield f"  s3: {{{', '.join(f'{key}: {_quoted(value)}' for key, value in s3.items())}}}"


def _source(survey: Survey, split: str | None) -> str:
    found = f"path: {_quoted(written(survey.path))}"
    if split is not None:
        found += f", split: {_quoted(split)}"
    if survey.hold_out is not None:
        found += f", hold_out: {survey.hold_out:g}"
    if survey.table is not None:
        keys = survey.table.model_dump(exclude_defaults=True)
        shown = {k: _quoted(v) if isinstance(v, str) else f"[{', '.join(map(_quoted, v))}]" for k, v in keys.items()}
        found += f", table: {{{', '.join(f'{key}: {value}' for key, value in shown.items())}}}"
    return found


def _stages(basis: Basis, length: Length, stages: Sequence[Stage]) -> Iterator[str]:
    yield f"# Length: {length.why}."
    if basis.facts.count("video") and not basis.videos:
        yield f"# Videos are left out: {basis.facts.count('video')} are too few for packs of their own."
    yield "stages:"
    for stage in stages:
        yield f"  - name: {stage.name}  # {stage.why}"
        share = f"{stage.samples / basis.facts.samples:.3g} epochs"
        yield f"    samples: {stage.samples}  # {share}"
        yield from (f"    {line}" for line in _resolutions(basis, stage))
        yield f"    token_budget: {basis.budget.tokens}  # {_budget_reason(basis, stage)}"
        if basis.on_gpu and (stage.side is None or stage.video_ratio > 0):
            yield "    cost_budget_tflops: auto  # packs of all GPUs take about the same time"
        yield f"    lr: {stage.lr:.1e}  # {'AdamW from scratch' if stage is stages[0] else 'lower from stage to stage'}"
        yield f"    warmup_samples: {stage.warmup}  # {100 * stage.warmup / stage.samples:.0f} % of the samples"
        yield f"    final_lr_ratio: {stage.final_lr_ratio}  # cosine decay to this share of lr"
        if basis.classifies and basis.small:
            yield "    stochastic_depth: 0.1  # against overfitting, as in the recipe labels"


def _resolutions(basis: Basis, stage: Stage) -> Iterator[str]:
    facts = basis.facts
    if stage.video_ratio < 1:
        if stage.side is not None:
            yield f"image: {{kind: fixed, size_px: {stage.side}}}  # {(stage.side // 14) ** 2} tokens an image"
        else:
            seen = facts.native_tokens("image", 0.5)
            half = "no size could be read" if seen is None else f"half of the images have up to {seen:,.0f} tokens"
            large = (facts.native_tokens("image", 0.95) or 0) > basis.image.max_tokens
            where = "a GPU" if basis.on_gpu else "a CPU"
            limit = f", and more than {basis.image.max_tokens} would be slow on {where}" if large else ""
            yield f"image: {_rule(basis.image)}  # {half}{limit}; on average {mean_of(basis, 'image'):.0f} here"
    if stage.video_ratio > 0:
        yield f"video: {_rule(basis.video)}  # over all frames; {mean_of(basis, 'video'):.0f} on average"
        share = f"{facts.count('video'):,} videos, {facts.count('image'):,} images"
        yield f"video_ratio: {stage.video_ratio:g}  # share of the steps; {share}"
        yield f"video_frames: {basis.frames}  # spread over the video"
    elif facts.count("video") and basis.videos and video_ratio(basis):
        yield "video_ratio: 0.0  # images only in this stage"


def _rule(rule: ResolutionConfig) -> str:
    return f"{{min_tokens: {rule.min_tokens}, max_tokens: {rule.max_tokens}, divisor_px: {rule.divisor_px}}}"


def _budget_reason(basis: Basis, stage: Stage) -> str:
    unit = "items" if basis.classifies else "pairs"
    mean = (stage.side // 14) ** 2 if stage.side is not None else basis.budget.mean
    pairs = max(1, round(basis.budget.tokens / mean))
    count = basis.facts.count(basis.modality)
    few = f", of {count:,}: an epoch has several steps" if pairs * basis.budget.lanes * 8 > count else ""
    if basis.images and basis.videos and tokens_of_share(basis, "video") < wanted_tokens(basis):
        few += f"; larger packs would not be full of {basis.facts.count('video'):,} videos"
    return f"about {pairs:,} {unit} a pack, so {pairs * basis.budget.lanes:,} a step{few}"


def _objective(basis: Basis) -> Iterator[str]:
    if basis.classifies:
        yield "objective:"
        yield f"  kind: classification  # labels and no captions: a linear head; {basis.facts.classes} classes seen"
        yield "  classification: {label_smoothing: 0.1, mixup: 0.8, cutmix: 1.0}  # as in the recipe labels"
        yield "optimizer: {weight_decay: 0.05}  # as in the recipe labels"
        return
    few = basis.budget.pairs < _SOFTMAX_BELOW
    kind = "softmax" if few else "sigmoid"
    why = f"it converges faster with {basis.budget.pairs} pairs a step" if few else "the recipe's loss [published]"
    yield f"objective: {{kind: {kind}, same_caption_positive: true}}  # {why}; equal captions are no negatives"


def _checkpoint(basis: Basis, length: Length) -> Iterator[str]:
    every = checkpoint_steps(basis, length)
    yield f"checkpoint: {{every_steps: {every}}}  # about five minutes or a quarter of the run, not just before its end"


def _divided(evaluation: Sequence[tuple[Survey, str | None]]) -> Iterator[str]:
    """Yields comments on the samples that are held out."""
    held_out = sum(sum(survey.counts[split].values()) for survey, split in evaluation)
    total = held_out + sum(sum(survey.counts[survey.training].values()) for survey, _ in evaluation)
    about = "" if all(survey.numbers for survey, _ in evaluation) else "about "
    count = f"{about}{held_out:,} of {total:,} samples"
    yield f"  # The data have no split to evaluate on, so {count} are held out of the training."
    yield "  # To hold out another share, change hold_out here and in data.sources; to train on all samples, remove it"
    yield "  # there, and set evaluation to {sources: []}."
    if any(survey.packed and survey.path.startswith(S3) for survey, _ in evaluation):
        yield "  # The evaluation reads all tars for them; `univitar-ds data pack --hold-out` writes them apart."


def _evaluation(basis: Basis) -> Iterator[str]:
    facts: Facts = basis.facts
    kinds = basis.modalities
    usable = [
        (survey, split) for survey, split in facts.evaluation if any(survey.counts[split].get(kind) for kind in kinds)
    ]
    if not usable:
        yield "# No split of held-out data was found, and the data cannot be divided. To measure the run, hold some out"
        yield '# (another folder, the split "test" of a metadata.jsonl or table, a folder test/), and name them:'
        yield "# evaluation: {sources: [{path: HELD_OUT, split: test}]}"
        yield _NOT_MEASURED
        return
    yield "evaluation:"
    if any(survey.hold_out for survey, _ in usable):
        yield from _divided(usable)
    yield "  sources:  # held-out data, measured after training"
    yield from (f"    - {{{_source(survey, split)}}}" for survey, split in usable)
    if facts.classes and not basis.classifies:
        yield f"  image_templates: [{json.dumps(TEMPLATE)}]  # zero-shot classification by the labels"
