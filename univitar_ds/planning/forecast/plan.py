"""The plan of a run on a cluster: memory, time, FLOPs and collectives of each stage, and scaling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from univitar_ds.config.deepspeed import AUTO
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import ConfigError, UserError
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.model.blocks.activations import LADDER
from univitar_ds.model.build import described_encoder
from univitar_ds.planning.checks import Inputs, Model, check_teacher, foreseen_model, open_start
from univitar_ds.planning.counts.batch import Means
from univitar_ds.planning.deepspeed_auto import Choice, Ranks, choose
from univitar_ds.planning.forecast.cluster import Cluster, of_ranks
from univitar_ds.planning.forecast.evaluations import Evaluations, evaluated_items, evaluations
from univitar_ds.planning.forecast.items import items_of, known_means, on_this_machine
from univitar_ds.planning.forecast.resources import Checkpoints, HostNeeds, Reading, checkpoints, host_needs, reading
from univitar_ds.planning.forecast.stage import StagePlan, placement, plan_stage
from univitar_ds.planning.forecast.step_load import (
    Placement,
    PlannedModel,
    group_size,
    teacher_memory,
    with_lanes,
)
from univitar_ds.planning.memory import EVALUATION, TeacherMemory
from univitar_ds.planning.sizes import amount, count_parameters
from univitar_ds.plugins import OPTIMIZERS, load_plugins

SCALES = tuple(2**power for power in range(11))
"""Numbers of GPUs in the scaling table, in addition to that of the cluster."""
TEACHERS = {"small": (384, 12), "vits": (384, 12), "base": (768, 12), "vitb": (768, 12), "giant": (1536, 40)}
"""(width, blocks) of DINOv2 teachers by a part of their name, as published. Other names are assumed to be "large"."""
_CLASSES = 1000
"""Number of classes that is assumed if the sources cannot be read."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run on a cluster. `config`: of the run, with the lanes that are assumed; `zero`: name of the
    DeepSpeed configuration; `choice`: the choice of `deepspeed: auto`, None if the run file names one; `notes`:
    sentences about assumptions."""

    config: RunConfig
    model: PlannedModel
    cluster: Cluster
    zero: str
    choice: Choice | None
    place: Placement
    stages: Sequence[StagePlan]
    host: HostNeeds
    checkpoints: Checkpoints
    reading: Reading
    evaluations: Evaluations | None = None
    notes: Sequence[str] = ()

    @property
    def hours(self) -> float:
        """Hours of training, of waiting for checkpoints, and of evaluations while the run trains."""
        waited = self.checkpoints.hours + (0.0 if self.evaluations is None else self.evaluations.hours)
        return sum(stage.hours for stage in self.stages) + waited

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.cluster.ranks

    def misfit(self) -> str | None:
        """Returns a sentence with need, limit and remedy if a stage does not fit into a GPU; None if all fit."""
        room, memory = self.cluster.room, self.cluster.gpu.memory.value
        for place, (own, stage) in enumerate(zip(self.stages, self.config.stages, strict=True)):
            if own.peak.bytes <= room:
                continue
            fits = max(own.budgets.values())
            kind = next(kind for kind in LADDER if own.budgets[kind] == fits)
            largest = max(item.tokens for item in own.items)
            remedy = f"set stages.{place}.token_budget to at most {fits:,} with checkpoint_every: {kind}"
            if own.peak.moment == EVALUATION and fits >= stage.token_budget:
                remedy = (
                    f"lower evaluation.token_budget ({self.config.evaluation.token_budget:,}), shard the training "
                    "state over more GPUs, or evaluate after training only (evaluation.every_samples: null)"
                )
            elif fits < largest:
                remedy = "use more GPUs (--nodes), GPUs with more memory (--gpu), or a smaller encoder"
            elif own.budgets.get(own.kind, 0) >= stage.token_budget:  # fits with the graph of one pack in memory
                remedy = f"lower objective.grad_cache_keep ({own.kept}), or set it to auto"
            elif stage.token_budget <= fits:
                remedy = f"set checkpoint_every: {kind}"
            return (
                f"stage {own.name} needs {amount(own.peak.bytes)} of each {self.cluster.name} (token_budget "
                f"{stage.token_budget:,}, checkpoint_every {own.kind}, {self.zero}) and {amount(room)} may be filled, "
                f"{100 * room / memory:.0f} % of {amount(memory)}; {remedy}"
            )
        return None


def planned_model(config: RunConfig, ranks: int) -> tuple[PlannedModel, list[str]]:
    """Returns a run's model, and sentences on what had to be assumed.

    `model.init_from` is opened, see `checks.open_start`. Of the data, only the labels of a classification run are read,
    and only if all sources are on this machine.

    Raises: UserError if `model.init_from` cannot be read, or the parts of the model do not fit each other.
    """
    load_plugins(config.plugins)
    notes: list[str] = []
    if config.optimizer.kind not in OPTIMIZERS:
        notes.append(
            f"the time of an update is predicted for AdamW, although optimizer.kind is {config.optimizer.kind}"
        )
    if config.model.tensor_parallel > 1:
        notes.append(
            "with model.tensor_parallel, the time of token-wise operations is that of fused ones, and norms over a "
            "width that is split are not fused; memory counts them as they are"
        )
    teacher = None if config.objective.teacher is None else _teacher(config, ranks, notes)
    start = open_start(config)
    description, classes = _description(config, start, notes)
    width = None if teacher is None else teacher.width
    counts = count_parameters(config, description, teacher_width=width, classes=classes)
    return PlannedModel(config, description, counts, teacher, evaluated_items(config), classes), notes


def _description(config: RunConfig, start: StoredModel | None, notes: list[str]) -> Model:
    """Returns the description of the model, and its number of classes. The number is assumed if the sources are in a
    store, which would have to be read as a whole, or cannot be read."""
    found = Inputs(config, {}, {}, (), (), start, None)
    if not config.objective.classifies:
        return foreseen_model(found)
    if on_this_machine(config):
        with suppress(UserError):
            return foreseen_model(found)
    notes.append(f"{_CLASSES:,} classes are assumed, since the sources are in a store or cannot be read")
    return {"encoder": described_encoder(config.model, start).to_dict()}, _CLASSES


def _teacher(config: RunConfig, ranks: int, notes: list[str]) -> TeacherMemory:
    """Returns the memory of the teacher: by its configuration file if it is a local folder, else by its name."""
    own = config.objective.teacher
    assert own is not None
    if Path(own.path).is_dir():
        shape = check_teacher(config)
        assert shape is not None
        return teacher_memory(config, shape.width, ranks=ranks)
    width, layers = next((shape for name, shape in TEACHERS.items() if name in own.path.lower()), (1024, 24))
    notes.append(f"the teacher {own.path} is assumed to have {layers} blocks of width {width}, from its name")
    return teacher_memory(config, width, layers, ranks)


def plan_run(config: RunConfig, cluster: Cluster, tokens_per_item: int | None = None) -> Plan:
    """Returns the plan of a run. Sources are read only if all are on this machine: manifests, and labels of a
    classifier.

    Args: tokens_per_item: mean tokens of an image at native size; None: by manifests, else assumed.
    Raises: UserError as `planned_model`; ConfigError if a number is impossible.
    """
    model, notes = planned_model(config, cluster.ranks)
    return plan_model(model, cluster, known_means(config), tokens_per_item, notes)


def _check_groups(config: RunConfig, cluster: Cluster) -> None:
    """Raises: ConfigError if the GPUs cannot form groups of equal size that share packs or weights."""
    own, each = config.model, group_size(config)
    if cluster.ranks % each:
        raise ConfigError(
            f"model.tensor_parallel {own.tensor_parallel} and model.sequence_parallel {own.sequence_parallel} need a "
            f"multiple of {each} GPUs, and --nodes {cluster.nodes} x --gpus-per-node {cluster.per_node} are "
            f"{cluster.ranks}; give other numbers of GPUs, or lower them"
        )


def plan_model(
    model: PlannedModel, cluster: Cluster, means: Means, tokens_per_item: int | None = None, notes: Sequence[str] = ()
) -> Plan:
    """Returns the plan of a model on a cluster; see `plan_run`.

    `data.lanes` is rounded up to a multiple of the GPUs, where GPUs that share packs or weights count as one.

    Args: means: mean tokens per item, if known; notes: sentences about assumptions so far.
    Raises: ConfigError if the cluster cannot train the model, or a number is impossible.
    """
    _check_groups(model.config, cluster)
    lanes = model.config.data.lanes
    model = with_lanes(model, cluster.ranks)
    if model.config.data.lanes != lanes:
        notes = [
            *notes,
            f"data.lanes is assumed to be {model.config.data.lanes:,} instead of {lanes:,}, a multiple of the "
            + ("GPUs" if group_size(model.config) == 1 else f"groups of {group_size(model.config)} GPUs"),
        ]
    config = model.config
    zero, choice = config.deepspeed, None
    if zero == AUTO:
        sizes = Ranks(cluster.ranks, cluster.per_node, cluster.gpu.memory.value)
        choice = choose(config, model.description, model.counts, sizes)
        zero = choice.name
    place = placement(config, cluster, zero)
    stages = [plan_stage(model, stage, cluster, (zero, place), items_of(stage, means, tokens_per_item))
              for stage in config.stages]  # fmt: skip
    return Plan(
        config, model, cluster, zero, choice, place, stages,
        host=host_needs(model, stages, cluster, place),
        checkpoints=checkpoints(model, stages, cluster, place),
        reading=reading(config, stages),
        evaluations=evaluations(model, stages, cluster),
        notes=notes,
    )  # fmt: skip


def scaling(plan: Plan, means: Means, tokens_per_item: int | None = None) -> Iterator[Plan]:
    """Yields plans of the same run on the numbers of GPUs in SCALES and of its own cluster. Numbers that the lanes or
    the machines do not allow are left out. Args: as `plan_model`."""
    lanes = plan.config.data.lanes
    sizes = sorted({*SCALES, plan.cluster.ranks})
    for ranks in sizes:
        part = of_ranks(plan.cluster, ranks)
        readers = ranks // group_size(plan.config)
        if part.ranks != ranks or readers == 0 or (readers < lanes and lanes % readers):
            continue
        try:
            yield plan_model(plan.model, part, means, tokens_per_item)
        except ConfigError:
            continue
