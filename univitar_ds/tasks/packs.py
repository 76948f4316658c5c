"""The encoder's output for the packs of a source, at the model's resolution or at another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from univitar_ds.config.data import SourceConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.loader import eval_packs
from univitar_ds.errors import ConfigError
from univitar_ds.geometry import PATCH, Modality, Resolution, token_count
from univitar_ds.screen import progress_bar
from univitar_ds.tasks.models import OpenedModel
from univitar_ds.tasks.probes.token_store import checked


class Encoded(NamedTuple):
    """The n labelled items of a pack.

    `values`: from `encoded` their tokens, (T, D) on the model's device; from `pooled` (n, D) and from `embedded` (n, E)
    float32 on the host. `lengths`: number of tokens of each item.
    """

    values: Tensor
    lengths: list[int]
    labels: list[str]


def encoded(
    opened: OpenedModel,
    source: SourceConfig,
    modality: Modality,
    resolution: Resolution | None = None,
    *,
    progress: bool,
) -> Iterator[Encoded]:
    """Yields the tokens of all items that have a label. Args: resolution: None: the model's."""
    for pack in _packs(opened, source, modality, resolution, progress):
        with torch.no_grad():
            grids = [tuple(grid) for grid in pack.grid_thw.tolist()]
            tokens = opened.model.encoder(pack.pixels.to(opened.model.device), grids, frames=pack.frames.tolist())
        some, lengths, labels = _labelled(pack)
        if len(some) < len(pack):
            parts = tokens.split([token_count(grid) for grid in grids])
            tokens = torch.cat([parts[row] for row in some])
        yield Encoded(tokens, lengths, labels)


def pooled(
    opened: OpenedModel, source: SourceConfig, modality: Modality, resolution: Resolution, *, progress: bool
) -> Iterator[Encoded]:
    """Yields the pooled features of all items that have a label."""
    for tokens, lengths, labels in encoded(opened, source, modality, resolution, progress=progress):
        with torch.no_grad():
            yield Encoded(checked(opened.model.pool(tokens, lengths).float().cpu()), lengths, labels)


def embedded(
    opened: OpenedModel, source: SourceConfig, modality: Modality, resolution: Resolution, *, progress: bool
) -> Iterator[Encoded]:
    """Yields the joint embeddings of all items that have a label."""
    for pack in _packs(opened, source, modality, resolution, progress):
        with torch.no_grad():
            pixels = pack.pixels.to(opened.model.device)
            values = opened.whole.encode_vision(pixels, pack.frames, pack.grid_thw).float().cpu()
        some, lengths, labels = _labelled(pack)
        yield Encoded(checked(values[some]), lengths, labels)


def _labelled(pack: PackedBatch) -> tuple[list[int], list[int], list[str]]:
    """Returns the rows of the items that have a label, their numbers of tokens, and the labels."""
    some = [row for row, label in enumerate(pack.labels) if label is not None]
    lengths = pack.grid_thw.prod(dim=1).tolist()
    return some, [lengths[row] for row in some], [pack.labels[row] for row in some]


def at_most(opened: OpenedModel, tokens: int | None) -> Resolution | None:
    """Returns the model's resolution with at most `tokens` tokens of an item; None if `tokens` is None.

    Raises: ConfigError for fewer tokens than a cell (a square of merged patches) of the encoder has.
    """
    if tokens is None:
        return None
    rule = opened.reading.encoder.resolution
    cell = (rule.divisor_px // PATCH) ** 2
    if tokens < cell:
        raise ConfigError(f"--max-tokens {tokens}: sides are multiples of {rule.divisor_px} px; give at least {cell}")
    return replace(rule, min_tokens=min(rule.min_tokens, tokens), max_tokens=tokens, fixed_px=None)


def _packs(
    opened: OpenedModel, source: SourceConfig, modality: Modality, resolution: Resolution | None, progress: bool
) -> Iterator[PackedBatch]:
    """Yields the packs in which some item has a label."""
    reading = opened.reading
    packs = eval_packs(
        [source],
        modality=modality,
        resolution=resolution or reading.encoder.resolution,
        video_frames=reading.frames,
        token_budget=reading.token_budget,
        tokenizer=None,
        context_length=1,
        data=reading.data,
    )
    with (
        closing(packs),
        progress_bar(desc=f"{modality}s of {source.split}", unit=modality, disable=not progress) as bar,
    ):
        for pack in packs:
            if any(label is not None for label in pack.labels):
                yield pack
            bar.update(len(pack))
