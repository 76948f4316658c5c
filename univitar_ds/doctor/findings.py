"""Results of checks: rows of the table, values that are compared between ranks, and the report of all rows."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median_low
from typing import Any

from univitar_ds.errors import SeveralFaults, UserError, first_line, storage_error

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
WORDS = {OK: "ok", FAILED: "FAILED", SKIPPED: "-"}
MOST_NAMES = 8
"""Maximum number of nodes or ranks that a row lists."""
LISTED = "\n  - "
"""Before each fault in a message that lists several."""
REMEDIES = {
    "run file": "edit the run file or the override; `univitar-ds config KEY` describes a key",
    "installation": "install what is named in this environment, or leave out the key that needs it",
    "plugins": "correct the code of this plugin, or leave the plugin out of `plugins`",
    "lanes": "start another number of ranks, or give a new run other data.lanes",
    "deepspeed": "edit this DeepSpeed JSON, or give deepspeed=auto",
    "run folder": "restore this file from a copy, or start a new run under another name=...",
    "teacher": "name another objective.teacher.path: a folder, an s3:// address or owner/name of the hub",
    "text tower": "name another model.text.path or model.text.tokenizer",
    "model.init_from": "name another model.init_from: a run, a folder, an s3:// address or owner/name of the hub",
    "model": "change the keys below `model`, which `univitar-ds config model` describes",
    "sources": "correct this entry of data.sources, or pack the folder again: univitar-ds data pack FOLDER OUT",
    "storage": "restore the shard or pack it again; `univitar-ds data verify SOURCE` lists all damage",
}
"""Remedies of errors whose message has none, by check."""
_OF_MACHINE = "see what this message names on the node, and run the check there alone: univitar-ds doctor"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    `check`: name of the check; `state`: OK, FAILED or SKIPPED; `found`: a sentence; `remedy`: of a failed row; `nodes`:
    names of the nodes that it is about, empty for all; `numbers`: measured values by name, which ends in the unit.
    """

    check: str
    state: str
    found: str
    remedy: str = ""
    nodes: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "nodes": list(self.nodes)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Row:
        return cls(**{**content, "nodes": tuple(content["nodes"])})


@dataclass(frozen=True)
class Found:
    """The result of a check on one rank: rows, and JSON values for `Check.compare`."""

    rows: Sequence[Row] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"rows": [row.to_json() for row in self.rows], "values": dict(self.values)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Found:
        return cls([Row.from_json(row) for row in content["rows"]], content["values"])


@dataclass(frozen=True)
class Answers:
    """The `Found.values` of a check by rank, for the ranks that answered, and the node of each rank."""

    values: Mapping[int, Mapping[str, Any]]
    nodes: Sequence[str]

    def of(self, name: str) -> dict[int, Any]:
        """Returns the value `name` by rank, for the ranks that have it."""
        return {rank: values[name] for rank, values in self.values.items() if name in values}

    def by_node(self, name: str, worst: Callable[..., float]) -> dict[str, float]:
        """Returns one number for each node: the `worst` (min or max) over its ranks of the value `name`."""
        found: dict[str, list[float]] = {}
        for rank, value in self.of(name).items():
            found.setdefault(self.nodes[rank], []).append(value)
        return {node: worst(values) for node, values in found.items()}


def from_error(check: str, error: UserError) -> list[Row]:
    """Returns a failed row for an error, whose message has the remedy after the last semicolon; without one the remedy
    is that of the check. For a SeveralFaults, and for a message that lists faults, there is a row for each."""
    if isinstance(error, SeveralFaults):
        return [row for each in error.errors for row in from_error(check, each)]
    head, *faults = str(error).split(LISTED)
    if not faults:
        return [_row(check, head)]
    where = re.sub(r" has \d+ errors?:$", ":", head)
    return [_row(check, f"{where} {fault}") for fault in faults]


def _row(check: str, message: str) -> Row:
    found, _, remedy = message.rpartition("; ")
    if not found:
        return Row(check, FAILED, message, REMEDIES.get(check, _OF_MACHINE))
    return Row(check, FAILED, found, remedy)


def from_any(check: str, error: Exception, remedy: str) -> list[Row]:
    """Returns a failed row for any error. An error of the storage has its sentence; a bug has its traceback in the log.

    Args: remedy: of a bug."""
    if isinstance(error, OSError):
        error = storage_error(error, done="read") or error
    if isinstance(error, UserError):
        return from_error(check, error)
    traceback.print_exception(error)
    return [
        Row(check, FAILED, f"{type(error).__name__}: {first_line(error)}", f"see the traceback in the log; {remedy}")
    ]


def merged(rows: Mapping[int, Sequence[Row]], nodes: Sequence[str]) -> list[Row]:
    """Returns the rows of all ranks without duplicates. `nodes` of a row are those that have it, or empty if all nodes
    that answered have it.

    Args: rows: of each rank that answered, by rank; nodes: the node of each rank.
    """
    places: dict[tuple[str, ...], tuple[Row, dict[str, None]]] = {}
    everywhere = {nodes[rank] for rank in rows}
    for rank, some in rows.items():
        for row in some:
            _, found = places.setdefault((row.check, row.state, row.found, row.remedy), (row, {}))
            found[nodes[rank]] = None
    return [replace(row, nodes=() if len(found) == len(everywhere) else tuple(found)) for row, found in places.values()]


def listed(names: Sequence[Any]) -> str:
    """Returns at most MOST_NAMES names as text, with the number of further names: "a, b and 3 more"."""
    more = len(names) - MOST_NAMES
    return ", ".join(map(str, names[:MOST_NAMES])) + (f" and {more} more" if more > 0 else "")


def ranks_named(ranks: Sequence[int], nodes: Sequence[str | None]) -> str:
    """Returns ranks and their nodes, where known, as text: "rank 3 on node-b"."""
    text = f"{'rank' if len(ranks) == 1 else 'ranks'} {listed(ranks)}"
    places = sorted({nodes[rank] for rank in ranks if nodes[rank] is not None})
    return f"{text} on {listed(places)}" if places else text


def outliers(values: Mapping[str, float], factor: float) -> list[str]:
    """Returns the names whose value is above `factor` times the lower median of all, the largest first."""
    limit = factor * median_low(values.values())
    return sorted((name for name, value in values.items() if value > limit), key=lambda name: -values[name])


@dataclass(frozen=True)
class Report:
    """The rows of all checks.

    `nodes`: name of the node of each rank, None for ranks that did not answer; `main`: whether this is rank 0, which
    prints the report, while other ranks have no rows; `hung`: whether a thread of this process is still waiting, so
    that the process must be ended by `os._exit`.
    """

    rows: Sequence[Row]
    nodes: Sequence[str | None] = field(default_factory=list)
    main: bool = True
    hung: bool = False

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.state == FAILED]

    def to_json(self) -> dict[str, Any]:
        return {"ok": not self.failed, "ranks": len(self.nodes), "nodes": list(self.nodes),
                "rows": [row.to_json() for row in self.rows]}  # fmt: skip

    def lines(self) -> Iterator[tuple[str, str, str]]:
        """Yields lines as (state, word, text): each row, its remedy if it failed, and at the end the number of failed
        rows.

        State and word are empty in lines that continue a row.
        """
        width = max((len(row.check) for row in self.rows), default=0)
        for row in self.rows:
            where = f"{listed(row.nodes)}: " if row.nodes else ""
            yield row.state, f"{WORDS[row.state]:<6}", f"  {row.check:<{width}}  {where}{row.found}"
            if row.state == FAILED:
                yield "", "", f"{'':<{width + 10}}remedy: {row.remedy}"
        count = len(self.failed)
        yield "", "", ""
        if count:
            yield FAILED, "FAILED", f"  {count} of {len(self.rows)} rows; the remedies are above"
        else:
            yield OK, "ok", f"  {len(self.rows)} rows, none failed"
