"""The positions of the ranks of a run that hangs, and the ranks that the others wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from univitar_ds.training.watch.phases import FIRST_STEPS, STEP, Position

SILENT = "does not answer (it has ended, or code that it runs holds the GIL)"
MAX_HOSTS = 4
"""Maximum number of machines of missing ranks that a message names."""


@dataclass(frozen=True)
class Whereabouts:
    """The position of a rank when its watchdog answered; see `phases.Position` for the fields of the same name.

    `on_device`: the collective that its device has not completed, if any."""

    rank: int
    host: str
    section: str
    step: int
    phase: str
    call: str
    calls: int
    on_device: str = ""
    ended: bool = False
    """Whether the rank has finished training and its watchdog has stopped."""

    @classmethod
    def of(cls, position: Position, rank: int, host: str, on_device: str = "", ended: bool = False) -> Whereabouts:
        """Returns the position of a rank."""
        given = (position.section, position.step, position.phase, position.call, position.calls)
        return cls(rank, host, *given, on_device, ended)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return asdict(self)

    @property
    def waits(self) -> bool:
        """Whether the rank waits for other ranks."""
        return bool(self.call or self.on_device) and not self.ended

    @property
    def text(self) -> str:
        """The predicate of a sentence about the rank, such as "is in forward of step 7"."""
        if self.ended:
            return "has finished training"
        place = f"{self.phase} of step {self.step}" if self.section in (STEP, FIRST_STEPS) else f"the {self.section}"
        device = f", with {self.on_device} not completed" if self.on_device else ""
        if self.call:
            return f"waits in {self.call}, {place}, collective {self.calls}{device}"
        return f"is in {place}{device}"


def missing(found: Sequence[Whereabouts | None]) -> list[int]:
    """Returns the ranks that the others wait for: those that do not answer or do not wait themselves; without any,
    those that have begun the fewest calls; empty if all ranks wait in the same call.

    Args: found: by rank; None: the rank did not answer."""
    absent = [rank for rank, where in enumerate(found) if where is None or not (where.waits or where.ended)]
    if absent:
        return absent
    counts = {rank: where.calls for rank, where in enumerate(found) if where is not None and where.waits}
    if len(set(counts.values())) < 2:
        return []
    return [rank for rank, calls in counts.items() if calls == min(counts.values())]


def described(found: Sequence[Whereabouts | None], hosts: Sequence[str]) -> str:
    """Returns a sentence about all ranks, the missing ones first. Args: found: as for `missing`; hosts: by rank."""
    first = missing(found)
    groups: dict[str, list[int]] = {}
    for rank in [*first, *(rank for rank in range(len(found)) if rank not in set(first))]:
        where = found[rank]
        text = SILENT if where is None else where.text
        groups.setdefault(text, []).append(rank)
    parts = [_part(text, ranks, hosts if ranks[0] in first else None) for text, ranks in groups.items()]
    if not first and len(found) > 1:
        parts.append("no rank is missing, so a network or a GPU does not answer")
    return "; ".join(parts)


def _part(text: str, ranks: Sequence[int], hosts: Sequence[str] | None) -> str:
    """Returns a part of the sentence. Args: hosts: by rank; None: not named."""
    names = list(dict.fromkeys(hosts[rank] for rank in ranks if hosts[rank])) if hosts else []
    more = ", ..." if len(names) > MAX_HOSTS else ""
    on = f" on {', '.join(names[:MAX_HOSTS])}{more}" if names else ""
    return f"rank {ranks[0]}{on} {text}" if len(ranks) == 1 else f"ranks {ranges(ranks)}{on}: each {text}"


def ranges(ranks: Sequence[int]) -> str:
    """Returns sorted ranks as text, such as "0-2, 5"."""
    texts: list[str] = []
    start = before = ranks[0]
    for rank in [*ranks[1:], None]:
        if rank is None or rank != before + 1:
            texts.append(str(start) if start == before else f"{start}-{before}")
            start = rank
        before = rank
    return ", ".join(texts)
