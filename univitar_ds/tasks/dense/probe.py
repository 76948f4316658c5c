"""Trains and scores the dense probe: a linear head on the features of patches, for semantic segmentation.

As in DINOv2 (arXiv:2304.07193): features are standardised as by a batch norm, the head is one linear layer, and for the
score its logits are upsampled bilinearly to the image. In training each pixel has the logits of its patch, so the loss
needs only the numbers of pixels of each class in a patch. A tenth of the training images is held out to choose among
several learning rates; the head of the best rate is scored without further training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univitar_ds.errors import ConfigError, DataError
from univitar_ds.evaluation.scores import Figure
from univitar_ds.inference.workers import device_of
from univitar_ds.screen import progress_bar
from univitar_ds.tasks.cached.token_cache import Standard, Tokens, tokens
from univitar_ds.tasks.dense.encoding import request
from univitar_ds.tasks.dense.files import MOST_LABELS, MaskOptions, Pair, read_ahead, read_labels, split_pairs
from univitar_ds.tasks.dense.miou import accuracy, constant, counted, intervals, mean_iou
from univitar_ds.tasks.dense.views import Views
from univitar_ds.tasks.models import OpenedModel
from univitar_ds.tasks.peers import OpenedPeer
from univitar_ds.tasks.probes.sweep import ProbeOptions, Recipe, chosen, linear_heads, row_batches, train
from univitar_ds.tasks.sources import DataOptions, tokens_cache

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
    opened: OpenedModel | OpenedPeer, data: DataOptions, options: DenseOptions, how: ProbeOptions
) -> tuple[list[Figure], list[str]]:
    """Returns mIoU and pixel accuracy, and notes. `chance` is the result of always predicting the most frequent class
    of the scored images.

    Args: data: the tokens of all images are stored in its cache.
    Raises: ConfigError for options that do not fit; DataError if the training images have fewer than 2 or more than
        MOST_CLASSES classes, or no scored image can be used; StorageError if the tokens take too much space.
    """
    views = Views.of(opened.patch_rule, options.window, options.stride)
    splits, ignore = _splits(data, options.masks), options.masks.ignore
    job = _Job(device_of(0), opened.token_budget, how.progress)
    requests = [
        request(opened, views, pairs, ignore, f"{what} images", labels=what == "training", progress=how.progress)
        for what, pairs in (("training", splits.train), ("scored", splits.test))
    ]
    with tokens(requests, tokens_cache(data), how.max_gb) as (learned, scored):
        bad = [f"{one.key}: {one.message}" for found in (learned, scored) for one in found.left_out]
        probe = _Probe(learned, _classes(learned, len(splits.train), bad), job)
        head, said = probe.head(how.applied(RECIPE))
        read = partial(read_labels, max_px=opened.max_image_px, ignore=ignore)
        found = _Scored(scored, views, probe, head)
        with progress_bar(total=len(splits.test), desc="scoring", unit="image", disable=not how.progress) as bar:
            for pair, labels in read_ahead(found.pairs(splits.test), read, opened.threads):
                found.add(pair, labels)
                bar.update()
    notes = [*splits.notes, f"Dense probe: {said}", *_left_out(bad, "images"), *found.notes()]
    if not found.counts:
        raise DataError(f"no image of the scored split can be used: {'; '.join(bad[:3]) or found.why()}")
    size = "native size" if views.window is None else f"windows of {views.window * views.rule.patch} px"
    return _figures(torch.stack(found.counts), f"dense probe ({size})", len(probe.classes)), notes


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


def _classes(learned: Tokens, images: int, bad: Sequence[str]) -> list[int]:
    """Returns the labels of the training images, ascending. Raises: DataError as `dense`."""
    classes = learned.classes
    if not 2 <= len(classes) <= MOST_CLASSES:
        some = ", ".join(map(str, classes[:5])) or "none"
        raise DataError(
            f"the label maps of {images} training images have {len(classes)} labels ({some}); a probe needs 2 to "
            f"{MOST_CLASSES}: see --ignore, and store classes, not instances" + "".join(f"; {one}" for one in bad[:1])
        )
    return classes


@dataclass(frozen=True)
class _Job:
    """How the head is trained: device, maximum number of tokens of a pack, and whether to show a progress bar."""

    device: torch.device
    token_budget: int
    progress: bool


@dataclass
class _Scored:
    """Scores images by the head. `counts`: `miou.counted` of each image with a known label, (3, classes); `unknown`:
    number of pixels whose label no training image has."""

    tokens: Tokens
    views: Views
    probe: _Probe
    head: nn.Linear
    counts: list[Tensor] = field(default_factory=list)
    unknown: int = 0

    @cached_property
    def _windows(self) -> dict[str, list[int]]:
        """The windows of each image."""
        found: dict[str, list[int]] = defaultdict(list)
        for item, key in enumerate(self.tokens.keys):
            found[key].append(item)
        return found

    def pairs(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Returns the pairs whose image has tokens."""
        return [pair for pair in pairs if str(pair.image) in self._windows]

    def notes(self) -> list[str]:
        """Returns a sentence about labels that no training image has."""
        if not self.unknown:
            return []
        return [f"{self.unknown} pixels of scored images have a label that no training image has, and are left out."]

    def why(self) -> str:
        """Returns why no image could be scored."""
        unknown = f"{self.unknown} pixels have a label that no training image has"
        return unknown if self.unknown else "no pixel has a label"

    @torch.no_grad()
    def add(self, pair: Pair, labels: np.ndarray | DataError) -> None:
        """Scores an image. Raises: DataError if its label map has changed since its image was read."""
        if isinstance(labels, DataError):
            raise DataError(f"{pair.mask} was changed while the images were encoded: {labels}")
        grid, items = self.views.grid(*labels.shape), self._windows[str(pair.image)]
        boxes = self.views.boxes(*grid)
        if [box.rows * box.columns for box in boxes] != [self.tokens.lengths[item] for item in items]:
            raise DataError(f"{pair.mask} was changed while the images were encoded; start again")
        device, classes = self.probe.device, self.head.out_features
        sums = torch.zeros(*grid, classes, device=device)
        times = torch.zeros(*grid, 1, device=device)
        for box, item in zip(boxes, items, strict=True):
            down, across = slice(box.top, box.top + box.rows), slice(box.left, box.left + box.columns)
            values = self.probe.standard.read(self.tokens, [item])
            sums[down, across] += self.head(values).view(box.rows, box.columns, -1)
            times[down, across] += 1
        given = torch.from_numpy(labels).long()
        known = self.probe.lut[given]
        self.unknown += int(((known < 0) & (given >= 0)).sum())
        if bool((known >= 0).any()):
            guess = enlarged_classes((sums / times).permute(2, 0, 1), *known.shape)
            self.counts.append(counted(guess.cpu(), known, classes))


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


@dataclass(frozen=True)
class _Probe:
    """The training images: tokens and labels of their windows. `classes`: their labels, ascending."""

    tokens: Tokens
    classes: list[int]
    job: _Job

    @property
    def device(self) -> torch.device:
        """The device of the head."""
        return self.job.device

    @cached_property
    def standard(self) -> Standard:
        """Standardises tokens."""
        return Standard(self.tokens, range(len(self.tokens)), self.device)

    @cached_property
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
        heads = linear_heads(len(recipe.rates), self.tokens.width, len(self.classes), self.device)
        steps, batch = recipe.plan(len(learns))

        def loss(pack: _Pack) -> Tensor:
            counts, values = self._counts(pack.labels), self.standard.read(self.tokens, pack.items)
            return torch.stack([-(counts * head(values).log_softmax(-1)).sum() for head in heads]) / pack.of_step

        desc = "dense probe" if self.job.progress else None
        train(heads, recipe.rates, recipe, self._batches(learns, batch), loss, steps=steps, progress=desc)
        held = f"{images} training images held out, at one label per patch" if images else "none"
        place, said = chosen(recipe.rates, self._held_out(heads, checks), "mIoU", held)
        return heads[place], said

    def _divided(self) -> tuple[Tensor, Tensor, int]:
        """Returns the indices of the windows to train on and of the held-out windows, and the number of held-out
        images."""
        number_of = {key: number for number, key in enumerate(dict.fromkeys(self.tokens.keys))}
        numbers = torch.tensor([number_of[key] for key in self.tokens.keys])
        order = torch.randperm(len(number_of), generator=torch.Generator().manual_seed(0))
        held = order[: max(round(HELD_OUT * len(order)), 1)] if len(order) > 1 else order[:0]
        is_held = torch.isin(numbers, held)
        return (~is_held).nonzero().flatten(), is_held.nonzero().flatten(), len(held)

    def _batches(self, learns: Tensor, batch: int) -> Iterator[list[_Pack]]:
        for rows in row_batches(learns, batch):
            packs = list(self.tokens.packs(rows.tolist(), self.job.token_budget))
            labels = [self._labels(items) for items in packs]
            known = sum(int((one >= 0).sum()) for one in labels)
            yield [_Pack(items, one, max(known, 1)) for items, one in zip(packs, labels, strict=True)]

    def _labels(self, items: list[int]) -> Tensor:
        """Returns the classes of the pixels of each patch of some windows, (T, patch^2); -1 for none."""
        return self.lut[torch.from_numpy(self.tokens.columns(items)).long()]

    def _counts(self, labels: Tensor) -> Tensor:
        """Returns the number of pixels of each class in each patch, (T, classes) float32 on the device."""
        labels, classes = labels.to(self.device), len(self.classes)
        counts = torch.zeros(len(labels), classes + 1, device=labels.device)
        places = torch.where(labels < 0, classes, labels)
        return counts.scatter_add_(1, places, torch.ones((), device=labels.device).expand(places.shape))[:, :classes]

    @torch.no_grad()
    def _held_out(self, heads: Sequence[nn.Linear], checks: Tensor) -> list[float]:
        """Returns mIoU of each head on held-out windows, with the predicted class of a patch for each of its pixels."""
        # Not `counted`: patches have numbers of pixels of each class, and stay on the device.
        found = torch.zeros(len(heads), 3, len(self.classes), dtype=torch.float64)
        for items in self.tokens.packs(checks.tolist(), self.job.token_budget):
            counts, values = self._counts(self._labels(items)), self.standard.read(self.tokens, items)
            for place, head in enumerate(heads):
                guess = head(values).argmax(1)
                right = counts.gather(1, guess[:, None])[:, 0]
                classes = {"minlength": len(self.classes)}
                found[place, 0] += torch.bincount(guess, right, **classes).cpu()
                found[place, 1] += torch.bincount(guess, counts.sum(1), **classes).cpu()
                found[place, 2] += counts.sum(0).cpu()
        return mean_iou(found).tolist()
