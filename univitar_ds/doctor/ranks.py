"""The exchange between the ranks of the doctor: through the store of the rendezvous, without collectives.

Each wait has a limit, so that a rank that hangs or has ended is found and named, while the others continue.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from univitar_ds.doctor.findings import ranks_named
from univitar_ds.errors import UserError

SLACK_S = 5.0
"""Seconds that rank 0 waits for an answer after the limit of a check, since the other rank answers at this limit."""
_ROUNDS = 4
"""Other ranks wait for rank 0 for this many limits, since rank 0 may have to wait for some of them first."""


class Ranks:
    """This rank among the ranks. `nodes`: name of each rank's node, None before `introduce` or without an answer."""

    def __init__(self, store: dist.Store, rank: int, size: int, limit_s: float) -> None:
        self.rank, self.size, self.limit_s = rank, size, limit_s
        self.root, self.store = store, dist.PrefixStore("doctor", store)
        self.nodes: list[str | None] = [None] * size
        self.silent: dict[int, str] = {}
        """On rank 0: the ranks that did not answer, each with the name of the first exchange that they missed."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def first_of_node(self) -> bool:
        """Whether this rank is the lowest of its node."""
        return self.rank in self.firsts()

    def firsts(self) -> list[int]:
        """Returns the lowest rank of each node that has answered."""
        lowest: dict[str, int] = {}
        for rank, node in enumerate(self.nodes):
            if node is not None:
                lowest.setdefault(node, rank)
        return list(lowest.values())

    def introduce(self, node: str) -> None:
        """Exchanges the names of the nodes."""
        found = self.all_of("node", node)
        self.nodes = [found.get(rank) for rank in range(self.size)]

    def post(self, name: str, value: Any) -> None:
        """Sends a JSON value to rank 0. Raises: UserError if rank 0 has ended."""
        try:
            self.store.set(f"{name}/{self.rank}", json.dumps(value))
        except dist.DistError as error:
            raise self._main_gone() from error

    def collect(self, name: str, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """Returns, on rank 0, what the `ranks` (None: all) have posted. Those that do not answer become `silent`,
        and are not waited for again."""
        deadline, found = time.monotonic() + self.limit_s + SLACK_S, {}
        for rank in range(self.size) if ranks is None else ranks:
            key = f"{name}/{rank}"
            if rank in self.silent:
                continue
            try:
                if not self.store.check([key]):
                    self.store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
                found[rank] = json.loads(self.store.get(key))
            except dist.DistError:
                self.silent[rank] = name.removeprefix("arrive ")
        return found

    def all_of(self, name: str, value: Any) -> dict[int, Any]:
        """Returns, on every rank, the values of all ranks that answer."""
        self.post(name, value)
        return dict(self.at_main(lambda: list(self.collect(name).items()), f"all {name}"))

    def arrive(self, name: str) -> list[int]:
        """Waits for all ranks, and returns those that do not answer, the same on every rank."""
        answered = self.all_of(f"arrive {name}", None)
        return [rank for rank in range(self.size) if rank not in answered]

    def at_main(self, ask: Callable[[], Any], name: str) -> Any:
        """Returns, on every rank, the result of `ask` on rank 0."""
        if self.is_main:
            self.store.set(name, json.dumps(ask()))
        return json.loads(self._from_main(name))

    def end(self) -> None:
        """On rank 0: allows the other ranks to end. On the others: waits for that, or until rank 0 has ended."""
        if self.is_main:
            self.store.set("end", "")
            return
        try:
            self.store.wait(["end"], self._wait_for_main())
        except dist.DistError:
            return

    def _from_main(self, key: str) -> bytes:
        try:
            self.store.wait([key], self._wait_for_main())
            return self.store.get(key)
        except dist.DistError as error:
            raise self._main_gone() from error

    def _wait_for_main(self) -> timedelta:
        return timedelta(seconds=_ROUNDS * (self.limit_s + SLACK_S))

    def _main_gone(self) -> UserError:
        who = ranks_named([0], self.nodes)
        limit = _ROUNDS * (self.limit_s + SLACK_S)
        return UserError(f"{who} has ended, or does not answer within {limit:g} s; its log says why")


def who_is_silent(silent: Sequence[int], nodes: Sequence[str | None]) -> str:
    """Returns a phrase with the ranks that do not answer."""
    return f"{ranks_named(silent, nodes)} {'does' if len(silent) == 1 else 'do'} not answer"
