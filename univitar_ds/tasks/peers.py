"""A peer as the model of a task: CLIP, SigLIP, SigLIP 2 or DINOv2/3 of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from univitar_ds.data.shards.sources import SourceShard
from univitar_ds.errors import CheckpointError, ConfigError
from univitar_ds.geometry import Modality
from univitar_ds.inference.embed_files import ModelOptions, data_settings, processes_of, reading_settings
from univitar_ds.inference.reading import FRAMES
from univitar_ds.inference.sources import fingerprint_of
from univitar_ds.inference.workers import device_of
from univitar_ds.model.placement import feature_dtype
from univitar_ds.peers.families import FAMILIES, digest
from univitar_ds.peers.limits import check_files
from univitar_ds.peers.model import PeerModel
from univitar_ds.peers.processing import vision_config
from univitar_ds.peers.setup import PeerReading, PeerSetup
from univitar_ds.peers.sizes import MOST_TOKENS, PatchSizes
from univitar_ds.tasks.cached.feature_cache import PART_ROWS
from univitar_ds.tasks.sizes import PatchRule, peer_views


@dataclass(frozen=True)
class OpenedPeer:
    """A peer, with the same interface as `models.OpenedModel`. The model is built when it is first needed."""

    name: str
    found: PeerSetup
    nproc: int
    recipe = None
    """Only models of this project are from runs."""

    @property
    def video_note(self) -> str:
        """Sentence about how the model reads videos."""
        frames = self.found.reading.frames
        return f"{self.name} reads images only: the features of a video are the mean of those of {frames} frames."

    @property
    def has_texts(self) -> bool:
        """Whether the model has a text tower."""
        return FAMILIES[self.found.peer].texts

    @property
    def token_budget(self) -> int:
        """Maximum number of tokens of a pack."""
        return self.found.tokens_at_once

    most_tokens = None
    """Peers that read several sizes name no maximum number of tokens."""

    @cached_property
    def vision(self) -> Any:
        """The configuration of the vision tower."""
        return vision_config(Path(self.found.folder), self.found.peer)

    @property
    def any_size(self) -> bool:
        """Whether the model reads images of any size, in whole patches."""
        return FAMILIES[self.found.peer].any_size

    def check_sizes(self, why: str) -> None:
        """Raises: ConfigError if the model reads squares of one size only. Args: why: what needs other sizes."""
        if not self.any_size:
            side = self.vision.image_size
            raise ConfigError(
                f"{self.name} is a {self.found.peer} model, which reads squares of {side} px only, "
                f"{(side // self.vision.patch_size) ** 2} tokens; {why}"
            )

    def token_setup(self, modality: Modality, most: int | None) -> PeerSetup:
        """Returns the settings of all tokens of items of a modality, see `PeerModel.encoded`.

        Args: most: maximum number of tokens of an item at its native size; None: as the image processor makes them.
        Raises: ConfigError if `most` is given for a model of one size, or has no patch for each frame."""
        reading = replace(self.found.reading, only=modality)
        if most is not None:
            self.check_sizes("leave --max-tokens out")
            frames = reading.frames if modality == "video" else 1
            if most < frames:
                raise ConfigError(f"--max-tokens {most}: a video of {frames} frames has at least one token a frame")
            reading = replace(reading, resolution=PatchSizes(self.vision.patch_size, most))
        return replace(self.found, kind="tokens", reading=reading)

    @property
    def max_image_px(self) -> int:
        """Maximum number of pixels of an image."""
        return self.found.reading.data.max_image_px

    @property
    def threads(self) -> int:
        """Number of threads that read files."""
        return max(self.found.reading.data.workers, 1)

    @property
    def patch_rule(self) -> PatchRule:
        """How the model divides images into patches."""
        patch = self.vision.patch_size
        if self.any_size:
            return PatchRule(patch, 1, 1, MOST_TOKENS, patch)
        side = self.vision.image_size
        return PatchRule(patch, 1, 1, (side // patch) ** 2, patch, side, only_fixed=True)

    def sized(self, count: int, modality: Modality, *, texts: bool) -> dict[str, PeerSetup]:
        """Returns the settings of features at a number of tokens for each view.

        Raises: ConfigError as `sizes.peer_views`, or if the model reads squares of one size only."""
        self.check_sizes("a sweep over tokens needs a model of several sizes, such as DINOv2 or SigLIP 2 NaFlex")
        reading = self.found.reading
        both = peer_views(self.vision.patch_size, count, reading.frames if modality == "video" else 1)
        return {
            view: replace(self.found, reading=replace(reading, only=modality, resolution=rule))
            for view, rule in both.items()
        }

    def check_texts(self) -> None:
        """Raises: ConfigError if the model has no text tower."""
        if not self.has_texts:
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
            "features": setup.kind,
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
