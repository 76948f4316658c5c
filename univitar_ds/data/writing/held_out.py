"""Holds some samples of data without splits out for evaluation while they are packed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from univitar_ds.data.importing.rows import Row
from univitar_ds.data.shards.hold_out import HELD_OUT, number_of
from univitar_ds.data.writing.examine import MediaInfo

Sample = tuple[Row, MediaInfo]
_Class = tuple[str | None, str | None]
"""A data set and a label in it."""


def divided(samples: Sequence[Sample], share: float) -> list[Sample]:
    """Returns the samples, those that are held out with the split `HELD_OUT`.

    The content of a file decides, so equal files are on one side whatever their names. Of images, and of videos, at
    least one is held out if there are two, and at least one is not; nor is one of each class with two. This alone
    depends on the other samples.
    """
    files: dict[str, dict[str, set[_Class]]] = {}
    for row, info in samples:
        of_file = files.setdefault(info.kind, {}).setdefault(info.sha256, set())
        of_file |= {(row.set, row.label)} if row.label is not None else set()
    chosen = {kind: held_out(classes, share) for kind, classes in files.items()}
    return [(replace(row, split=HELD_OUT) if info.sha256 in chosen[info.kind] else row, info) for row, info in samples]


def held_out(classes: dict[str, Collection[_Class]], share: float) -> set[str]:
    """Returns the identities that are held out. Args: classes: of each identity."""
    ordered = sorted(classes, key=lambda one: (number_of(one), one))
    members: dict[_Class, list[str]] = {}
    for one in ordered:
        for name in classes[one]:
            members.setdefault(name, []).append(one)
    chosen = {one for one in ordered if number_of(one) < share}
    for own in members.values():
        if len(own) > 1 and chosen.issuperset(own):
            chosen.discard(own[-1])
    if len(ordered) > 1 and len(chosen) == len(ordered):
        chosen.discard(ordered[-1])
    if len(ordered) > 1 and not chosen:
        spare = (one for one in ordered if all(len(members[name]) > 1 for name in classes[one]))
        chosen = {next(spare, ordered[0])}
    return chosen if len(ordered) > 1 else set()
