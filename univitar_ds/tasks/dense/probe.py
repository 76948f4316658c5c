"""Trains and scores the dense probe: a linear head on the features of patches, for semantic segmentation.

As in DINOv2 (arXiv:2304.07193): features are standardised as by a batch norm, the head is one linear layer, and for the
score its logits are upsampled bilinearly to the image. In training each pixel has the logits of its patch, so the loss
needs only the numbers of pixels of each class in a patch. A tenth of the training images is held out to choose among
several learning rates; the head of the best rate is scored without further training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univitar_ds.data.media.types import check_area
from univitar_ds.errors import ConfigError, DataError
from univitar_ds.evaluation.scores import Figure
from univitar_ds.geometry import PATCH
from univitar_ds.inference.reading import Reading
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.screen import progress_bar
from univitar_ds.tasks.dense.files import (
    MOST_LABELS,
    MaskOptions,
    Pair,
    SegmentedImage,
    read_pair,
    read_pairs,
    split_pairs,
)
from univitar_ds.tasks.dense.miou import accuracy, constant, counted, intervals, mean_iou
from univitar_ds.tasks.dense.views import Views, crop, encode, of_patches, patch_labels
from univitar_ds.tasks.probes.sweep import Recipe, chosen, linear_heads, row_batches, train
from univitar_ds.tasks.probes.token_store import RowStore, TokenStore
from univitar_ds.tasks.sources import DataOptions, default_cache

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates that are compared: our choice, around the 1e-3 of DINOv2."""
RECIPE = Recipe("adamw", RATES, batch=16, epochs=20, least_steps=500, decay=1e-4)
"""Batch size and weight decay are those of DINOv2. Epochs and the minimum number of steps are our choice."""
HELD_OUT = 0.1
"""Share of the training images on which the learning rate is chosen."""
MOST_CLASSES = 2048
"""Maximum number of classes: more labels are probably numbers of instances."""
_CELLS = 1 << 25
"""Maximum number of logits that are upsampled at a time."""


@dataclass(frozen=True)
class DenseOptions:
    """Options of `eval dense` about label maps and windows. `window`, `stride`: in pixels."""

    masks: MaskOptions = field(default_factory=MaskOptions)
    window: int | None = None
    stride: int | None = None


class _Splits(NamedTuple):
    """Pairs to train on and to score, and notes about images that were left out."""

    train: list[Pair]
    test: list[Pair]
    notes: list[str]


def dense(
    encoder: UniViTAR,
    reading: Reading,
    data: DataOptions,
    options: DenseOptions,
    *,
    epochs: int | None = None,
    progress: bool,
) -> tuple[list[Figure], list[str]]:
    """Returns mIoU and pixel accuracy, and notes. `chance` is the result of always predicting the most frequent class
    of the scored images.

    Args: data: tokens of the training images are stored in its cache, in temporary files without a name; epochs: None:
        those of `RECIPE`.
    Raises: ConfigError for options that do not fit; DataError if the training images have fewer than 2 or more than
        MOST_CLASSES classes, or no scored image can be used; StorageError if the disk is full.
    """
    views = Views.of(reading.encoder, options.window, options.stride)
    splits = _splits(data, options.masks)
    recipe = RECIPE if epochs is None else replace(RECIPE, epochs=epochs, least_steps=1)
    device, folder = next(encoder.parameters()).device, data.cache or default_cache()
    with TokenStore(folder) as tokens, RowStore(folder, PATCH * PATCH, np.int16) as rows:
        job = _Job(encoder, reading, views, options.masks.ignore, device, progress)
        learned = _Learned(tokens, rows, job)
        learned.read(splits.train)
        head, said = learned.head(recipe)
        images, unknown = job.scored(splits.test, tokens, head, learned.lut)
    notes = [*splits.notes, f"Dense probe: {said}", *_left_out(job.bad, "images")]
    if unknown:
        notes.append(f"{unknown} pixels of scored images have a label that no training image has, and are left out.")
    if not len(images):
        why = f"{unknown} pixels have a label that no training image has" if unknown else "no pixel has a label"
        raise DataError(f"no image of the scored split can be used: {'; '.join(job.bad[:3]) or why}")
    how = "native size" if views.window is None else f"windows of {views.window * PATCH} px"
    return _figures(images, f"dense probe ({how})", len(learned.classes)), notes


def _splits(data: DataOptions, masks: MaskOptions) -> _Splits:
    learned = data.train_data or data.data
    train, without = split_pairs(learned, data.train_split, masks.train_masks or masks.masks, masks)
    test, missing = split_pairs(data.data, data.split, masks.masks, masks)
    if both := {pair.image.resolve() for pair in train} & {pair.image.resolve() for pair in test}:
        raise ConfigError(
            f"the probe would learn from {len(both)} images that it is scored on, such as {min(both)}; name others "
            "with --train-split or --train-data"
        )
    found = [f"{count} images of the {name} split have no label map, and are left out."
             for count, name in ((without, "training"), (missing, "scored")) if count]  # fmt: skip
    return _Splits(train, test, found)


def _left_out(bad: Sequence[str], what: str) -> list[str]:
    if not bad:
        return []
    more = f", and {len(bad) - 3} more" if len(bad) > 3 else ""
    return [f"{len(bad)} {what} cannot be used and are left out: {'; '.join(bad[:3])}{more}."]


def _figures(images: Tensor, task: str, classes: int) -> list[Figure]:
    """Args: images: (n, 3, classes), of `miou.counted`."""
    counts = images.sum(0)
    always = constant(counts, int(counts[2].argmax()))
    names = ("mIoU", "accuracy of pixels")
    return [
        Figure(task, name, "image", measure(counts).item(), measure(always).item(), len(images), classes, None, one)
        for name, measure, one in zip(names, (mean_iou, accuracy), intervals(images), strict=True)
    ]


@dataclass
class _Job:
    """Reads and encodes images. `bad`: the reasons why images were left out, one for each."""

    encoder: UniViTAR
    reading: Reading
    views: Views
    ignore: Sequence[int]
    device: torch.device
    progress: bool
    bad: list[str] = field(default_factory=list)

    def read(self, pairs: Sequence[Pair], what: str) -> Iterator[SegmentedImage]:
        """Yields the images of `pairs` that can be used. Args: what: description for the progress bar."""
        data = self.reading.data

        def read(pair: Pair) -> SegmentedImage:
            one = read_pair(pair, data.max_image_px, self.ignore)
            rows, columns = self.views.grid(*one.labels.shape)
            check_area(rows * PATCH, columns * PATCH, data.max_image_px)  # windows may enlarge a narrow image
            return one

        with progress_bar(total=len(pairs), desc=what, unit="image", disable=not self.progress) as bar:
            for one in read_pairs(pairs, read, max(data.workers, 1), self.bad):
                yield one
                bar.update()

    @torch.no_grad()
    def scored(self, pairs: Sequence[Pair], tokens: TokenStore, head: nn.Linear, lut: Tensor) -> tuple[Tensor, int]:
        """Returns `miou.counted` of each image with a known label, (n, 3, classes), and the number of pixels whose
        label is unknown. Args: lut: see `_Learned.lut`."""
        found, unknown = [], 0
        for one in self.read(pairs, "scored images"):
            (rows, columns), windows = self.views.cut(one.pixels)
            sums = torch.zeros(rows, columns, head.out_features, device=self.device)
            times = torch.zeros(rows, columns, 1, device=self.device)
            features = encode(self.encoder, [pixels for _, pixels in windows], self.reading.token_budget)
            for (box, _), values in zip(windows, features, strict=True):
                down, across = slice(box.top, box.top + box.rows), slice(box.left, box.left + box.columns)
                sums[down, across] += head(tokens.standardised(values)).view(box.rows, box.columns, -1)
                times[down, across] += 1
            given = torch.from_numpy(one.labels).long()
            labels = lut[given]
            unknown += int(((labels < 0) & (given >= 0)).sum())
            if bool((labels >= 0).any()):
                guess = enlarged_classes((sums / times).permute(2, 0, 1), *labels.shape)
                found.append(counted(guess.cpu(), labels, head.out_features))
        return torch.stack(found) if found else torch.empty(0, 3, head.out_features), unknown


def enlarged_classes(logits: Tensor, height: int, width: int) -> Tensor:
    """Returns the class with the largest logit at each pixel of an image, after bilinear upsampling: (height, width).

    Upsamples some rows at a time, since the logits of 150 classes for a photo would take 10 GB.
    Args: logits: (classes, h, w).
    """
    classes, h, _ = logits.shape
    taps = F.interpolate(torch.eye(h, device=logits.device)[None], height, mode="linear", align_corners=False)[0].T
    found = []
    for some in taps.split(max(1, _CELLS // (classes * width))):
        rows = torch.einsum("sh,chw->csw", some, logits)
        found.append(F.interpolate(rows, width, mode="linear", align_corners=False).argmax(0))
    return torch.cat(found)


class _Pack(NamedTuple):
    """Items of a pack, the classes of the pixels of their T patches (T, 196), and the number of labelled pixels of the
    step that the pack belongs to."""

    items: list[int]
    labels: Tensor
    of_step: int


class _Learned:
    """The training images: tokens and labels of their windows, on disk. `classes`: their labels, ascending."""

    def __init__(self, tokens: TokenStore, rows: RowStore, job: _Job) -> None:
        self._tokens, self._rows, self._job = tokens, rows, job
        self._images: list[int] = []
        self._pixels = np.zeros(MOST_LABELS, np.int64)
        self.classes: list[int] = []

    def read(self, pairs: Sequence[Pair]) -> None:
        """Encodes the images, and stores tokens and labels.

        Raises: DataError if the images have fewer than 2 or more than MOST_CLASSES classes."""
        job = self._job
        for number, one in enumerate(job.read(pairs, "training images")):
            grid, windows = job.views.cut(one.pixels)
            small = patch_labels(one.labels, *grid)
            features = encode(job.encoder, [pixels for _, pixels in windows], job.reading.token_budget)
            for (box, _), values in zip(windows, features, strict=True):
                self._tokens.append(values, [len(values)])
                self._rows.append(of_patches(crop(small, box)))
                self._images.append(number)
            self._pixels += np.bincount(one.labels[one.labels >= 0], minlength=MOST_LABELS)
        self.classes = np.flatnonzero(self._pixels).tolist()
        if not 2 <= len(self.classes) <= MOST_CLASSES:
            some = ", ".join(map(str, self.classes[:5])) or "none"
            raise DataError(
                f"the label maps of {len(pairs)} training images have {len(self.classes)} labels ({some}); a probe "
                f"needs 2 to {MOST_CLASSES}: see --ignore, and store classes, not instances"
                + "".join(f"; {one}" for one in job.bad[:1])
            )
        self._tokens.finish(job.device)

    @property
    def lut(self) -> Tensor:
        """The class of each label, (MOST_LABELS + 1,); -1 for other labels and, as the last element, for the label
        -1."""
        lut = torch.full((MOST_LABELS + 1,), -1)
        lut[self.classes] = torch.arange(len(self.classes))
        return lut

    def head(self, recipe: Recipe) -> tuple[nn.Linear, str]:
        """Returns the head of the learning rate that is best on the held-out images, and a sentence about the
        choice."""
        learns, checks, images = self._divided()
        heads = linear_heads(len(recipe.rates), self._tokens.width, len(self.classes), self._job.device)
        steps, batch = recipe.plan(len(learns))

        def loss(pack: _Pack) -> Tensor:
            counts, tokens = self._counts(pack.labels), self._tokens.read(pack.items)
            return torch.stack([-(counts * head(tokens).log_softmax(-1)).sum() for head in heads]) / pack.of_step

        desc = "dense probe" if self._job.progress else None
        train(heads, recipe.rates, recipe, self._batches(learns, batch), loss, steps=steps, progress=desc)
        held = f"{images} training images held out, at one label per patch" if images else "none"
        place, said = chosen(recipe.rates, self._held_out(heads, checks), "mIoU", held)
        return heads[place], said

    def _divided(self) -> tuple[Tensor, Tensor, int]:
        """Returns the indices of the windows to train on and of the held-out windows, and the number of held-out
        images."""
        numbers = torch.tensor(self._images)
        images = numbers.unique()
        order = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        held = order[: max(round(HELD_OUT * len(order)), 1)] if len(order) > 1 else order[:0]
        is_held = torch.isin(numbers, held)
        return (~is_held).nonzero().flatten(), is_held.nonzero().flatten(), len(held)

    def _batches(self, learns: Tensor, batch: int) -> Iterator[list[_Pack]]:
        for rows in row_batches(learns, batch):
            packs = list(self._tokens.packs(rows.tolist(), self._job.reading.token_budget))
            labels = [self._labels(items) for items in packs]
            known = sum(int((one >= 0).sum()) for one in labels)
            yield [_Pack(items, one, max(known, 1)) for items, one in zip(packs, labels, strict=True)]

    def _labels(self, items: list[int]) -> Tensor:
        """Returns the classes of the pixels of each patch of some windows, (T, 196); -1 for none."""
        lengths = self._tokens.lengths
        parts = [self._rows.read(self._tokens.begin(item), lengths[item]) for item in items]
        return self.lut[torch.from_numpy(np.concatenate(parts)).long()]

    def _counts(self, labels: Tensor) -> Tensor:
        """Returns the number of pixels of each class in each patch, (T, classes) float32 on the device."""
        labels, classes = labels.to(self._job.device), len(self.classes)
        counts = torch.zeros(len(labels), classes + 1, device=labels.device)
        places = torch.where(labels < 0, classes, labels)
        return counts.scatter_add_(1, places, torch.ones((), device=labels.device).expand(places.shape))[:, :classes]

    @torch.no_grad()
    def _held_out(self, heads: Sequence[nn.Linear], checks: Tensor) -> list[float]:
        """Returns mIoU of each head on held-out windows, with the predicted class of a patch for each of its pixels."""
        found = torch.zeros(len(heads), 3, len(self.classes), dtype=torch.float64)
        for items in self._tokens.packs(checks.tolist(), self._job.reading.token_budget):
            counts, tokens = self._counts(self._labels(items)), self._tokens.read(items)
            for place, head in enumerate(heads):
                guess = head(tokens).argmax(1)
                right = counts.gather(1, guess[:, None])[:, 0]
                classes = {"minlength": len(self.classes)}
                found[place, 0] += torch.bincount(guess, right, **classes).cpu()
                found[place, 1] += torch.bincount(guess, counts.sum(1), **classes).cpu()
                found[place, 2] += counts.sum(0).cpu()
        return mean_iou(found).tolist()
