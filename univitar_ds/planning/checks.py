"""Checks of a run before it starts. Independent errors are reported together.

Nothing is written, except that `pack=True` packs sources into shards that are not shards already.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univitar_ds import startup
from univitar_ds.classes import ClassList, class_list
from univitar_ds.config.deepspeed import AUTO, on_disk, packs_per_rank, read_deepspeed, resolve_deepspeed
from univitar_ds.config.run_folder import CLASSES, TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import CheckpointError, ConfigError, DataError, Faults, InstallationError
from univitar_ds.extras import extra
from univitar_ds.formats.stored_model import JointConfig, StoredModel
from univitar_ds.plugins import OBJECTIVES, OPTIMIZERS, calling, load_plugins, objective_named, optimizer_of

if TYPE_CHECKING:
    from univitar_ds.data.shards.sources import SourceShard
    from univitar_ds.data.tools.survey import Surveys
    from univitar_ds.model.teacher.teacher import TeacherShape
    from univitar_ds.planning.deepspeed_auto import Choice

Model = tuple[Mapping[str, Any], int | None]
"""The description of a model (`ContrastiveModel.description`), and its number of classes; None: not a classifier."""


@dataclass(frozen=True)
class Inputs:
    """The checked inputs of a run.

    `deepspeed`: the DeepSpeed JSON as read; `resolved`: the complete configuration that DeepSpeed gets; `shards`,
    `evaluation`: the shards of `data.sources` and `evaluation.sources`; `start`: the opened model `model.init_from`,
    None without one; `teacher`: shape of the teacher, None without one.
    """

    config: RunConfig
    deepspeed: dict[str, Any]
    resolved: dict[str, Any]
    shards: Sequence[SourceShard]
    evaluation: Sequence[SourceShard]
    start: StoredModel | None
    teacher: TeacherShape | None
    choice: Choice | None = None
    """The configuration that `deepspeed: auto` chose; None if the run file names one."""

    @property
    def joint(self) -> JointConfig | None:
        """The joint embedding that the run takes from `start`; None if the run file configures it."""
        whole = self.start is not None and self.config.model.init_part == "model"
        return self.start.joint if whole else None


def check_run(config: RunConfig, recipe: str, world_size: int, *, pack: bool = False) -> Inputs:
    """Checks everything that a new run on `world_size` ranks reads.

    Args: recipe: name of the run file in messages; pack: whether to pack sources that are not shards, after everything
        else was checked. Without it their shards are predicted, unless they were packed before.
    Returns: the inputs. Their `config` names the packed sources, and has the joint embedding of `model.init_from` if
        `model.init_part` is "model".
    Raises: the UserError of the check that failed, such as DataError or CheckpointError; SeveralFaults if several
        checks failed.
    """
    check_libraries(config)  # alone: with a broken library other checks would fail for the same reason
    faults = Faults()
    faults.of(check_plugins, config)
    deepspeed, resolved = _configuration(config, config.deepspeed, world_size, recipe, faults)
    if deepspeed is not None:
        faults.of(check_zero_stage, deepspeed, config.deepspeed)
    teacher = faults.of(check_teacher, config)
    start = faults.of(open_start, config)
    if start is not None or config.model.init_from is None:
        faults.of(check_shapes, config, start, world_size)
    faults.of(check_text, config)
    config, train, evaluation = _sources(config, faults, pack)
    faults.raise_all()
    found = Inputs(config, deepspeed or {}, resolved or {}, train, evaluation, start, teacher)
    found = replace(found, config=with_joint(config, found.joint))
    return found if deepspeed is not None else _with_choice(found, world_size, recipe, lambda: foreseen_model(found))


def check_reopened(config: RunConfig, deepspeed: str, world_size: int, run_file: str, *, pack: bool = False) -> Inputs:
    """Checks what a run reads that is resumed on `world_size` ranks.

    Args: deepspeed: name or path of the DeepSpeed JSON, or AUTO; run_file: path of the config.yaml in the run's folder;
        pack: see `check_run`.
    Returns: the inputs with packed sources. `start` and `teacher` are None: they were checked when the run was made.
    Raises: as `check_run`.
    """
    check_libraries(config)  # alone: with a broken library other checks would fail for the same reason
    faults = Faults()
    faults.of(check_plugins, config)
    content, resolved = _configuration(config, deepspeed, world_size, run_file, faults)
    config, train, evaluation = _sources(config, faults, pack)
    faults.raise_all()
    found = Inputs(config, content or {}, resolved or {}, train, evaluation, None, None)
    if content is not None:
        return found
    run = Path(run_file).parent
    return _with_choice(found, world_size, run_file, lambda: saved_model(run, config))


def _configuration(
    config: RunConfig, deepspeed: str, world_size: int, run_file: str, faults: Faults
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Returns a DeepSpeed JSON as read, and the complete configuration that DeepSpeed gets.

    A value is None if its check failed; both are None for AUTO, whose configuration is chosen later.

    Args: deepspeed: name or path of the JSON, or AUTO; run_file: name of the run file in messages; faults: keeps the
        errors.
    """
    if deepspeed == AUTO:
        faults.of(packs_per_rank, config, world_size)
        return None, None
    content = faults.of(read_deepspeed, deepspeed)
    if content is None:
        return None, None
    resolved = faults.of(resolve_deepspeed, config, world_size, content, (run_file, config.deepspeed))
    if resolved is not None and on_disk(resolved):
        from univitar_ds.training.engine.engine import check_disk

        faults.of(check_disk, resolved)
    return content, resolved


def _with_choice(found: Inputs, world_size: int, run_file: str, model: Callable[[], Model]) -> Inputs:
    """Returns the inputs with the configuration that `deepspeed: auto` chooses.

    Args: model: returns the description of the model and its number of classes; called only if there are GPUs.
    """
    from univitar_ds.drafting.machine import this_machine
    from univitar_ds.planning.deepspeed_auto import choose, ranks_of
    from univitar_ds.planning.sizes import Counts, count_parameters

    config, ranks = found.config, ranks_of(world_size, this_machine(), os.environ)
    description, counts = {}, Counts({})
    if ranks.gpu_memory:
        description, classes = model()
        width = None if found.teacher is None else found.teacher.width
        counts = count_parameters(config, description, teacher_width=width, classes=classes)
    choice = choose(config, description, counts, ranks)
    content = read_deepspeed(choice.name)
    resolved = resolve_deepspeed(config, world_size, content, (run_file, choice.name))
    return replace(found, deepspeed=content, resolved=resolved, choice=choice)


def foreseen_model(found: Inputs) -> Model:
    """Returns the description of a new run's model, and its number of classes if it is a classifier.

    If the tokenizer is not trained yet, `model.text.vocab_size` tokens are assumed. The classes are read from the
    samples of the sources (`find_classes`).
    """
    from univitar_ds.model.build import describe, described_encoder
    from univitar_ds.tokenization import load_tokenizer, special_ids

    config = found.config
    if config.objective.classifies:
        classes = find_classes(config, found.shards)
        return {"encoder": described_encoder(config.model, found.start).to_dict()}, len(classes)
    special = {"vocab_size": config.model.text.vocab_size, "eos_id": 1, "pad_id": 0}
    given = given_tokenizer(config)
    if given is not None and found.joint is None:
        special = special_ids(load_tokenizer(given)).of_text_model
    return describe(config.model, found.start, **special), None


def saved_model(run: Path, config: RunConfig, saved: Mapping[str, Any] | None = None) -> Model:
    """Returns the description of the model of the run in folder `run`, and its number of classes if it is a classifier.

    Args: saved: the description in a checkpoint, if it has one.
    """
    from univitar_ds.formats.run import run_description

    classes = len(ClassList.read(run / CLASSES)) if config.objective.classifies else None
    return run_description(run, config, saved), classes


def find_classes(config: RunConfig, shards: Sequence[SourceShard] = ()) -> ClassList:
    """Returns the classes of a classification run, from the labels of all samples of its sources.

    Args: shards: of the sources, of which some may not be packed yet.
    Raises: DataError if a source cannot be read, or no data set has two labels.
    """
    from univitar_ds.data.labels import iterate_labels
    from univitar_ds.data.storage.base import StorageSettings
    from univitar_ds.planning.counts.unpacked import UnpackedShard, labels_of

    predicted = {shard.path for shard in shards if isinstance(shard, UnpackedShard)}
    ready = [source for source in config.data.sources if source.path not in predicted]
    return class_list([*labels_of(shards), *iterate_labels(ready, StorageSettings.of(config.data))])


def _sources(
    config: RunConfig, faults: Faults, pack: bool
) -> tuple[RunConfig, Sequence[SourceShard], Sequence[SourceShard]]:
    """Returns the configuration with packed sources, and the shards of training and evaluation; () if a check failed.

    If `faults` has errors already, nothing is packed, and sources are checked only if all of them are shards.
    """
    from univitar_ds.data.tools.survey import Surveys
    from univitar_ds.data.writing.packed_sources import all_are_shards, with_packed_sources

    if faults and not all_are_shards(config):
        return config, (), ()
    surveys = Surveys()
    packed = faults.of(with_packed_sources if pack else surveys.packed_before, config)
    found = None if packed is None else faults.of(check_sources, packed, surveys)
    return packed or config, *(found or ((), ()))


def check_plugins(config: RunConfig) -> None:
    """Imports the plugins of a run, and checks its objective and optimizer if they come from a plugin.

    Raises: PluginError if a plugin cannot be imported; if none registers the run's objective or optimizer; if that
        objective is not a sum over pairs, or that optimizer does not update each weight independently of the others.
    """
    if config.plugins:
        startup.phase("importing the plugins")
    load_plugins(config.plugins)
    if config.objective.kind not in OBJECTIVES:
        from univitar_ds.objectives.pairs import check_additive, pair_losses

        plugin, objective = objective_named(config.objective.kind)
        with calling(plugin, f"the objective {config.objective.kind}"):
            check_additive(pair_losses(objective.loss_of_chunk))
    if config.optimizer.kind not in OPTIMIZERS:
        from univitar_ds.training.optimizers.elementwise import check_elementwise

        plugin, optimizer = optimizer_of(config.optimizer.kind, config.optimizer.options)
        with calling(plugin, f"the optimizer {config.optimizer.kind}"):
            check_elementwise(optimizer)


def check_zero_stage(deepspeed: dict[str, Any], name: str) -> int:
    """Returns the ZeRO stage of a DeepSpeed JSON. Args: name: of the JSON, in messages.

    Raises: ConfigError for a stage other than 1, 2 and 3.
    """
    section = deepspeed.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, dict) else section
    if stage not in (1, 2, 3):
        raise ConfigError(f"zero_optimization.stage is {stage!r} in {name}; checkpoints need 1, 2 or 3, choose one")
    return stage


def check_sources(config: RunConfig, surveys: Surveys) -> tuple[list[SourceShard], list[SourceShard]]:
    """Returns the shards of training and evaluation. Args: surveys: has what was listed before.

    Raises: DataError that names all sources that are missing or have no usable samples; SeveralFaults if several checks
        failed; StorageError.
    """
    from univitar_ds.data.contents import check_contents
    from univitar_ds.data.shards.sources import check_parts, check_stages
    from univitar_ds.data.storage.base import StorageSettings
    from univitar_ds.data.usable_texts import check_texts
    from univitar_ds.planning.counts.unpacked import UnpackedShard, faults_of_texts, find_or_predict

    startup.phase("reading the sources")
    settings = StorageSettings.of(config.data)

    def find_evaluation() -> list[SourceShard]:
        try:
            return find_or_predict(config.evaluation.sources, settings, "evaluation.sources", surveys)
        except DataError as error:
            if str(error).startswith("evaluation.sources."):
                raise
            raise DataError(f"evaluation.sources: {error}") from error

    faults = Faults()

    def find_training() -> list[SourceShard]:
        found = find_or_predict(config.data.sources, settings, "data.sources", surveys)
        check_stages(found, config.data.sources, config.stages)
        return found

    shards = faults.of(find_training)
    evaluation = faults.of(find_evaluation)
    faults.raise_all()
    faults.of(check_parts, [*(shards or ()), *(evaluation or ())])
    faults.of(check_contents, config, shards or [], evaluation or [])
    faults.of(check_texts, config, [shard for shard in shards or () if not isinstance(shard, UnpackedShard)])
    for fault in faults_of_texts(config, shards or ()):
        faults.add(DataError(fault))
    faults.raise_all()
    return shards or [], evaluation or []


def check_teacher(config: RunConfig) -> TeacherShape | None:
    """Returns the shape of the teacher from its configuration file, without its weights; None without a teacher.

    Raises: as `read_teacher`, for a model that is not supported.
    """
    if config.objective.teacher is None:
        return None
    from univitar_ds.model.teacher.teacher import read_teacher

    return read_teacher(config.objective.teacher)


def check_libraries(config: RunConfig) -> None:
    """Checks that the packages of a run are installed and that its GPU has the requested precision.

    Raises: InstallationError if a package is missing that training, a tracker or another key of the run needs, or
        transformers cannot build a text tower; ConfigError if `model.fp8` is true and the GPU has no 8-bit products.
    """
    startup.phase("checking the installation")
    with extra("train"):
        for package in ("deepspeed", "tensorboard"):
            if find_spec(package) is None:  # an import would take seconds
                raise ModuleNotFoundError(name=package)
    if config.model.tensor_parallel > 1:
        with extra("megatron"):
            if find_spec("megatron") is None or find_spec("megatron.core") is None:
                raise ModuleNotFoundError(name="megatron")
    for name in ("wandb", "trackio"):
        if getattr(config.logging, name) is not None and find_spec(name) is None:
            raise InstallationError(
                f"logging.{name} is set and the package {name} is not installed; pip install 'univitar_ds[{name}]', or "
                f"leave it out with logging.{name}=null"
            )
    if config.model.fp8:
        from univitar_ds.training.fp8 import check_fp8

        check_fp8()
    if not config.objective.classifies:
        from univitar_ds.model.towers import check_text_library

        check_text_library()


def check_text(config: RunConfig) -> None:
    """Checks the tokenizer and the text tower that the run file names.

    Raises: ConfigError if the tokenizer cannot be used or does not fit the tower; CheckpointError if the folder of the
        tower cannot be used.
    """
    from univitar_ds.model.towers import check_text_folder
    from univitar_ds.tokenization import load_tokenizer, special_ids

    text = config.model.text
    if config.objective.classifies or config.model.init_part == "model":
        return
    given = given_tokenizer(config)
    special = special_ids(load_tokenizer(given)) if given is not None else None
    if text.path is not None and special is not None:
        check_text_folder(text, special.vocab_size)


def given_tokenizer(config: RunConfig) -> Path | None:
    """Returns the path of `model.text.tokenizer`, or of the tokenizer.json in `model.text.path`; None without both."""
    text = config.model.text
    return Path(text.tokenizer) if text.tokenizer else Path(text.path, TOKENIZER) if text.path else None


def open_start(config: RunConfig) -> StoredModel | None:
    """Returns the model that the run starts from (`model.init_from`), None without one.

    A model on S3 or on the hub is copied to this machine first, and the checksums of a run's checkpoint are compared.

    Raises: CheckpointError or ConfigError if it cannot be opened.
    """
    from univitar_ds.data.storage.base import StorageSettings
    from univitar_ds.formats.recognise import open_stored

    if config.model.init_from is None:
        return None
    startup.phase(f"reading and checking {config.model.init_from}")
    try:
        return open_stored(config.model.init_from, settings=StorageSettings.of(config.data))
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"model.init_from: {error}") from error


def check_shapes(config: RunConfig, start: StoredModel | None, ranks: int | None = None) -> None:
    """Checks the shapes of the run's model, and that the weights it starts from fit them and are complete.

    Args: start: the opened model `model.init_from`, None without one; ranks: number of ranks, None if unknown.
    Raises: CheckpointError or ConfigError if something does not fit.
    """
    from univitar_ds.model.build import check_model
    from univitar_ds.model.from_stored import check_complete

    part = "encoder" if config.objective.classifies else config.model.init_part
    taken = start.joint if start is not None and part == "model" else None
    check_model(with_joint(config, taken).model, start, part, ranks)
    if start is not None:
        check_complete(start if part == "model" else start.encoder_only())


def with_joint(config: RunConfig, joint: JointConfig | None) -> RunConfig:
    """Returns the configuration with embedding width, pooling heads and context length of the model it starts from.

    Only keys that the run file leaves out are set.

    Args: joint: of the whole model that the run starts from; None: nothing is changed.
    Raises: ConfigError if the run file sets `model.text.tokenizer`, which comes with that model.
    """
    if joint is None:
        return config
    if config.model.text.tokenizer is not None:
        raise ConfigError("model.init_part is model, so init_from brings the tokenizer; leave model.text.tokenizer out")
    model = config.model
    given = {name: getattr(joint, name) for name in ("embed_dim", "pool_heads") if name not in model.model_fields_set}
    text = model.text
    if "context_length" not in text.model_fields_set:
        text = text.model_copy(update={"context_length": joint.context_length})
    return config.model_copy(update={"model": model.model_copy(update={**given, "text": text})})


def existing_parent(path: Path) -> Path:
    """Returns the absolute `path`, or its nearest parent that exists."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def check_lengths(run: Path) -> None:
    """Checks the path of a run's folder. Raises: OSError if a name in it is too long for the file system."""
    import errno

    parent = existing_parent(run)
    limit = os.pathconf(parent if parent.is_dir() else parent.parent, "PC_NAME_MAX")
    for name in run.absolute().relative_to(parent).parts:
        if len(os.fsencode(name)) > limit:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(run))
