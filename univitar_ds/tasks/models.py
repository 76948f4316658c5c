"""The model of a task: one of this project in any format of `convert`, or a peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from univitar_ds.config.schema import RunConfig
from univitar_ds.data.shards.sources import SourceShard
from univitar_ds.errors import CheckpointError, ConfigError
from univitar_ds.evaluation.configured import last_stage
from univitar_ds.evaluation.embed import embed_texts
from univitar_ds.formats.recognise import FORMATS, model_type, recognised
from univitar_ds.geometry import Modality
from univitar_ds.inference.embed_files import (
    ModelOptions,
    Opened,
    digest_of,
    model_folder,
    open_for_files,
    recipe_of,
    settings_of,
)
from univitar_ds.inference.model import UniViTARModel
from univitar_ds.inference.reading import Reading
from univitar_ds.inference.workers import Setup, open_placed
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.peers.families import FAMILIES
from univitar_ds.tasks.cached.feature_cache import PART_ROWS
from univitar_ds.tasks.peers import OpenedPeer, open_peer
from univitar_ds.tasks.sizes import PatchRule, at_most, views
from univitar_ds.tokenization import tokenizer_of


@dataclass(frozen=True)
class OpenedModel:
    """A model of this project, and how items are read for it. The model is built when it is first needed."""

    name: str
    found: Opened

    @property
    def recipe(self) -> RunConfig | None:
        """The configuration of the run that the model is from; None for other models."""
        return recipe_of(self.found.stored)

    @property
    def video_note(self) -> str | None:
        """Sentence about how the model reads videos, if its run's own evaluation reads them in another way."""
        stage = None if self.recipe is None else last_stage(self.recipe, "video")
        if stage is None or stage.resolution("video") == self.reading.encoder.resolution:
            return None
        return (
            "Videos are read by the model's size rule, that of images; the run's own evaluation reads them by the rule "
            "of its last stage for videos."
        )

    @cached_property
    def model(self) -> UniViTARModel:
        """The model, on its device."""
        return open_placed(self.found.stored, 0, self.found.setup.dtype)

    @property
    def reading(self) -> Reading:
        """How items are read and packed."""
        return self.found.setup.reading

    @property
    def nproc(self) -> int:
        """Number of processes that compute features."""
        return self.found.nproc

    def check_texts(self) -> None:
        """Raises: ConfigError if the model has no text tower."""
        if not self.has_texts:
            raise ConfigError(
                f"{self.name} has no text tower, which this task needs; name a run, its export/model or another whole "
                "model, or choose knn or linear"
            )

    def setup(self, *, texts: bool) -> Setup:
        """Returns the settings of the features. Args: texts: whether they are in the joint space; False: pooled."""
        return replace(self.found.setup, kind="embedding" if texts else "pooled")

    @property
    def has_texts(self) -> bool:
        """Whether the model has a text tower."""
        return self.found.stored.joint is not None

    @property
    def token_budget(self) -> int:
        """Maximum number of tokens of a pack."""
        return self.reading.token_budget

    @property
    def most_tokens(self) -> int | None:
        """Maximum number of tokens of an item that the model is made for; None if there is none."""
        return self.reading.encoder.max_tokens

    def token_setup(self, modality: Modality, most: int | None) -> Setup:
        """Returns the settings of all tokens of items of a modality.

        Args: most: maximum number of tokens of an item; None: the model's. Raises: ConfigError as `at_most`."""
        reading = replace(self.reading, only=modality, resolution=at_most(self.reading.encoder, most))
        return replace(self.found.setup, kind="tokens", reading=reading)

    @property
    def max_image_px(self) -> int:
        """Maximum number of pixels of an image."""
        return self.reading.data.max_image_px

    @property
    def threads(self) -> int:
        """Number of threads that read files."""
        return max(self.reading.data.workers, 1)

    @property
    def patch_rule(self) -> PatchRule:
        """How the model divides images into patches."""
        return PatchRule.of(self.reading.encoder)

    def sized(self, count: int, modality: Modality, *, texts: bool) -> dict[str, Setup]:
        """Returns the settings of features at a number of tokens for each view. Raises: ConfigError as `sizes.views`.

        Args: texts: as for `setup`."""
        setup, reading = self.setup(texts=texts), self.reading
        both = views(reading.encoder, count, reading.frames if modality == "video" else 1)
        return {
            view: replace(setup, reading=replace(reading, only=modality, resolution=rule))
            for view, rule in both.items()
        }

    def settings(self, setup: Setup, places: Sequence[SourceShard]) -> dict[str, Any]:
        """Returns all that determines the features, see `feature_cache.FeatureModel`."""
        return settings_of(self.found.stored, setup, places, PART_ROWS, self._digest)

    @cached_property
    def _digest(self) -> str:
        return digest_of(self.found.stored)

    def texts(self, sentences: Sequence[str]) -> Tensor:
        """Returns the embeddings of sentences, (n, E) unit vectors float32 on the host."""
        return embed_texts(self.whole, self.tokenizer, sentences, self.model.joint.context_length)

    @property
    def whole(self) -> ContrastiveModel:
        """The two towers. Raises: ConfigError if the model has no text tower."""
        self.check_texts()
        assert isinstance(self.model.module, ContrastiveModel)
        return self.model.module

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the text tower; None without a text tower."""
        joint = self.model.joint
        return None if joint is None else tokenizer_of(joint.tokenizer)


def open_model(name: str, how: ModelOptions) -> OpenedModel | OpenedPeer:
    """Opens a model: one of this project in any format, or a peer. Raises: CheckpointError if it cannot be opened."""
    folder = model_folder(name, how)
    try:
        return _opened(name, folder, how)
    except CheckpointError as error:  # of a copy on this machine, whose name says nothing
        raise CheckpointError(str(error).replace(str(folder), name)) from error


def _opened(name: str, folder: Path, how: ModelOptions) -> OpenedModel | OpenedPeer:
    try:
        recognised(folder)
    except CheckpointError as error:
        kind = model_type(folder)
        if kind in FAMILIES:
            return open_peer(name, folder, kind, how)
        if kind is None:
            raise
        raise CheckpointError(
            f"{name} holds a {kind} model; supported are all formats of convert ({', '.join(FORMATS)}), and of "
            f"transformers {', '.join(FAMILIES)}"
        ) from error
    return OpenedModel(name, open_for_files(str(folder), how))
