"""Checks before the first step that the sources contain the modalities that a run reads.

Manifests list the modalities. Tars without a manifest are scanned: first the beginning of a few tars, which is nearly
always enough, then all up to a limit. The check fails if a modality is missing in all tars; at the limit it only warns.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.shards import tar_index
from univitar_ds.data.shards.listing import INIT_HINT
from univitar_ds.data.shards.samples import is_read, modality_of
from univitar_ds.data.shards.sources import (
    SourceShard,
    find_shards,
    groups_of,
    spread,
    stage_modalities,
    validate_sources,
)
from univitar_ds.data.storage.base import S3, StorageSettings
from univitar_ds.data.storage.parallel import AT_ONCE, at_once
from univitar_ds.data.storage.streams import RangeReader
from univitar_ds.errors import DataError
from univitar_ds.geometry import Modality

_log = logging.getLogger(__name__)

FIRST_SHARDS, FIRST_SAMPLES = 64, 32
"""Numbers of evenly spaced shards, and of samples of each, that are scanned first, in 1 or 2 requests per shard."""
MAX_SAMPLES = 500_000
"""Maximum number of samples that are scanned: ten seconds of CPU time on a local disk."""
MAX_REMOTE_BYTES = 256 << 20
"""Maximum number of bytes fetched. Headers are between the media, so scanning a remote tar fetches most of it."""
NO_MEDIA = "without media"


@dataclass(frozen=True)
class Contents:
    """The number of samples found in `shards` shards, by "image", "video" and `NO_MEDIA`.

    `whole`: whether all samples were counted, because the scan ended neither at a limit nor with the wanted modalities.
    """

    shards: int
    counts: Counter[str]
    whole: bool

    def sentence(self) -> str:
        """Returns the counts as text for a message."""
        counts = sorted((kind, count) for kind, count in self.counts.items() if count)
        found = ", ".join(f"{count} {kind}{'s' if count > 1 and kind != NO_MEDIA else ''}" for kind, count in counts)
        return f"{found or 'no sample'} in {self.shards} shard{'s' if self.shards > 1 else ''}"


class _Scan(NamedTuple):
    counts: Counter[str]
    samples: int
    fetched: int
    whole: bool


def contents_of(
    shards: Sequence[SourceShard], wanted: Collection[Modality], *, one_is_enough: bool = False
) -> Contents:
    """Scans until a sample of each `wanted` modality is found; with `one_is_enough`, of one of them.

    Raises: DataError if a shard cannot be read.
    """
    listed: Counter[str] = Counter()
    unknown = []
    for shard in shards:
        if shard.modality is None or shard.hold_out is not None:  # its number of held-out samples is unknown
            unknown.append(shard)
        else:
            listed[shard.modality] += 1 if shard.samples is None else shard.samples

    def enough(counts: Counter[str]) -> bool:
        return (any if one_is_enough else all)(counts[modality] for modality in wanted)

    if enough(listed) or not unknown:
        return Contents(len(shards), listed, whole=not unknown)
    first = spread(unknown, FIRST_SHARDS)
    counts = listed.copy()
    bounds = {"most_samples": FIRST_SAMPLES, "most_fetched": MAX_REMOTE_BYTES // FIRST_SHARDS, "enough": enough}
    for begin in range(0, len(first), AT_ONCE):
        some = first[begin : begin + AT_ONCE]
        for found in at_once(partial(_scan, **bounds), some, [shard.storage for shard in some]):
            counts += found.counts
        if enough(counts):
            return Contents(len(shards), counts, whole=False)
    counts, samples, fetched = listed.copy(), 0, 0
    for shard in unknown:
        found = _scan(shard, MAX_SAMPLES - samples, MAX_REMOTE_BYTES - fetched, enough)
        counts += found.counts
        samples, fetched = samples + found.samples, fetched + found.fetched
        if enough(counts) or not found.whole:
            return Contents(len(shards), counts, whole=False)
    return Contents(len(shards), counts, whole=True)


def faults_of_stages(shards: Sequence[SourceShard], stages: Sequence[StageConfig]) -> list[str]:
    """Returns an error message for each modality that a stage reads and no shard has; warns if that is uncertain.

    Raises: DataError if a shard cannot be read.
    """
    asked: dict[tuple[int, ...], set[Modality]] = {}
    needs: list[tuple[StageConfig, Modality, tuple[int, ...]]] = []
    for stage in stages:
        for modality in sorted(stage_modalities(stage)):
            groups = groups_of(shards, modality, stage.weights)
            indices = tuple(sorted(index for group in groups for index in group.shards))
            asked.setdefault(indices, set()).add(modality)
            needs.append((stage, modality, indices))
    looked = {indices: contents_of([shards[i] for i in indices], wanted) for indices, wanted in asked.items()}
    faults = []
    for stage, modality, indices in needs:
        found = looked[indices]
        if found.counts[modality]:
            continue
        ratio = 0 if modality == "video" else 1
        if found.whole:
            faults.append(
                f"stage {stage.name} needs {modality} samples, but its sources hold none ({found.sentence()}, all of "
                f"them scanned); add a source with {modality}s or set the stage's video_ratio to {ratio}; {INIT_HINT}"
            )
        else:
            _log.warning(
                "stage %s needs %s samples, and none was found yet (found: %s, not all of them scanned); if there is "
                "none, the run ends at the first step that needs one: set the stage's video_ratio to %d then",
                *(stage.name, modality, found.sentence(), ratio),
            )
    return faults


def fault_of_evaluation(shards: Sequence[SourceShard], stages: Sequence[StageConfig]) -> str | None:
    """Returns an error message if the evaluation's shards have no sample that the stages could read, else None.

    Raises: DataError if a shard cannot be read.
    """
    wanted = sorted({modality for stage in stages for modality in stage_modalities(stage)})
    if not shards:
        return None
    found = contents_of(shards, wanted, one_is_enough=True)
    if not found.whole or any(found.counts[modality] for modality in wanted):
        return None
    return (
        f"evaluation.sources hold nothing to measure: the stages read {' and '.join(f'{one}s' for one in wanted)}, and "
        f"they hold {found.sentence()}; name a source with {wanted[0]}s, or remove evaluation.sources"
    )


def check_contents(config: RunConfig, shards: Sequence[SourceShard], evaluation: Sequence[SourceShard]) -> None:
    """Checks the shards of training and evaluation. Raises: DataError if they lack a modality that the run reads."""
    faults = faults_of_stages(shards, config.stages)
    if (fault := fault_of_evaluation(evaluation, config.stages)) is not None:
        faults.append(fault)
    if faults:
        raise DataError("; ".join(faults))


def faults_of_run(config: RunConfig, settings: StorageSettings) -> list[str]:
    """Returns an error message for each modality that the run reads and the existing sources lack."""
    faults: list[str] = []
    with suppress(DataError):
        shards = find_shards(config.data.sources, settings)
        try:
            validate_sources(config.data.sources, config.stages, settings)
            faults += faults_of_stages(shards, config.stages)
        except DataError as error:
            faults.append(str(error))
    with suppress(DataError):
        evaluation = find_shards(config.evaluation.sources, settings)
        faults += filter(None, [fault_of_evaluation(evaluation, config.stages)])
    return faults


def _scan(shard: SourceShard, most_samples: int, most_fetched: int, enough: Callable[[Counter[str]], bool]) -> _Scan:
    """Counts the samples of a shard by modality, from its beginning until a limit or until the counts are `enough`."""
    counts: Counter[str] = Counter()
    remote = shard.path.startswith(S3)
    ranges = RangeReader(shard.storage, shard.path, shard.size) if remote else None  # `open` would download the shard
    with shard.storage.open(shard.path) if ranges is None else ranges.buffered() as stream:
        samples, fetched = 0, 0
        for found in tar_index.scan(stream, shard.name, shard.size):
            if samples >= most_samples or fetched >= most_fetched or enough(counts):
                return _Scan(counts, samples, fetched, whole=False)
            if isinstance(found, tar_index.Group):
                samples += 1
                if not is_read(stream, shard, found):
                    continue
                counts[modality_of(found) or NO_MEDIA] += 1
            fetched = 0 if ranges is None else ranges.fetched
    return _Scan(counts, samples, fetched, whole=True)
