"""A peer as the model of a task: CLIP, SigLIP, SigLIP 2 or DINOv2/3 of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor

from univitar_ds.data.shards.sources import SourceShard
from univitar_ds.errors import CheckpointError, ConfigError
from univitar_ds.inference.embed_files import ModelOptions, data_settings, processes_of, reading_settings
from univitar_ds.inference.reading import FRAMES
from univitar_ds.inference.sources import fingerprint_of
from univitar_ds.inference.workers import device_of
from univitar_ds.model.placement import feature_dtype
from univitar_ds.peers.families import FAMILIES, digest
from univitar_ds.peers.limits import check_files
from univitar_ds.peers.model import PeerModel
from univitar_ds.peers.setup import PeerReading, PeerSetup
from univitar_ds.tasks.feature_cache import PART_ROWS


@dataclass(frozen=True)
class OpenedPeer:
    """A peer, with the same interface as `models.OpenedModel`. The model is built when it is first needed."""

    name: str
    found: PeerSetup
    nproc: int

    @property
    def video_note(self) -> str:
        """Sentence about how the model reads videos."""
        frames = self.found.reading.frames
        return f"{self.name} reads images only: the features of a video are the mean of those of {frames} frames."

    @property
    def model(self) -> NoReturn:
        """Raises: ConfigError, since a peer does not encode packs of tokens."""
        raise ConfigError(
            f"{self.name} is a {self.found.peer} model of transformers, which only the tasks zero-shot, retrieval, knn "
            "and linear can measure; name a model of this project"
        )

    def check_texts(self) -> None:
        """Raises: ConfigError if the model has no text tower."""
        if not FAMILIES[self.found.peer].texts:
            raise ConfigError(
                f"{self.name} is a {self.found.peer} model, which has no text tower; this task needs one: "
                "choose knn or linear, or name a CLIP or SigLIP model"
            )

    def setup(self, *, texts: bool) -> PeerSetup:
        """Returns the settings of the features, the same for all tasks, see `PeerModel.images`."""
        return self.found

    def settings(self, setup: PeerSetup, places: Sequence[SourceShard]) -> dict[str, Any]:
        """Returns all that determines the features, see `feature_cache.FeatureModel`."""
        return {
            "peer": setup.peer,
            "model": self._digest,
            "dtype": str(setup.dtype or feature_dtype(device_of(0))),
            "sources": fingerprint_of(places),
            "tokens_at_once": setup.tokens_at_once,
            "part_rows": PART_ROWS,
            "libraries": [metadata.version(name) for name in ("transformers", "pillow")],
            **reading_settings(setup.reading),
        }

    @cached_property
    def _digest(self) -> str:
        return digest(Path(self.found.folder))

    @cached_property
    def _built(self) -> PeerModel:
        return self.found.load(0)

    def texts(self, sentences: Sequence[str]) -> Tensor:
        """Returns the embeddings of sentences, (n, E) unit vectors float32 on the host."""
        return F.normalize(self._built.texts(sentences), dim=-1)


def open_peer(name: str, folder: Path, kind: str, how: ModelOptions) -> OpenedPeer:
    """Opens a peer. Args: kind: its `model_type`. Raises: CheckpointError if a file or an option cannot be used."""
    if how.weights is not None:
        raise CheckpointError(f"{name} is a {kind} model, which has one kind of weights; leave --weights out")
    check_files(folder)
    nproc = processes_of(how)
    reading = PeerReading(data_settings(how, nproc, None), how.frames or FRAMES)
    return OpenedPeer(name, PeerSetup(str(folder), kind, how.dtype, how.token_budget, reading), nproc)
