"""Finds and checks the shards of a run's sources before training starts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.shards.class_names import read_class_names, shared_names
from univitar_ds.data.shards.hold_out import HELD_OUT, HoldOut
from univitar_ds.data.shards.line_watch import LineWatch
from univitar_ds.data.shards.listing import INIT_HINT, Shard, list_shards, place_of, warn_once
from univitar_ds.data.storage.address import real_place, storage_for
from univitar_ds.data.storage.base import LOCAL, S3, StorageSettings
from univitar_ds.data.storage.parallel import at_once
from univitar_ds.errors import DataError
from univitar_ds.expressions import Condition
from univitar_ds.geometry import Modality

EVERYTHING = ""
"""Name of the single group of a stage without weights: all shards of all sources."""
WHOLE = 1_000_000
"""The sum of the shares of groups, which are in millionths."""
SPOT_CHECKS, SPOT_BYTES = 512, 4096
"""The fingerprint covers the first SPOT_BYTES of up to SPOT_CHECKS shards without a hash: the header of the first
member, with its time, and the beginning of its content. A remote store answers 512 requests within two seconds."""


@dataclass(frozen=True)
class SourceShard(Shard):
    """A shard with the settings of its source: `source`, the name in `stages.N.weights`; `templates`, captions for
    samples with only a label; `class_names`, names of labels that are numbers. Shards of a source share `watch`."""

    source: str = ""
    watch: LineWatch | None = field(default=None, compare=False)
    templates: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()


AnyShard = TypeVar("AnyShard", bound=Shard)


class ShardGroup(NamedTuple):
    """Shards that a stage reads with one weight. Each group has separate epochs; an epoch has each sample once.

    `shards` are indices into the run's shards. `share` is the group's share of all samples, in millionths.
    """

    name: str
    share: int
    shards: tuple[int, ...]


def stage_modalities(stage: StageConfig) -> set[Modality]:
    """Returns the modalities that a stage reads."""
    used: dict[Modality, bool] = {"image": stage.video_ratio < 1, "video": stage.video_ratio > 0}
    return {modality for modality, wanted in used.items() if wanted}


def validate_sources(
    sources: Sequence[SourceConfig], stages: Sequence[StageConfig], settings: StorageSettings = LOCAL
) -> list[SourceShard]:
    """Returns all shards of the sources, after checking that each modality of each stage has shards.

    Uses only names and sizes, so it is fast. Call it before starting processes.
    Raises: DataError if a source has no shard or lacks its split, if a shard is missing or truncated, or if a stage has
    no shards for one of its modalities.
    """
    shards = find_shards(sources, settings)
    check_stages(shards, sources, stages)
    return shards


def check_stages(shards: Sequence[SourceShard], sources: Sequence[SourceConfig], stages: Sequence[StageConfig]) -> None:
    """Raises DataError if a stage has no shards for one of its modalities."""
    for stage in stages:
        for modality in sorted(stage_modalities(stage)):
            if not groups_of(shards, modality, stage.weights):
                raise _lacking(shards, sources, stage, modality)


def check_parts(shards: Sequence[SourceShard]) -> None:
    """Checks that all sources with a shard divide it in the same way, however their paths are written.

    Args: shards: of training and evaluation. Raises: DataError if a shard is read with different `hold_out`.
    """
    if all(shard.hold_out is None for shard in shards):
        return
    shares: dict[str, float | None] = {}
    for shard in shards:
        own = None if shard.hold_out is None else shard.hold_out.share
        other = shares.setdefault(real_place(shard.path), own)
        if other != own:
            one, two = ("null" if value is None else value for value in (other, own))
            raise DataError(
                f"shard {shard.path} is in sources with hold_out {one} and {two}, so samples that are trained on could "
                "be evaluated; give all of them the same hold_out"
            )


def find_shards(sources: Sequence[SourceConfig], settings: StorageSettings = LOCAL) -> list[SourceShard]:
    """Returns all shards of the sources in order; within a source in the order of its manifest or of the names.

    With several sources, shard names begin with the position of their source, so that keys are unique.
    Raises: DataError as `list_shards` does, or if a source has no shard, with a sentence for each such source.
    """

    def listed(position: int) -> list[Shard] | str:
        try:
            if shards := list_shards(sources[position], f"{position}:" if len(sources) > 1 else "", settings):
                return shards
        except DataError as error:
            return str(error)
        pack = f"`univitar-ds data pack {sources[position].path} OUT` names the captions or labels that they lack"
        hint = f"give its subfolders with shards as sources; if it holds images and videos, {pack}"
        return f"source {sources[position].path}: no shard found (*.tar) in this folder; {hint}"

    all_listed = list(at_once(listed, range(len(sources)), [storage_for(place_of(one), settings) for one in sources]))
    if faults := [shards for shards in all_listed if isinstance(shards, str)]:
        raise DataError("; ".join(dict.fromkeys(faults)))
    found = [one for source, some in zip(sources, all_listed, strict=True) for one in of_source(some, source, settings)]
    if shared := [path for path, count in Counter(shard.path for shard in found).items() if count > 1]:
        warn_once(f"{len(shared)} shards are in several sources, such as {shared[0]}; each source reads their samples")
    return found


def of_modality(shards: Sequence[Shard], modality: Modality) -> list[int]:
    """Returns indices of the shards that may hold samples of this modality."""
    return [index for index, shard in enumerate(shards) if shard.modality in (None, modality)]


def on_s3(shards: Sequence[Shard]) -> bool:
    return any(shard.path.startswith(S3) for shard in shards)


def groups_of(shards: Sequence[SourceShard], modality: Modality, weights: Mapping[str, float]) -> list[ShardGroup]:
    """Returns the groups that a stage with these weights reads for a modality, in the order of the sources.

    Sources with no weight, weight 0 or no shard of the modality are left out, and the shares of the others are
    normalized. Without any weights there is one group of all shards.
    """
    indices = of_modality(shards, modality)
    if not weights:
        return [ShardGroup(EVERYTHING, 1, tuple(indices))] if indices else []
    by_source: dict[str, list[int]] = {}
    for index in indices:
        by_source.setdefault(shards[index].source, []).append(index)
    shares = shares_of({name: weights.get(name, 0.0) for name in by_source})
    return [ShardGroup(name, share, tuple(by_source[name])) for name, share in shares.items()]


def fingerprint(shards: Sequence[SourceShard], content: str | None = None) -> str:
    """Returns a hash of the data in two parts separated by ":": of names, sizes and manifest hashes of all shards, and
    parts that are read, and `content`, by default `content_of` the shards. It does not depend on their location.

    Raises: DataError as `content_of` does.
    """
    state = hashlib.blake2b(digest_size=16)
    for shard in shards:
        part = "" if shard.hold_out is None else f"\0{shard.hold_out}"
        state.update(f"{shard.name}\0{shard.size}\0{shard.sha256 or ''}{part}\n".encode("utf-8", "surrogateescape"))
    return f"{state.hexdigest()}:{content_of(shards) if content is None else content}"


def content_of(shards: Sequence[SourceShard]) -> str:
    """Returns a hash of class names and of the first bytes of up to `SPOT_CHECKS` evenly spaced shards without a hash.

    Raises: DataError if one of these shards cannot be read.
    """
    content = hashlib.blake2b(digest_size=16)
    of_sources = {(shard.source, id(shard.class_names)): shard.class_names for shard in shards}  # one entry per source
    for place, (_, names) in enumerate(dict.fromkeys((name, names) for (name, _), names in of_sources.items())):
        content.update("\n".join((str(place), *names)).encode() if names else b"")
    unknown = spread([shard for shard in shards if shard.sha256 is None], SPOT_CHECKS)
    for beginning in at_once(_beginning, unknown, [shard.storage for shard in unknown]):
        content.update(beginning)
    return content.hexdigest()


def _beginning(shard: Shard) -> bytes:
    return shard.storage.read_range(shard.path, 0, min(SPOT_BYTES, shard.size))


def spread(shards: Sequence[AnyShard], most: int) -> list[AnyShard]:
    """Returns at most `most` of the shards, evenly spaced."""
    count = min(most, len(shards))
    return [shards[index * len(shards) // count] for index in range(count)]


def of_source(
    shards: Sequence[Shard], source: SourceConfig, settings: StorageSettings, names: Sequence[str] | None = None
) -> list[SourceShard]:
    """Returns the shards with the settings of their source. Raises: DataError if class names cannot be read.

    Args: names: the class names, if they are known."""
    if names is None:
        names = read_class_names(source.class_names, settings) if source.class_names else ()
    if shared := shared_names(names):
        warn_once(f"{source.class_names}: {shared}")
    about: dict[str, Any] = {"source": source.label, "watch": LineWatch(source), "templates": tuple(source.templates)}
    about |= {"class_names": tuple(names), "caption_lines": source.captions == "lines"}
    about["where"] = None if source.where is None else Condition(source.where, source.label)
    about["hold_out"] = None if source.hold_out is None else HoldOut(source.hold_out, source.split == HELD_OUT)
    known = [part.name for part in fields(Shard) if part.name not in about]
    return [SourceShard(**{name: getattr(shard, name) for name in known}, **about) for shard in shards]


def _lacking(
    shards: Sequence[SourceShard], sources: Sequence[SourceConfig], stage: StageConfig, modality: Modality
) -> DataError:
    remedy = f"set its video_ratio to {0 if modality == 'video' else 1}"
    if of_modality(shards, modality):
        named = ", ".join(name for name, weight in stage.weights.items() if weight > 0)
        return DataError(
            f"stage {stage.name} needs {modality} samples, but the sources that its weights name ({named}) hold none; "
            f"give a source with {modality} samples a weight or {remedy}"
        )
    present = sorted({shard.modality for shard in shards if shard.modality})
    return DataError(
        f"stage {stage.name} needs {modality} samples, but the sources ({', '.join(s.path for s in sources)}) hold "
        f"only {' and '.join(present)} samples; add a source with {modality} samples or {remedy}; {INIT_HINT}"
    )


def shares_of(weights: Mapping[str, float]) -> dict[str, int]:
    """Returns the share of each group with a weight above 0, in millionths."""
    total = sum(weights.values())
    return {name: max(1, round(weight / total * WHOLE)) for name, weight in weights.items() if weight > 0}
