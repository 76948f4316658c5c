"""Whose turn it is: samples of several groups of shards in given shares, by smooth weighted round robin.

Every sample that a lane takes costs its group a whole and gives every group its share, so after any number of
samples each group has had its share of them to within one or two, whatever the shares are. All numbers are whole.
"""

from __future__ import annotations

from collections.abc import Mapping


class WeightedRoundRobin:
    """The state is one small number for each group, its credit."""

    def __init__(self, shares: Mapping[str, int], credits: Mapping[str, int]) -> None:
        """Args: the share of every group, at least 1; credits of earlier turns, 0 where there are none."""
        assert shares, "no group to take from"
        assert min(shares.values()) >= 1, shares
        self._shares = dict(shares)
        self._whole = sum(shares.values())
        self.credits = {name: credits.get(name, 0) for name in shares}

    def next(self) -> str:
        """The group that the next sample comes from; the same until one was `taken`."""
        if len(self._shares) == 1:
            return next(iter(self._shares))
        return max(self._shares, key=lambda name: self.credits[name] + self._shares[name])

    def taken(self) -> None:
        """A sample came from the group whose turn it was."""
        name = self.next()
        for other, share in self._shares.items():
            self.credits[other] += share
        self.credits[name] -= self._whole
