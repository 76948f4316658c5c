"""Computes the tokens of images with label maps, in several processes as the features of other tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from univitar_ds.data.media.types import check_area
from univitar_ds.errors import DataError, SampleError, UserError
from univitar_ds.geometry import token_count
from univitar_ds.inference.reading import Grid, ItemReading, Kind, LeftOut, Rows
from univitar_ds.inference.sources import Unit, fingerprint_of
from univitar_ds.inference.workers import Setup
from univitar_ds.peers.setup import PeerSetup
from univitar_ds.tasks.cached.feature_cache import Request, versions
from univitar_ds.tasks.cached.token_cache import TokenRows
from univitar_ds.tasks.dense.files import Pair, SegmentedImage, read_ahead, read_pair
from univitar_ds.tasks.dense.views import Views, crop, encode, of_patches, patch_labels
from univitar_ds.tasks.models import OpenedModel
from univitar_ds.tasks.peers import OpenedPeer

_Encode = Callable[[Sequence[np.ndarray]], Iterator[Tensor]]
"""Yields the features of the patches of each image, (rows * columns, D) row by row."""


@dataclass(frozen=True)
class DenseSetup:
    """Settings with which a process encodes images, see `inference.workers.AnySetup`.

    `masks`: the label map of each image; `ignore`: values that are not labels; `labels`: whether the labels of the
    pixels of each patch are stored beside its token, (T, patch^2).
    """

    model: Setup | PeerSetup
    views: Views
    masks: dict[str, str]
    ignore: Sequence[int]
    labels: bool
    kind: Kind = "tokens"

    @property
    def reading(self) -> ItemReading:
        """Limits and workers."""
        return self.model.reading

    def read(self, rank: int, units: Iterator[Unit], finished: Callable[[int], None]) -> Iterator[Rows]:
        """Yields the tokens of the windows of each image; the windows of an image have the same key."""
        encoder = self._encoder(rank)
        for unit in units:
            yield self._rows(unit, encoder, finished)

    def _rows(self, unit: Unit, encoder: _Encode, finished: Callable[[int], None]) -> TokenRows:
        pairs = [Pair(Path(file), Path(self.masks[file])) for file in unit.files]
        keys: list[str] = []
        grids: list[Grid] = []
        values: list[np.ndarray] = []
        columns: list[np.ndarray] = []
        left_out: list[LeftOut] = []
        classes: set[int] = set()
        for pair, one in read_ahead(pairs, self._read, max(self.reading.data.workers, 1)):
            finished(1)
            if isinstance(one, DataError):
                kind = one.kind if isinstance(one, SampleError) else "unreadable"
                left_out.append(LeftOut(str(pair.image), kind, str(one)))
                continue
            grid, windows = self.views.cut(one.pixels)
            values += [found.float().cpu().numpy() for found in encoder([pixels for _, pixels in windows])]
            keys += [str(pair.image)] * len(windows)
            grids += [(1, box.rows, box.columns) for box, _ in windows]
            if self.labels:
                patch = self.views.rule.patch
                small = patch_labels(one.labels, *grid, patch)
                columns += [of_patches(crop(small, box, patch), patch) for box, _ in windows]
                classes |= set(np.unique(one.labels[one.labels >= 0]).tolist())
        joined = np.concatenate(values) if values else np.empty((0, 0), np.float32)
        labels = np.concatenate(columns) if columns else None
        return TokenRows(unit, keys, grids, joined, left_out, labels, sorted(classes))

    def _read(self, pair: Pair) -> SegmentedImage:
        most = self.reading.data.max_image_px
        one = read_pair(pair, most, self.ignore)
        rows, columns = self.views.grid(*one.labels.shape)
        patch = self.views.rule.patch
        check_area(rows * patch, columns * patch, most)  # windows may enlarge a narrow image
        return one

    def _encoder(self, rank: int) -> _Encode:
        patch = self.views.rule.patch
        if isinstance(self.model, PeerSetup):
            peer, at_once = self.model.load(rank), self.model.tokens_at_once

            def by_peer(images: Sequence[np.ndarray]) -> Iterator[Tensor]:
                sizes = [(image.shape[0] // patch, image.shape[1] // patch) for image in images]
                yield from peer.encoded(images, at_once, sizes=sizes, patches=True)[0]

            return by_peer
        model, budget = self.model.load(rank), self.model.reading.token_budget

        def by_model(images: Sequence[np.ndarray]) -> Iterator[Tensor]:
            try:
                yield from encode(model.encoder, images, budget)
            except torch.OutOfMemoryError as error:
                most = max(token_count((image.shape[0] // patch, image.shape[1] // patch)) for image in images)
                raise UserError(
                    f"the GPU has too little memory for images of {most} tokens ({error}); lower --token-budget, or "
                    "give a smaller --window"
                ) from error

        return by_model


def request(
    opened: OpenedModel | OpenedPeer,
    views: Views,
    pairs: Sequence[Pair],
    ignore: Sequence[int],
    split: str,
    *,
    labels: bool,
    progress: bool,
) -> Request:
    """Returns the request for the tokens of images. Args: split: for messages; labels: see `DenseSetup`."""
    masks = {str(pair.image): str(pair.mask) for pair in pairs}
    images, model = tuple(masks), opened.token_setup("image", None)
    settings = {
        **opened.settings(model, [images]),
        "masks": fingerprint_of([tuple(masks.values())]),
        "views": repr(views),
        "ignore": [*ignore],
        "labels": labels,
        "versions": versions(),
    }
    about = {"model": opened.name, "data": str(pairs[0].image.parent), "split": split}
    setup = DenseSetup(model, views, masks, tuple(ignore), labels)
    return Request(setup, [images], settings, opened.nproc, about, f"features of {split}", progress)
