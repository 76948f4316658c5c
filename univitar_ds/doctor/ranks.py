"""Communication between the ranks of the doctor, through the store of the rendezvous instead of collectives.

Each wait has a limit, so that a rank that hangs or has ended is found and named while the others continue.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from univitar_ds.doctor.findings import ranks_named
from univitar_ds.errors import UserError

SLACK_S = 5.0
"""Seconds that rank 0 waits beyond the limit of a check: a rank whose check hangs answers only at this limit."""
BEAT_S = 1.0
"""Seconds between two checks of the progress of the rank that is waited for."""
_ROUNDS = 4
"""Number of limits for which other ranks wait for rank 0, since rank 0 may have to wait for some of them first."""


class Ranks:
    """This rank, and its communication with the other ranks.

    `nodes`: name of the node of each rank, None before `exchange_nodes` and for ranks that did not answer.

    Args: store: that all ranks are connected to; size: number of ranks; limit_s: seconds to wait for an answer.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, limit_s: float) -> None:
        self.rank, self.size, self.limit_s = rank, size, limit_s
        self.root, self.store = store, dist.PrefixStore("doctor", store)
        self.nodes: list[str | None] = [None] * size
        self._beats = [0] * size
        self.silent: dict[int, str] = {}
        """On rank 0: for each rank that did not answer, the name of the first exchange that it missed."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def first_of_node(self) -> bool:
        """Whether this rank is the lowest one on its node."""
        return self.rank in self.firsts()

    def firsts(self) -> list[int]:
        """Returns the lowest rank of each known node."""
        lowest: dict[str, int] = {}
        for rank, node in enumerate(self.nodes):
            if node is not None:
                lowest.setdefault(node, rank)
        return list(lowest.values())

    def exchange_nodes(self, node: str) -> None:
        """Sets `nodes` on every rank. Args: node: name of the node of this rank."""
        found = self.all_of("node", node)
        self.nodes = [found.get(rank) for rank in range(self.size)]

    def post(self, name: str, value: Any) -> None:
        """Sends a JSON value to rank 0, which gets it by `collect(name)`. Raises: UserError if rank 0 has ended."""
        try:
            self.store.set(f"{name}/{self.rank}", json.dumps(value))
        except dist.DistError as error:
            raise self._main_gone() from error

    def collect(self, name: str, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """Returns, on rank 0, the values that `ranks` (None: all) have posted, by rank.

        Ranks that do not answer are added to `silent`, and no later call waits for them.
        """
        deadline, found = time.monotonic() + self.limit_s + SLACK_S, {}
        for rank in range(self.size) if ranks is None else ranks:
            key = f"{name}/{rank}"
            if rank in self.silent:
                continue
            deadline = self._await(key, rank, deadline, self.limit_s + SLACK_S)
            try:
                if not self.store.check([key]):
                    raise dist.DistStoreError(key)
                found[rank] = json.loads(self.store.get(key))
            except dist.DistError:
                self.silent[rank] = name.removeprefix("arrive ")
        return found

    def beat(self) -> None:
        """Notes that this rank makes progress, so that others wait for it."""
        with suppress(dist.DistError):  # they have ended
            self.store.add(f"beat/{self.rank}", 1)

    def _await(self, key: str, rank: int, deadline: float, longest_s: float) -> float:
        """Waits for a key of `rank` until the deadline, which is postponed whenever that rank notes progress.

        Returns: the deadline. Raises nothing; the caller looks whether the key is there."""
        while True:
            left = deadline - time.monotonic()
            try:
                self.store.wait([key], timedelta(seconds=max(min(left, BEAT_S), 0.01)))
                return deadline
            except dist.DistNetworkError:
                return deadline
            except dist.DistError:
                if self._has_moved(rank):
                    deadline = max(deadline, time.monotonic() + longest_s)
                    self.beat()  # others wait for this rank meanwhile
                elif left <= 0:
                    return deadline

    def _has_moved(self, rank: int) -> bool:
        try:
            beats = self.store.add(f"beat/{rank}", 0)
        except dist.DistError:
            return False
        moved, self._beats[rank] = beats != self._beats[rank], beats
        return moved

    def all_of(self, name: str, value: Any) -> dict[int, Any]:
        """Returns, on every rank, the values of all ranks that answer. Raises: UserError if rank 0 has ended."""
        self.post(name, value)
        return dict(self.at_main(lambda: list(self.collect(name).items()), f"all {name}"))

    def arrive(self, name: str) -> list[int]:
        """Waits for all ranks. Returns, on every rank, the ranks that do not answer. Raises: as `all_of`."""
        answered = self.all_of(f"arrive {name}", None)
        return [rank for rank in range(self.size) if rank not in answered]

    def at_main(self, ask: Callable[[], Any], name: str) -> Any:
        """Calls `ask` on rank 0 and returns its result (JSON) on every rank. Raises: as `all_of`."""
        if self.is_main:
            self.store.set(name, json.dumps(ask()))
        return json.loads(self._from_main(name))

    def end(self) -> None:
        """Waits, on other ranks, until rank 0 calls this too or has ended: the store is in the process of rank 0."""
        if self.is_main:
            self.store.set("end", "")
            return
        self._await_main("end")

    def _from_main(self, key: str) -> bytes:
        self._await_main(key)
        try:
            if self.store.check([key]):
                return self.store.get(key)
        except dist.DistError as error:
            raise self._main_gone() from error
        raise self._main_gone()

    def _await_main(self, key: str) -> None:
        longest_s = _ROUNDS * (self.limit_s + SLACK_S)
        self._await(key, 0, time.monotonic() + longest_s, longest_s)

    def _main_gone(self) -> UserError:
        who = ranks_named([0], self.nodes)
        limit = _ROUNDS * (self.limit_s + SLACK_S)
        return UserError(f"{who} has ended, or does not answer within {limit:g} s; its log says why")


def who_is_silent(silent: Sequence[int], nodes: Sequence[str | None]) -> str:
    """Returns a sentence with the ranks that do not answer and their nodes."""
    return f"{ranks_named(silent, nodes)} {'does' if len(silent) == 1 else 'do'} not answer"
