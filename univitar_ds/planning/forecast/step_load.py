"""Computes the input of `planning.memory` from a run file, for the largest step of a stage on a rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from univitar_ds.config.deepspeed import lanes_per_rank, sharing_ranks
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.geometry import Modality, pixel_bytes
from univitar_ds.model.blocks.activations import LADDER, Kind
from univitar_ds.model.config import compiles
from univitar_ds.planning.counts.batch import pack_sizes
from univitar_ds.planning.memory import (
    EvaluationLoad,
    Kernels,
    Peak,
    States,
    StepLoad,
    TeacherMemory,
    TextShape,
    peak,
)
from univitar_ds.planning.sizes import Counts, RankMemory, compute_width, encoder_of, gradient_width, memory_of_rank
from univitar_ds.training.engine.optim import trained_parts


@dataclass(frozen=True)
class PlannedModel:
    """A run and its model. `description`: as `ContrastiveModel.description`; `counts`: parameters by part; `teacher`:
    None without one; `evaluated`: number of samples of an evaluation by modality, empty if unknown; `classes`: None
    without a classifier."""

    config: RunConfig
    description: Mapping[str, Any]
    counts: Counts
    teacher: TeacherMemory | None = None
    evaluated: Mapping[Modality, int] = field(default_factory=dict)
    classes: int | None = None

    @property
    def evaluated_kinds(self) -> int:
        """Number of kinds of weights, averaged and trained, that the run evaluates during training."""
        settings = self.config.evaluation
        if not settings.every_samples or not settings.sources:
            return 0
        return 1 + (self.config.optimizer.ema_decay is not None)


def group_size(config: RunConfig) -> int:
    """Returns how many ranks form a group that reads the same packs, since it shares their tokens or the weights."""
    return config.model.tensor_parallel * config.model.sequence_parallel


@dataclass(frozen=True)
class Placement:
    """Where and how a run is trained. `ranks`: number of ranks; `node`: ranks on each machine; `resolved`: the complete
    DeepSpeed configuration; `on_gpu`: whether each rank has a GPU."""

    ranks: int
    node: int
    resolved: Mapping[str, Any]
    on_gpu: bool = True

    @property
    def sharing(self) -> int:
        """How many ranks share a training state."""
        return sharing_ranks(self.resolved, self.ranks, self.node)


DEPTHS = {384: 12, 768: 12, 1024: 24, 1152: 27, 1280: 32, 1536: 40, 1920: 32}
"""Number of blocks of published teachers, by width."""


def teacher_memory(config: RunConfig, width: int, layers: int | None = None, ranks: int = 1) -> TeacherMemory:
    """Returns the memory of a teacher of `width`.

    Args: layers: its blocks, None: as published teachers of this width, see DEPTHS; ranks: among which a partitioned
        teacher is split.
    """
    own = config.objective.teacher
    assert own is not None
    layers = layers or DEPTHS.get(width, 24)
    weights = 12 * layers * width**2 * (2 if own.dtype == "bf16" else 4)
    return TeacherMemory(width, layers, weights / (ranks if own.partitioned else 1))


def wanted_recomputation(config: RunConfig, stage: StageConfig) -> Kind | str:
    """Returns `checkpoint_every` of a stage, which overrides that of the model."""
    return config.model.checkpoint_every if stage.checkpoint_every is None else stage.checkpoint_every


def weight_sharers(model: PlannedModel, place: Placement) -> int:
    """Returns how many ranks share the training state of one slice of the weights."""
    return max(1, place.sharing // model.config.model.tensor_parallel)


def held_by_rank(model: PlannedModel, stage: StageConfig, place: Placement) -> RankMemory:
    """Returns the memory of a rank between the steps of a stage."""
    counts = model.counts.split(model.config.model.tensor_parallel)
    return memory_of_rank(model.config, stage, counts, weight_sharers(model, place), place.resolved)


def states_of(model: PlannedModel, stage: StageConfig, place: Placement) -> States:
    """Returns the states of a rank in a stage, and the settings of its engine."""
    config, resolved = model.config, place.resolved
    counts, encoder = model.counts.split(config.model.tensor_parallel), encoder_of(model.description)
    held = held_by_rank(model, stage, place)
    zero = dict(resolved["zero_optimization"])
    width = compute_width(resolved)
    kernels: Kernels = "fused" if place.on_gpu else "compiled" if compiles(config.model) else "plain"
    return States(
        parts={name: size for name, size in held.parts.items() if name not in held.offloaded},
        zero=zero,
        parameters=counts.total,
        trained=counts.trained(config, stage),
        block=counts.by_part.get("blocks", 0) // encoder.num_hidden_layers,
        ranks=weight_sharers(model, place),
        width=width,
        gradient=gradient_width(resolved),
        text=counts.by_part.get("text", 0),
        matrices=counts.of_muon(config, stage),
        matrix_width=2 if config.optimizer.muon.precision == "bf16" else 4,
        offloaded="optimizer" in held.offloaded,
        kernels=kernels,
    )


def load_of(model: PlannedModel, stage: StageConfig, ranks: int, kind: Kind, kept: int = 1) -> StepLoad:
    """Returns what a rank computes in a step of full packs that have as many items as possible.

    With sequence parallelism, `items` are those of one rank. With fewer lanes than ranks, a rank has one pack.

    Args: kept: packs whose autograd graphs are in memory together.
    """
    config, encoder = model.config, encoder_of(model.description)
    parts_of_pack = config.model.sequence_parallel
    readers = max(1, ranks // group_size(config))
    lanes = max(config.data.lanes, readers)
    packs = lanes_per_rank(lanes, readers)
    of_pack = max(size.items[1] for size in pack_sizes(stage, encoder))
    items = -(-of_pack // parts_of_pack)
    parts = trained_parts(config, stage)
    return StepLoad(
        encoder=encoder,
        tokens=stage.token_budget * (1 - stage.patch_dropout) / parts_of_pack,
        pixels=pixel_bytes(stage.token_budget, video=stage.video_ratio > 0),
        items=items,
        packs=packs,
        kind=kind,
        embed_dim=config.model.embed_dim,
        texts=of_pack * lanes,
        chunk=config.objective.chunk,
        text=text_shape(model, trained="text" in parts),
        teacher=model.teacher if stage.distill.ever else None,
        kept=min(kept, packs),
        trains_encoder="blocks" in parts or "patch_embedding" in parts,
        tensor=config.model.tensor_parallel,
        sequence=parts_of_pack,
    )


def evaluation_of(model: PlannedModel) -> EvaluationLoad | None:
    """Returns what an evaluation during training holds on a rank; None if the run has none."""
    if not model.evaluated_kinds:
        return None
    video = any(stage.video_ratio > 0 for stage in model.config.stages)
    budget = model.config.evaluation.token_budget
    return EvaluationLoad(model.evaluated_kinds * model.counts.total, budget, pixel_bytes(budget, video=video))


def text_shape(model: PlannedModel, *, trained: bool) -> TextShape | None:
    """Returns the text tower of a model, None for a classifier. Captions of maximum length are assumed."""
    text = model.description.get("text")
    if text is None:
        return None
    length = model.config.model.text.context_length
    if not text["model_type"].startswith("clip"):  # SigLIP pads captions to the full length
        length = text["max_position_embeddings"]
    return TextShape(text["hidden_size"], text["num_hidden_layers"], text["intermediate_size"], length, trained)


def peak_of(
    model: PlannedModel, stage: StageConfig, place: Placement, kind: Kind, kept: int = 1, *, evaluates: bool = False
) -> Peak:
    """Returns the peak memory of a rank in a stage.

    Args: kept: packs whose autograd graphs are in memory together; evaluates: whether evaluations between steps count
        too, whose memory depends on neither `kind` nor budget.
    """
    load = load_of(model, stage, place.ranks, kind, kept)
    if evaluates:
        load = replace(load, evaluation=evaluation_of(model))
    return peak(load, states_of(model, stage, place))


def fitting_recomputation(model: PlannedModel, stage: StageConfig, place: Placement, room: float) -> Kind:
    """Returns the recomputation of a stage: its `checkpoint_every`, or for "auto" the least that fits into `room`
    bytes.

    On a CPU "auto" recomputes nothing. If no kind fits, every block is recomputed.
    """
    wanted = wanted_recomputation(model.config, stage)
    if wanted != "auto":
        return wanted
    if not place.on_gpu:
        return 0
    fits = (kind for kind in LADDER if peak_of(model, stage, place, kind).bytes <= room)
    return next(fits, LADDER[-1])


def largest_budget(
    model: PlannedModel, stage: StageConfig, place: Placement, kind: Kind, room: float, step: int = 1024
) -> int:
    """Returns the largest `token_budget` with which a stage fits into `room` bytes; 0 if none does.

    It is a multiple of `step`, below 4,096 times `step`.
    """

    def fits(budget: int) -> bool:
        changed = stage.model_copy(update={"token_budget": budget})
        return peak_of(model, changed, place, kind).bytes <= room

    low, high = 0, 1
    while fits(high * step) and high < 1 << 12:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def with_lanes(model: PlannedModel, ranks: int) -> PlannedModel:
    """Returns the model with `data.lanes` rounded up to a multiple of the ranks, or of the groups that share packs."""
    lanes, readers = model.config.data.lanes, ranks // group_size(model.config)
    if lanes % readers == 0:
        return model
    data = model.config.data.model_copy(update={"lanes": -(-lanes // readers) * readers})
    return replace(model, config=model.config.model_copy(update={"data": data}))
