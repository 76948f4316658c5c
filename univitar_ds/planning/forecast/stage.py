"""The plan of one stage on a cluster: recomputation, memory, time of a step, FLOPs and collectives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from univitar_ds.config.deepspeed import read_deepspeed, resolve_deepspeed
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.geometry import Modality
from univitar_ds.model.blocks.activations import LADDER, Kind
from univitar_ds.model.blocks.rank_group import sharing_bytes, sharing_collectives
from univitar_ds.model.flops import cost_coefficients
from univitar_ds.planning.counts.batch import TERA
from univitar_ds.planning.forecast.cluster import Cluster, value
from univitar_ds.planning.forecast.items import Items
from univitar_ds.planning.forecast.step_load import (
    Placement,
    PlannedModel,
    fitting_recomputation,
    group_size,
    largest_budget,
    peak_of,
    text_shape,
)
from univitar_ds.planning.memory import REDUCED_AT_ONCE, Peak
from univitar_ds.planning.sizes import encoder_of
from univitar_ds.planning.step_time import BF16, FP32, Method, MuonWork, Teacher, Work, predict, step_bytes
from univitar_ds.training.engine.optim import trained_parts
from univitar_ds.training.optimizers.matrices import multiplications, owners_of

HOST_RATIOS = {
    "zero2": {1: 1.8, 8: 1.7, 256: 1.5, 1024: 2.1},
    "zero3": {1: 2.7, 8: 2.7, 256: 3.1, 1024: 3.4},
}
"""Ratio of the host time of a step with the engine to that without DeepSpeed, by configuration and number of ranks
(benchmarks/results/bench_host.csv). ZeRO-1 is assumed to take as long as ZeRO-2, which has the same hooks."""


@dataclass(frozen=True)
class SimulatedStep:
    """A training step of one modality on a simulated GPU, see `simulation.step.simulated`.

    `peak`: bytes by part at the moment of the maximum; `launches`: number of kernels; `waits`: how often the host
    waits for the GPU; `collectives`, `collective_bytes`: number and bytes (in and out) by kind; `error`: why the step
    could not be simulated, None if it was.
    """

    modality: Modality
    peak: Mapping[str, int] = field(default_factory=dict)
    moment: str = ""
    launches: int = 0
    waits: int = 0
    collectives: Mapping[str, int] = field(default_factory=dict)
    collective_bytes: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None

    @property
    def bytes(self) -> int:
        return sum(self.peak.values())


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage. Numbers of a step are means over images and videos.

    `kind`: recomputation; `kept`: packs of a rank whose autograd graph is kept; `packs`: of a rank in a step; `peak`:
    memory of a rank; `step`: seconds by part; `flops`, `tokens`, `pairs`: of all ranks in a step; `steps`: of the
    stage; `collectives`: bytes of the larger of input and output of a rank's collectives in a step, by kind; if
    simulated, of both, with those of the loss; `messages`: number of these collectives, estimated unless simulated;
    `budgets`: the largest `token_budget` that fits, by recomputation; `pack_tflops`: TFLOPs of a full pack;
    `recomputed_flops`: of all ranks in a step; `group_bytes`, `group_messages`: bytes and number of the collectives
    within blocks, between ranks that share packs or weights; `muon_flops`: of Muon's iterations, on all ranks;
    `simulated`: the steps on a simulated GPU, which memory and collectives are from; empty if formulas predict them.
    """

    name: str
    items: Sequence[Items]
    kind: Kind
    kept: int
    packs: int
    peak: Peak
    step: Mapping[str, float]
    mfu: float
    flops: float
    tokens: float
    pairs: float
    steps: int
    collectives: Mapping[str, float]
    messages: int
    budgets: Mapping[Kind, int]
    pack_tflops: float
    recomputed_flops: float
    group_bytes: float = 0.0
    group_messages: int = 0
    muon_flops: float = 0.0
    simulated: Sequence[SimulatedStep] = ()

    @property
    def step_s(self) -> float:
        return sum(self.step.values())

    @property
    def hours(self) -> float:
        return self.steps * self.step_s / 3600


def placement(config: RunConfig, cluster: Cluster, zero: str) -> Placement:
    """Returns the placement of a run with the DeepSpeed configuration `zero`. Raises: ConfigError if it is invalid."""
    resolved = resolve_deepspeed(config, cluster.ranks, read_deepspeed(zero), ("the run file", zero))
    return Placement(cluster.ranks, cluster.per_node, resolved)


def plan_stage(
    model: PlannedModel, stage: StageConfig, cluster: Cluster, where: tuple[str, Placement], items: Sequence[Items],
    *, kind: Kind | None = None, with_budgets: bool = True,
) -> StagePlan:  # fmt: skip
    """Returns the plan of a stage.

    Args: where: name of the DeepSpeed configuration, and the placement; kind: recomputation, None: that of the stage;
        with_budgets: whether to compute `StagePlan.budgets`.
    """
    config, (zero, place), room = model.config, where, cluster.room
    packs = config.data.lanes * group_size(config) // cluster.ranks
    kind = fitting_recomputation(model, stage, place, room) if kind is None else kind
    kept = kept_packs(model, stage, place, kind, room, packs)
    method = method_of(model, stage, zero, place, kept, cluster)
    encoder, shared, muon = (
        encoder_of(model.description),
        (method.tensor, method.sequence),
        muon_of(model, stage, place),
    )
    works = [(one.share, work_of(model, stage, one, kind, muon)) for one in items]
    found = [(share, predict(work, cluster.gpu, cluster.ranks, method)) for share, work in works]
    mean = _mean([(share, step.parts) for share, step in found])
    flops = sum(share * step.flops for share, step in found)
    pairs = sum(one.share * _tokens(stage, one) / one.tokens for one in items) * config.data.lanes
    passes = 2 * packs - min(kept, packs)
    trained = model.counts.split(method.tensor).trained(config, stage)
    moved = step_bytes(trained, method.zero, passes, packs) if cluster.ranks > 1 else {}
    if muon is not None and place.sharing > 1:
        moved["alltoall"] = muon.bytes
    linear, square = cost_coefficients(encoder)
    again = 1 / kind if isinstance(kind, int) and kind else 0.0  # selective recomputes no matrix product
    through = passes + packs * (1 + again)  # passes of packs through all blocks: forward, backward and recomputed
    tokens = sum(share * step.tokens for share, step in found)
    forwards = (passes - packs) / packs + again
    return StagePlan(
        name=stage.name,
        items=items,
        kind=kind,
        kept=kept,
        packs=packs,
        peak=peak_of(model, stage, place, kind, kept, evaluates=True),
        step=mean,
        mfu=flops / sum(mean.values()) / cluster.gpu.peak.value,
        flops=flops * cluster.ranks,
        tokens=tokens * cluster.ranks,
        pairs=pairs,
        steps=math.ceil(stage.samples / pairs),
        collectives=moved,
        messages=messages(model, place, method.zero, passes, packs),
        budgets={one: largest_budget(model, stage, place, one, room) for one in LADDER} if with_budgets else {},
        pack_tflops=max(stage.token_budget * (linear + square * one.attended) for one in items) / TERA,
        recomputed_flops=flops * cluster.ranks * forwards / 3,
        group_bytes=through / packs * tokens * method.tensor * sharing_bytes(encoder, *shared, number=BF16),
        group_messages=round(through * sharing_collectives(encoder, *shared)),
        muon_flops=0.0 if muon is None else muon.flops_of_all * (cluster.ranks // place.sharing),
    )


def packs_texts(model: PlannedModel) -> bool:
    """Whether texts run without padding: on GPUs those of all models but SigLIP do, see `model.towers`."""
    text = model.description.get("text")
    return text is not None and text["model_type"].startswith("clip")


def muon_of(model: PlannedModel, stage: StageConfig, place: Placement) -> MuonWork | None:
    """Returns the work of Muon in an update; None if the stage trains nothing with Muon.

    The matrices are distributed over the ranks that share a training state as in the optimizer (`owners_of`).
    """
    shapes = model.counts.shapes_of_muon(model.config, stage)
    if not shapes:
        return None
    settings, ranks = model.config.optimizer.muon, place.sharing
    flops = [2 * settings.ns_steps * multiplications(shape) for shape in shapes]
    loads, counts = [0] * ranks, [0] * ranks
    for owner, one in zip(owners_of(flops, ranks), flops, strict=True):
        loads[owner] += one
        counts[owner] += 1
    width = FP32 if settings.precision == "fp32" else BF16
    moved = 2 * width * sum(math.prod(shape) for shape in shapes) / ranks  # momentum to the owners, and results back
    return MuonWork(max(loads), sum(flops), max(counts) * settings.ns_steps, moved, settings.precision == "fp32")


def messages(model: PlannedModel, place: Placement, zero: int, passes: int, backwards: int) -> int:
    """Returns the estimated number of collectives in a step; `benchmarks/results/bench_simulated_gpu.csv` has counts of
    steps of the trainer.

    Seven are for the loss, the gradient norm and metrics. ZeRO-3 gathers weights in each forward pass, and in each
    backward pass unless they may stay gathered until then. Each bucket of gradients is reduced.

    Args: zero: ZeRO stage; passes: forward passes; backwards: those that are followed by a backward pass.
    """
    if place.ranks == 1:
        return 0
    section = place.resolved["zero_optimization"]
    tensor = model.config.model.tensor_parallel
    parameters, ranks = model.counts.split(tensor).total, place.ranks // tensor
    buckets = math.ceil(parameters / section.get("reduce_bucket_size", 500_000_000))
    if zero < 3:
        gathers = 2 * math.ceil(parameters / ranks / section.get("allgather_bucket_size", 500_000_000))
        reduced = buckets * backwards if zero == 2 else math.ceil(parameters / REDUCED_AT_ONCE)
        return 7 + gathers + reduced
    fetches = math.ceil(parameters / section.get("stage3_prefetch_bucket_size", 50_000_000)) + 2
    stay = parameters <= section.get("stage3_max_live_parameters", 1_000_000_000)
    return 7 + passes * fetches + backwards * (buckets + (0 if stay else fetches))


def kept_packs(model: PlannedModel, stage: StageConfig, place: Placement, kind: Kind, room: float, packs: int) -> int:
    """Returns how many packs of a rank keep their autograd graph: `objective.grad_cache_keep`, or for "auto" as many as
    fit into `room` bytes. Args: packs: of the rank."""
    wanted = model.config.objective.grad_cache_keep
    if wanted != "auto":
        return min(wanted, packs)
    low, high = 1, packs + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = peak_of(model, stage, place, kind, middle).bytes <= room
        low, high = (middle, high) if fits else (low, middle)
    return low


def method_of(
    model: PlannedModel, stage: StageConfig, zero: str, place: Placement, kept: int, cluster: Cluster
) -> Method:
    """Returns how the trainer computes a step of a stage, as the input of `step_time.predict`."""
    level = place.resolved["zero_optimization"]["stage"]
    balanced = stage.cost_budget_tflops is not None
    fixed = stage.image.size_px is not None and stage.video_ratio == 0
    imbalance = 1.0 if fixed else value("balanced" if balanced else "unbalanced")
    by_node = "sharding_ranks" in place.resolved or zero == "zero3_node"
    return Method(
        zero=level,
        host_ratio=HOST_RATIOS["zero3" if level == 3 else "zero2"],
        update_collectives={1: 4, 2: 10, 3: 19 if by_node else 17}[level],
        recompute_by_memory=False,
        kept_packs=kept,
        ring=False,
        loss_kernels=int(value("loss_kernels")),
        teacher_by_size=False,
        packed_text=packs_texts(model),
        imbalance=imbalance,
        fused_host=value("fused_host"),
        node=cluster.per_node,
        tensor=model.config.model.tensor_parallel,
        sequence=model.config.model.sequence_parallel,
    )


def work_of(model: PlannedModel, stage: StageConfig, items: Items, kind: Kind, muon: MuonWork | None = None) -> Work:
    """Returns the work of a step whose packs have one modality, as the input of `step_time.predict`."""
    config = model.config
    shape = text_shape(model, trained="text" in trained_parts(config, stage))
    text = config.model.text
    if shape is not None:
        text = text.model_copy(update={
            "hidden_size": shape.hidden, "layers": shape.layers, "intermediate_size": shape.inner,
            "context_length": shape.length,
        })  # fmt: skip
    else:
        text = text.model_copy(update={"layers": 0})
    teacher = model.teacher if stage.distill.ever else None
    return Work(
        name=config.name,
        encoder=encoder_of(model.description),
        text=text,
        embed_dim=config.model.embed_dim,
        parameters=model.counts.trained(config, stage),
        token_budget=stage.token_budget,
        tokens_per_item=items.tokens,
        attended=items.attended,
        sizes=items.sizes,
        lanes=config.data.lanes,
        checkpoint_every=kind,
        chunk=config.objective.chunk,
        fill=_tokens(stage, items) / stage.token_budget * (1 - stage.patch_dropout),
        teacher=None if teacher is None else Teacher(teacher.width, teacher.layers),
        muon=muon,
    )


def _tokens(stage: StageConfig, items: Items) -> float:
    """Returns the mean tokens of a pack: as many whole items as fit if all have one size, else nearly a full pack."""
    if items.sizes == 1:
        return max(1, int(stage.token_budget / items.tokens)) * items.tokens
    return value("fill") * stage.token_budget


def _mean(steps: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    parts = dict.fromkeys(name for _, one in steps for name in one)
    return {name: sum(share * one[name] for share, one in steps) for name in parts}
