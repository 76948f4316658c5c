"""The evaluation that a run file configures: the packs of its sources, and the figures of their embeddings.

`run` uses it after training, `during_training` while a run trains.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from univitar_ds.config.run_folder import TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.loader import EvalShare, eval_packs
from univitar_ds.data.shards.sources import SourceShard, stage_modalities
from univitar_ds.evaluation.embed import Embeddings, embed_texts
from univitar_ds.evaluation.measure import measure
from univitar_ds.evaluation.scores import Figure
from univitar_ds.geometry import Modality
from univitar_ds.model.contrastive import ContrastiveModel


def last_stage(config: RunConfig, modality: Modality) -> StageConfig | None:
    """Returns the last stage that trains on this modality; None if no stage does."""
    return next((stage for stage in reversed(config.stages) if modality in stage_modalities(stage)), None)


def packs_of(
    config: RunConfig, run: Path, stage: StageConfig, modality: Modality, share: EvalShare | None = None
) -> Generator[PackedBatch]:
    """Yields the packs of a modality. Must be closed.

    Args: run: folder with the tokenizer; stage: determines the sizes; share: that of one of several ranks, None for all
        items.
    """
    return eval_packs(
        config.evaluation.sources,
        modality=modality,
        resolution=stage.resolution(modality),
        video_frames=stage.video_frames,
        token_budget=config.evaluation.token_budget,
        tokenizer=None if config.objective.classifies else run / TOKENIZER,
        context_length=config.model.text.context_length,
        data=config.data,
        share=share,
    )


def figures_of(
    config: RunConfig,
    model: ContrastiveModel,
    tokenizer: Tokenizer,
    found: Embeddings,
    shards: Sequence[SourceShard],
) -> tuple[list[Figure], list[str]]:
    """Returns the scores of one modality and notes, see `measure`. Args: shards: of all sources."""
    templates = config.evaluation.image_templates if found.modality == "image" else config.evaluation.video_templates
    return measure(
        found,
        templates,
        partial(embed_texts, model, tokenizer, context_length=config.model.text.context_length),
        expected=any(shard.modality == found.modality for shard in shards),
        named=any(shard.class_names for shard in shards),
    )


def no_class_measured(notes: Sequence[str]) -> str:
    """Returns the error message of an evaluation of a classifier without figures."""
    return (
        f"the evaluation measured nothing: {' '.join(notes) or 'its sources have no items that the stages read.'} "
        "The head has the labels of the run's classes.json; name a source with such labels in evaluation.sources"
    )
