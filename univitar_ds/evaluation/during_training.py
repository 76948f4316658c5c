"""Evaluates the weights of a run while it trains: on all ranks, each of which embeds a share of the items.

Each rank gathers a copy of all weights, with the values that an export would have. Ranks that share weights or packs in
training thus embed items independently. The copy is in bfloat16 on a GPU, in float32 on the CPU. If the run keeps an
average of the weights, each rank holds a copy of both, so that items are read and decoded once. Embeddings are gathered
on rank 0, which computes the figures.

Ranks wait for each other at the store of the process group, without a time limit. Work that can fail does not
communicate; if it fails on one rank, it raises on all ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from univitar_ds.classes import ClassList
from univitar_ds.config.run_folder import CLASSES, TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.loader import EvalShare
from univitar_ds.data.shards.sources import SourceShard, find_shards
from univitar_ds.data.shared_listing import listing_of, shards_of
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import DataError
from univitar_ds.evaluation.classification import Hits, class_figures, class_hits
from univitar_ds.evaluation.configured import figures_of, last_stage, no_class_measured, packs_of
from univitar_ds.evaluation.embed import Embeddings, embed_by_each
from univitar_ds.evaluation.measure import nothing_measured
from univitar_ds.evaluation.scores import Figure
from univitar_ds.evaluation.shares import gathered_embeddings, gathered_hits
from univitar_ds.formats.run import Weights, run_configuration
from univitar_ds.formats.stored_model import StoredModel, TensorInfo, Tensors
from univitar_ds.geometry import MODALITIES, Modality
from univitar_ds.model.classification import ClassificationModel
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.from_stored import build_classifier_of, build_model
from univitar_ds.model.placement import feature_dtype
from univitar_ds.tokenization import load_tokenizer
from univitar_ds.training.checkpoint.whole_weights import Whole, gather_whole, memory_for_whole
from univitar_ds.training.distributed.process_group import (
    Vote,
    World,
    all_ranks_or_none,
    broadcast_json,
    wait_for_all,
)
from univitar_ds.training.engine.engine import Engine

Model = ContrastiveModel | ClassificationModel
_Found = dict[Modality, list[Embeddings] | list[Hits]]
"""The embeddings or classified items of each modality, for each kind of weights."""


class Interrupted(Exception):
    """Raised within the work of a rank that is asked to stop, to end it."""


class DuringTraining:
    """Evaluates the weights of a run's engine. A `training.mid_evaluation.Evaluate`."""

    def __init__(self, cfg: RunConfig, run: Path, world: World) -> None:
        """Args: run: the run's folder, with its tokenizer and the configuration of its model."""
        self._cfg, self._run, self._world = cfg, run, world
        self._kinds: list[Weights] = ["trained"] if cfg.optimizer.ema_decay is None else ["averaged", "trained"]
        self._stages = {modality: last_stage(cfg, modality) for modality in MODALITIES}

    def __call__(self, engine: Engine, stopped: Callable[[], bool]) -> list[dict[str, Any]] | None:
        """Evaluates the weights of `engine`. Arguments, result and errors are those of `Evaluate`."""
        world, dtype = self._world, feature_dtype(self._world.device)
        shards = self._listed()
        share = EvalShare(shards, world.rank, world.size)
        with _together(world):
            classes = ClassList.read(self._run / CLASSES) if self._cfg.objective.classifies else None
            memories = memory_for_whole(engine, dtype, len(self._kinds))
        weights = [
            gather_whole(engine, memory, averaged=kind == "averaged")
            for kind, memory in zip(self._kinds, memories, strict=True)
        ]
        own: _Found = {}
        with _together(world, stopped) as vote:
            models = [self._model(whole, classes) for whole in weights]
            for modality, stage in self._stages.items():
                if stage is not None and not stopped():
                    own[modality] = self._found(models, classes, share, modality, stage, stopped)
        if vote.yes:
            return None
        found = {modality: self._gathered(of_modality) for modality, of_modality in own.items()}
        return self._measured(models, classes, shards, found)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._run / TOKENIZER)

    def _listed(self) -> list[SourceShard]:
        """Returns the shards of the sources, which rank 0 lists for all ranks."""
        sources, settings = self._cfg.evaluation.sources, StorageSettings.of(self._cfg.data)
        shards: list[SourceShard] = []
        with _together(self._world):
            if self._world.is_main:
                shards = find_shards(sources, settings)
        listing = broadcast_json(listing_of(shards) if self._world.is_main else None, self._world)
        with _together(self._world):
            return shards if self._world.is_main else shards_of(listing, sources, settings)

    def _model(self, whole: Whole, classes: ClassList | None) -> Model:
        """Returns a model with these weights, in evaluation mode."""
        encoder, joint = run_configuration(self._run)
        infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in whole.items()}
        stored = StoredModel(self._run, "run", encoder, Tensors(infos, whole.__getitem__), joint)
        device, dtype = self._world.device, feature_dtype(self._world.device)
        if classes is not None:
            model: Model = build_classifier_of(stored, self._cfg.model, len(classes))
        else:
            model = build_model(stored)
        return model.to(device=device, dtype=dtype)

    def _found(
        self,
        models: Sequence[Model],
        classes: ClassList | None,
        share: EvalShare,
        modality: Modality,
        stage: StageConfig,
        stopped: Callable[[], bool],
    ) -> list[Embeddings] | list[Hits]:
        """Returns the embeddings or classified items of this rank's share, by each model.

        Raises: Interrupted if this rank is asked to stop."""
        packs = packs_of(self._cfg, self._run, stage, modality, share)
        with closing(packs):
            until = _until(stopped, packs)
            if classes is not None:
                return class_hits(models, classes, until, modality, progress=False)
            return embed_by_each(models, until, modality, progress=False)

    def _gathered(self, own: list[Embeddings] | list[Hits]) -> list[Embeddings] | list[Hits] | None:
        """Returns the embeddings or classified items of all ranks on rank 0, None on the others."""
        wait_for_all(self._world)
        if own and isinstance(own[0], Hits):
            return gathered_hits(own, self._world)
        return gathered_embeddings(own, self._world)

    def _measured(
        self, models: Sequence[Model], classes: ClassList | None, shards: Sequence[SourceShard], found: _Found
    ) -> list[dict[str, Any]]:
        """Computes the results on rank 0 and returns them on all ranks."""
        answer: list[dict[str, Any]] = []
        with _together(self._world):
            for number, kind in enumerate(self._kinds) if self._world.is_main else ():
                figures: list[Figure] = []
                notes: list[str] = []
                for modality, each in found.items():
                    more, said = self._figures(models[number], classes, shards, each[number], modality)
                    figures += more
                    notes += said
                if not figures:
                    raise DataError(_nothing(found, number, notes))
                answer.append({"weights": kind, "figures": [one.to_dict() for one in figures], "notes": notes})
        return broadcast_json(json.loads(json.dumps(answer)), self._world)

    def _figures(
        self,
        model: Model,
        classes: ClassList | None,
        shards: Sequence[SourceShard],
        found: Embeddings | Hits,
        modality: Modality,
    ) -> tuple[list[Figure], list[str]]:
        if classes is not None:
            return class_figures(found, classes, modality)
        return figures_of(self._cfg, model, self._tokenizer, found, shards)


def _nothing(found: _Found, number: int, notes: Sequence[str]) -> str:
    """Returns the error message of an evaluation without figures. Args: number: index of the kind of weights."""
    each = [of_modality[number] for of_modality in found.values()]
    if all(isinstance(one, Embeddings) for one in each):
        return nothing_measured(each, [])
    return no_class_measured(notes)


@contextmanager
def _together(world: World, ask: Callable[[], bool] | None = None) -> Iterator[Vote]:
    """As `all_ranks_or_none`, but some ranks may take longer than others by more than the timeout of a collective.

    Suppresses `Interrupted`."""
    with all_ranks_or_none(world, ask) as vote:
        try:
            yield vote
        except Interrupted:
            wait_for_all(world)
        except Exception:
            wait_for_all(world)
            raise
        else:
            wait_for_all(world)


def _until(stopped: Callable[[], bool], packs: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
    """Yields the packs. Raises: Interrupted as soon as this rank is asked to stop."""
    for pack in packs:
        if stopped():
            raise Interrupted
        yield pack
