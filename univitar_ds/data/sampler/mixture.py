"""Mixes samples of several groups in given shares by smooth weighted round robin.

For each sample, the credit of every group grows by the group's share, and the credit of the sample's group falls by the
sum of all shares. So after any number of samples, the number from each group differs from its share by at most two. All
numbers are integers.
"""

from __future__ import annotations

from collections.abc import Mapping


class WeightedRoundRobin:
    """Chooses the group of each sample. The state is one integer per group, its credit."""

    def __init__(self, shares: Mapping[str, int], credits: Mapping[str, int]) -> None:
        """Args: shares: share of every group, at least 1; credits: saved credits; 0 for other groups."""
        assert shares, "no group to take from"
        assert min(shares.values()) >= 1, shares
        self._shares = dict(shares)
        self._whole = sum(shares.values())
        self.credits = {name: credits.get(name, 0) for name in shares}

    def next(self) -> str:
        """Returns the group of the next sample. The result does not change until `taken` is called."""
        if len(self._shares) == 1:
            return next(iter(self._shares))
        return max(self._shares, key=lambda name: self.credits[name] + self._shares[name])

    def taken(self, name: str) -> None:
        """Updates the credits after a sample of group `name`, the result of `next`, was used."""
        for other, share in self._shares.items():
            self.credits[other] += share
        self.credits[name] -= self._whole
