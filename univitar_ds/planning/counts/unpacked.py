"""Predicts the shards of sources that a run packs when it starts, from their listing and the headers of some files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.shards.class_names import named
from univitar_ds.data.shards.hold_out import HELD_OUT, HoldOut, check_splits
from univitar_ds.data.shards.listing import Shard, no_split
from univitar_ds.data.shards.sources import SourceShard, find_shards, of_source
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.data.storage.local import LocalStorage
from univitar_ds.data.tools.survey import Survey, Surveys
from univitar_ds.data.usable_texts import nothing_usable
from univitar_ds.data.writing.packed_sources import format_to_pack, in_run_file
from univitar_ds.errors import DataError, SampleError
from univitar_ds.geometry import PATCH, Modality


@dataclass(frozen=True)
class UnpackedShard(SourceShard):
    """All shards together that a source will have of one modality, with the `survey` of the source. They cannot be
    read."""

    survey: Survey | None = field(default=None, compare=False)

    @property
    def histogram(self) -> dict[str, int]:
        """The number of files seen by the tokens of a frame, as in a manifest."""
        assert self.survey is not None
        sizes = [size for size in self.survey.media if size.kind == self.modality]
        return dict(Counter(str(round(size.height * size.width / PATCH**2)) for size in sizes))


def find_or_predict(
    sources: Sequence[SourceConfig], settings: StorageSettings, key: str, surveys: Surveys
) -> list[SourceShard]:
    """Returns the shards of sources in order as `find_shards`, and `UnpackedShard`s for those that are not packed yet.

    Args: key: of the sources in the run file, for messages; surveys: has what was listed before.
    Raises: DataError as `find_shards`, or if a source cannot be packed.
    """
    forms = [format_to_pack(source) for source in sources]
    ready = [source for source, form in zip(sources, forms, strict=True) if form is None]
    found = find_shards(ready, settings) if ready else []
    by_source: dict[int, list[SourceShard]] = {}
    for shard in found:
        by_source.setdefault(id(shard.watch), []).append(shard)
    own = iter(by_source.values())
    shards: list[SourceShard] = []
    for number, (source, form) in enumerate(zip(sources, forms, strict=True)):
        if form is None:
            shards += next(own)
            continue
        try:
            shards += _predicted(source, surveys.of_files(source, form), form, settings)
        except DataError as error:
            raise DataError(f"{key}.{number}: {in_run_file(str(error), f'{key}.{number}')}") from error
    return shards


def _predicted(source: SourceConfig, survey: Survey, form: str, settings: StorageSettings) -> list[SourceShard]:
    whole = source.hold_out is not None or source.split is None
    if source.hold_out is not None:
        check_splits(source.path, set(survey.counts), source.split)
    elif source.split is not None and source.split not in survey.counts:
        raise no_split(source, sorted(map(str, survey.counts)))
    all_of_them = Counter[Modality]()
    for split, kinds in survey.counts.items():
        if whole or split == source.split:
            all_of_them.update(dict(kinds))
    total = sum(sum(kinds.values()) for kinds in survey.counts.values())
    part = None if source.hold_out is None else HoldOut(source.hold_out, source.split == HELD_OUT)
    shards = []
    for kind, count in all_of_them.items():
        count = count if part is None else min(count, max(1, part.expected(count)))
        size = round(survey.bytes * count / total)
        shards.append(Shard(f"{source.label}-{kind}", source.path, LocalStorage(), size, kind, samples=count))
    applied = {"hold_out": None, "class_names": None if form == "classes" else source.class_names}
    found = of_source(shards, source.model_copy(update=applied), settings)
    return [UnpackedShard(**vars(shard), survey=survey) for shard in found]


def faults_of_texts(config: RunConfig, shards: Sequence[SourceShard]) -> Iterator[str]:
    """Yields an error message for each source that is not packed yet and has no text that the objective can use, as
    `usable_texts.faults_of_texts` for the others."""
    if config.data.max_bad_per_thousand >= 1000:
        return
    classifies = config.objective.classifies
    surveys = {id(shard.watch): shard for shard in shards if isinstance(shard, UnpackedShard)}
    for shard in surveys.values():
        assert shard.survey is not None
        texts, filled = shard.survey.texts, not classifies and bool(shard.templates)
        if not any(one.label if classifies else one.captions or (filled and one.label) for one in texts):
            yield nothing_usable(shard.source, len(texts), classifies)


def labels_of(shards: Sequence[SourceShard]) -> Iterator[tuple[str | None, str]]:
    """Yields pairs (data set, label) of the sources that are not packed yet, as `labels.iterate_labels`."""
    for shard in shards:
        if not isinstance(shard, UnpackedShard):
            continue
        assert shard.survey is not None
        for data_set, label in shard.survey.labels:
            with suppress(SampleError):
                yield data_set, named(label, shard.class_names) or label
            yield from ((data_set, name) for name in shard.class_names)


def histograms_of(shards: Sequence[SourceShard]) -> dict[str, dict[str, Mapping[str, int]]]:
    """Returns the histograms of the sources that are not packed yet, by source and modality."""
    found: dict[str, dict[str, Mapping[str, int]]] = {}
    for shard in shards:
        if isinstance(shard, UnpackedShard):
            found.setdefault(shard.source, {})[str(shard.modality)] = shard.histogram
    return found
