"""Decodes units of files or samples in confined processes, and computes their features pack by pack.

Items (files or samples) are decoded as in training. An item that is damaged, hostile or neither an image nor a video is
left out, and the reason is reported. With the same `Reading`, the packs of a unit depend only on the unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from univitar_ds.config.data import DataConfig
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.data.collate import decoded
from univitar_ds.data.media.augment import Augmentation, square_crop
from univitar_ds.data.media.frame_sampling import UNIFORM, Sampling
from univitar_ds.data.media.prober import MediaAddress, Prober
from univitar_ds.data.media.types import MediaSize, check_area, check_duration
from univitar_ds.data.sampler.lanes import Plan
from univitar_ds.data.shards import tar_index
from univitar_ds.data.shards.listing import Shard
from univitar_ds.data.shards.samples import Sample, SizeRule, modality_of, read_samples
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import Storage, StorageSettings
from univitar_ds.data.storage.local import LocalStorage
from univitar_ds.data.storage.parallel import at_once
from univitar_ds.errors import ConfigError, DataError, SampleError, UserError
from univitar_ds.geometry import MODALITIES, PATCH, TUBELET, Modality, Resolution, token_count
from univitar_ds.inference.model import UniViTARModel
from univitar_ds.inference.sources import Unit
from univitar_ds.model.classification import ClassificationModel, class_logits
from univitar_ds.model.contrastive import ContrastiveModel

Kind = Literal["embedding", "mean", "pooled", "tokens", "logits"]
"""Kinds of features: the joint embedding, the mean of the tokens, the pooled tokens (`UniViTARModel.pool`), all tokens,
or the logits of a classifier's head."""
FRAMES = 8
"""Default number of frames of a video."""
_READ_AT_ONCE = 32
"""Maximum number of items whose headers are read together."""
_Found = tuple[str, Sample | SampleError]
"""An item of a unit: its key, and its sample or the reason why it is left out."""


class LeftOut(NamedTuple):
    """An item that is left out: its path or key, and the kind and message of its `SampleError`."""

    key: str
    kind: str
    message: str


@dataclass(frozen=True)
class Rows:
    """The features of the N items of a unit that are not left out.

    `values`: (N, width) float32; for tokens (T, width), where T is the number of tokens of all N items. `keys` and
    `grids` have one entry per item, in the order of the unit. `left_out`: the other items of the unit.
    """

    unit: Unit
    keys: list[str]
    grids: list[tuple[int, int, int]]
    values: np.ndarray
    left_out: list[LeftOut]


@dataclass(frozen=True)
class Reading:
    """How items are read.

    `encoder` has the size rule, `data` the limits, workers and storage. `frames`: maximum number of frames of a video;
    `token_budget`: maximum number of tokens of a pack of several items.
    """

    encoder: EncoderConfig
    data: DataConfig
    token_budget: int
    frames: int = FRAMES
    sampling: Sampling = UNIFORM
    remote: bool = False
    """Whether items are on S3."""
    resolution: Resolution | None = None
    """The size rule, if it is not that of `encoder`."""
    only: Modality | None = None
    """The modality whose samples are read from shards; None: both."""
    crop: tuple[int, int] | None = None
    """Number of a square crop, and number of crops, see `square_crop`; None: the whole item."""

    def __post_init__(self) -> None:
        """Raises: ConfigError if `frames` is not a positive multiple of TUBELET."""
        if self.frames < TUBELET or self.frames % TUBELET:
            raise ConfigError(
                f"--frames {self.frames}: the encoder takes {TUBELET} frames at a time; give a positive even number"
            )

    def rules(self) -> dict[Modality, SizeRule]:
        """Returns the size rule of each modality that is read."""
        return {modality: self._rule(modality) for modality in MODALITIES if self.only in (None, modality)}

    def _rule(self, modality: Modality) -> SizeRule:
        resolution, data = self.resolution or self.encoder.resolution, self.data
        frames = self.frames if modality == "video" else 1
        cells = frames * (resolution.divisor_px // PATCH) ** 2
        # An item of min_tokens may have about twice as many after its sides are rounded up to multiples of divisor_px.
        most = max(self.token_budget, resolution.max_tokens, 2 * resolution.min_tokens + 2 * cells)
        if resolution.fixed_px is not None:
            most = max(most, token_count(resolution.grid(1, 1, frames)))
        limits = data.max_image_px, self.sampling, data.max_video_s, data.max_sample_mb
        return _ModelRule(modality, resolution, frames, most, *limits, False, self.encoder.relarge_ratio, self.crop)


class ItemReading(Protocol):
    """How items are read for any model, see `Reading`."""

    data: DataConfig
    token_budget: int
    remote: bool

    def rules(self) -> dict[Modality, SizeRule]:
        """Returns the size rule of each modality that is read."""


Grid = tuple[int, int, int]
"""The tokens of an item along time, height and width."""
Compute = Callable[["Pixels"], tuple[Sequence[Tensor], Sequence[Grid]]]
"""Returns the features of each item of a pack, (1, width) or (tokens, width) float32 on the host, and the tokens that
the model has read."""


class Pixels(NamedTuple):
    """The items of a pack. `pixels`: (bytes,) uint8 of all items in order; of each item, `frames`: number of frames,
    `grids`: tokens along time, height and width, `sizes`: height and width before resizing."""

    pixels: np.ndarray
    frames: list[int]
    grids: list[tuple[int, int, int]]
    sizes: list[tuple[int, int]]


@dataclass(frozen=True)
class _ModelRule(SizeRule):
    """The size rule of `Preprocessor`. An item may have more tokens than the token budget of a pack."""

    relarge_ratio: float = 1.0
    crop: tuple[int, int] | None = None

    def cropped(self, sample: Sample) -> Sample:
        """Returns the sample with the crop and its grid."""
        if self.crop is not None:
            crop = square_crop(sample.size.height, sample.size.width, *self.crop)
            sample.augmentation = Augmentation(crop)
            sample.grid = self.grid(crop.height, crop.width, sample.frames)
        return sample

    def grid(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        height, width = (max(1, int(side * self.relarge_ratio)) for side in (height, width))
        try:
            grid = self.resolution.grid(height, width, frames)
        except ValueError as error:
            most = self.resolution.max_tokens
            detail = f"a video of {frames} frames does not fit the model's max_tokens {most} ({error})"
            raise SampleError("too_large", f"{detail}; give fewer --frames") from error
        tokens = token_count(grid)
        assert tokens <= self.most_tokens, (grid, self)
        return grid


@dataclass(frozen=True)
class _UnitPlan(Plan):
    """A pack of a unit.

    `places`: indices of its items in the unit; `keys`: their keys; `last`: whether it is the unit's last pack, which
    may have no items; `left_out`: in the last pack, the items of the unit that are left out before decoding, with their
    indices in the unit.
    """

    unit: Unit | None = None
    places: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    left_out: tuple[tuple[int, LeftOut], ...] = ()
    last: bool = False


def read_units(
    model: UniViTARModel,
    kind: Kind,
    units: Iterable[Unit],
    reading: Reading,
    finished: Callable[[int], None] = lambda count: None,
) -> Iterator[Rows]:
    """Yields the features of each unit, in order.

    Args: units: consumed ahead, in another thread; finished: called after each pack with its number of items, the items
        left out included.
    Raises: DataError if a shard cannot be read; UserError if the GPU has too little memory for a pack.
    """
    return rows_of_units(partial(_features, model, kind), width_of(model, kind), units, reading, finished)


def rows_of_units(
    compute: Compute,
    width: int,
    units: Iterable[Unit],
    reading: ItemReading,
    finished: Callable[[int], None] = lambda count: None,
) -> Iterator[Rows]:
    """As `read_units`, for any function `compute` that returns features of `width` dimensions."""
    rules = reading.rules()
    settings = StorageSettings.of(reading.data)

    def plans_of(probe: Prober) -> Iterator[Plan]:
        numbers = itertools.count()
        for unit in units:
            yield from _plans(unit, numbers, rules, reading.token_budget, probe, settings)

    most = max(rule.most_tokens for rule in rules.values())
    packs = decoded(plans_of, reading.data, rules, most, from_s3=reading.remote)
    rows: list[tuple[int, str, Grid, Tensor]] = []
    left_out: list[tuple[int, LeftOut]] = []
    try:
        for pack in packs:
            plan = pack.plan
            failed = {index: LeftOut(plan.keys[index], why, message) for index, why, message in pack.failures}
            left_out += [*plan.left_out, *((plan.places[index], one) for index, one in failed.items())]
            kept = [index for index in range(len(plan.samples)) if index not in failed]
            samples = [plan.samples[index] for index in kept]
            grids = [one.grid for one in samples]
            if kept:
                sizes = [(one.size.height, one.size.width) for one in samples]
                found, read = compute(Pixels(pack.pixels, [one.frames for one in samples], grids, sizes))
                places = [plan.places[index] for index in kept]
                rows += zip(places, [plan.keys[index] for index in kept], read, found, strict=True)
            finished(len(plan.samples) + len(plan.left_out))
            if plan.last:
                rows.sort(key=lambda row: row[0])
                left_out.sort()
                yield _rows(plan.unit, rows, [one for _, one in left_out], width)
                rows, left_out = [], []
    finally:
        packs.close()


def width_of(model: UniViTARModel, kind: Kind) -> int:
    """Returns the width of the features."""
    if kind == "logits":
        return model.module.head.out_features
    return model.joint.embed_dim if kind == "embedding" else model.encoder.config.hidden_size


def _features(model: UniViTARModel, kind: Kind, pack: Pixels) -> tuple[Sequence[Tensor], Sequence[Grid]]:
    return _values(model, kind, pack), pack.grids


@torch.no_grad()
def _values(model: UniViTARModel, kind: Kind, pack: Pixels) -> Sequence[Tensor]:
    """Returns the features of each item of a pack: (1, width), or the tokens (t, width)."""
    frames, grids = pack.frames, pack.grids
    pixels = torch.from_numpy(pack.pixels).to(model.device)
    try:
        if kind == "embedding":
            assert isinstance(model.module, ContrastiveModel)
            values = model.module.encode_vision(pixels, torch.tensor(frames), torch.tensor(grids))
            return values.cpu().split(1)
        if kind == "logits":
            assert isinstance(model.module, ClassificationModel)
            return class_logits(model.module, pixels, torch.tensor(frames), torch.tensor(grids)).cpu().split(1)
        lengths = [token_count(grid) for grid in grids]
        packed = model.encoder(pixels, grids, frames=frames)
        if kind == "pooled":
            return model.pool(packed, lengths).float().cpu().split(1)
        tokens = packed.split(lengths)
        if kind == "mean":
            tokens = [one.float().mean(dim=0, keepdim=True) for one in tokens]
        return [one.float().cpu() for one in tokens]
    except torch.OutOfMemoryError as error:
        count = sum(map(token_count, grids))
        raise UserError(f"the GPU has too little memory for {count} tokens ({error}); lower --token-budget") from error


def _rows(unit: Unit | None, rows: Sequence[tuple], left_out: list[LeftOut], width: int) -> Rows:
    assert unit is not None
    values = torch.cat([torch.empty(0, width), *(row[3] for row in rows)]).numpy()
    return Rows(unit, [row[1] for row in rows], [tuple(row[2]) for row in rows], values, left_out)


@dataclass
class _Filling:
    """The pack that is being filled for one modality."""

    samples: list[Sample] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    tokens: int = 0


def _plans(
    unit: Unit,
    numbers: Iterator[int],
    rules: dict[Modality, SizeRule],
    token_budget: int,
    probe: Prober,
    settings: StorageSettings,
) -> Iterator[_UnitPlan]:
    """Yields the packs of a unit: items of one modality in order, up to `token_budget` tokens, or one larger item."""
    filling = {modality: _Filling() for modality in rules}
    left_out: list[tuple[int, LeftOut]] = []

    def plan(modality: Modality, last: bool = False) -> _UnitPlan:
        done, filling[modality] = filling[modality], _Filling()
        common = Plan(done.samples, modality, 0, next(numbers), None, {}, whole_files=unit.shard is None)
        own = tuple(left_out) if last else ()
        return _UnitPlan(**vars(common), unit=unit, places=(*done.places,), keys=(*done.keys,), left_out=own, last=last)

    read = _files(unit, rules, probe, settings) if unit.shard is None else _samples(unit, rules, probe, settings)
    for place, (key, sample) in enumerate(read):
        if isinstance(sample, SampleError):
            left_out.append((place, LeftOut(key, sample.kind, str(sample))))
            continue
        modality = sample.size.kind
        if isinstance(rule := rules[modality], _ModelRule):
            sample = rule.cropped(sample)
        if filling[modality].samples and filling[modality].tokens + sample.tokens > token_budget:
            yield plan(modality)
        pack = filling[modality]
        pack.samples.append(sample)
        pack.places.append(place)
        pack.keys.append(key)
        pack.tokens += sample.tokens
    rest = [modality for modality in rules if filling[modality].samples] or [next(iter(rules))]
    for modality in rest:
        yield plan(modality, last=modality == rest[-1])


def _files(unit: Unit, rules: dict[Modality, SizeRule], probe: Prober, settings: StorageSettings) -> Iterator[_Found]:
    """Yields the items of a unit of files. The content of a file determines whether it is an image or a video."""
    for begin in range(0, len(unit.files), _READ_AT_ONCE):
        paths = unit.files[begin : begin + _READ_AT_ONCE]
        storages = [storage_for(path, settings) for path in paths]
        opened = [
            *at_once(partial(_address, rules["image"].max_sample_mb), [*zip(paths, storages, strict=True)], storages)
        ]
        sizes = iter(_probed([one for one in opened if isinstance(one, MediaAddress)], probe))
        for path, media in zip(paths, opened, strict=True):
            found = next(sizes) if isinstance(media, MediaAddress) else media
            if isinstance(found, MediaSize):
                try:
                    found = _sample(media, found, rules[found.kind])
                except SampleError as error:
                    found = error
            yield path, found


def _address(max_sample_mb: int, file: tuple[str, Storage]) -> MediaAddress | SampleError:
    """Returns the address of a whole file; an error if it is too large, not a regular file, or cannot be read."""
    path, storage = file
    try:
        length = storage.size(path)
        if length and isinstance(storage, LocalStorage):  # S3 needs no check: HEAD and GET need the same permission
            storage.read_range(path, 0, 1)
    except DataError as error:
        return SampleError("unreadable", str(error))
    if length > max_sample_mb << 20:
        detail = f"the file has {length} bytes, above data.max_sample_mb = {max_sample_mb} (MiB)"
        return SampleError("too_large", detail)
    extension = path.rpartition("/")[2].rpartition(".")[2].lower()
    return MediaAddress(storage, path, 0, length, extension)


def _probed(media: Sequence[MediaAddress], probe: Prober) -> list[MediaSize | SampleError]:
    """Returns the size of each file, or its error. A file that cannot be read does not affect the other files."""
    try:
        return probe(media) if media else []
    except DataError as error:
        if len(media) == 1:
            return [SampleError("unreadable", str(error))]
        return [found for one in media for found in _probed([one], probe)]


def _sample(media: MediaAddress, size: MediaSize, rule: SizeRule) -> Sample:
    """Returns the sample of a whole file. Raises: SampleError for a size above a limit."""
    check_area(size.height, size.width, rule.max_image_px)
    check_duration(size.duration_s, rule.max_video_s)
    frames = rule.frames_of(size)
    folder, _, name = media.path.rpartition("/")
    return Sample(
        shard=Shard(folder or ".", media.path, media.storage, media.length),
        key=name,
        media_offset=0,
        media_length=media.length,
        extension=media.extension,
        captions=(),
        label=None,
        set=None,
        crc32=None,
        size=size,
        probed=True,
        grid=rule.grid(size.height, size.width, frames),
        frames=frames,
    )


def _samples(unit: Unit, rules: dict[Modality, SizeRule], probe: Prober, settings: StorageSettings) -> Iterator[_Found]:
    """Yields the items of a unit of samples, and an error for each damaged range of the shard between them."""
    assert unit.shard is not None
    shard = replace(unit.shard, storage=storage_for(unit.shard.path, settings))
    with shard.storage.open(shard.path) as stream:
        entries = tar_index.scan(stream, shard.name, shard.size, unit.start)
        inside = itertools.takewhile(lambda one: unit.end >= shard.size or one.offset < unit.end, entries)
        while batch := list(itertools.islice(inside, _READ_AT_ONCE)):
            found = _of_batch(shard, batch, rules, probe)
            for entry in batch:
                if isinstance(entry, tar_index.Damage):
                    yield f"{shard.name} at byte {entry.offset}", SampleError(entry.kind, entry.message)
                elif entry.offset in found:  # others are of a modality without a rule
                    yield f"{shard.name}/{entry.key}", found[entry.offset]


def _of_batch(
    shard: Shard, batch: Sequence[tar_index.Group | tar_index.Damage], rules: dict[Modality, SizeRule], probe: Prober
) -> dict[int, Sample | SampleError]:
    """Returns the samples of a batch, or their errors, by the offset of the sample's first header."""
    found: dict[int, Sample | SampleError] = {}
    for modality, rule in rules.items():
        groups = [
            group
            for group in batch
            if isinstance(group, tar_index.Group) and (shard.modality or modality_of(group) or "image") == modality
        ]
        samples = read_samples([(shard, group) for group in groups], rule, probe)
        found |= {group.offset: sample for group, sample in zip(groups, samples, strict=True)}
    return found
