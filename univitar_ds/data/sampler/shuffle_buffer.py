"""The shuffle buffer of a stream: samples that have been read and wait for a pack."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from univitar_ds.data.shards.samples import Sample, SampleAddress


class ShuffleBuffer:
    """Samples in the order in which they were read.

    The values that every choice of a pack needs are columns as well, because reading an attribute of every sample for
    each pack took a fifth of the planner's time.
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        """Args: samples: with `address` and `draw` set, as for `append`."""
        self.total_tokens = 0
        self._samples: list[Sample] = []
        self._tokens: list[int] = []
        self._draws, self._since = array("Q"), array("q")
        self._addresses: list[SampleAddress] = []
        self._places: list[tuple[int, int]] = []
        for sample in samples:
            self.append(sample)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    @property
    def tokens(self) -> Sequence[int]:
        """Number of tokens of each sample."""
        return self._tokens

    @property
    def addresses(self) -> Sequence[SampleAddress]:
        return self._addresses

    def append(self, sample: Sample) -> None:
        tokens = sample.tokens
        self._samples.append(sample)
        self._tokens.append(tokens)
        self._draws.append(sample.draw)
        self._since.append(sample.address.since)
        self._addresses.append(sample.address)
        self._places.append((sample.address.shard, sample.address.offset))
        self.total_tokens += tokens

    def take(self, indices: Sequence[int]) -> list[Sample]:
        """Removes samples and returns them in the order of `indices`."""
        taken = [self._samples[index] for index in indices]
        self.total_tokens -= sum([self._tokens[index] for index in indices])
        for index in sorted(indices, reverse=True):
            for column in (self._samples, self._tokens, self._draws, self._since, self._addresses, self._places):
                del column[index]
        return taken

    def shuffled(self, factor: int, packs: int) -> list[int]:
        """Returns all indices in a random order, in which samples that have waited longer tend to be earlier.

        Multiplying by an odd number gives each sample a new random number, ten times faster than a hash.

        Args: factor: odd, 64 bits, other for each pack; packs: number of packs that the stream has made.
        """
        numbers = np.array(self._draws) * np.uint64(factor)  # modulo 2 ** 64
        waits = packs + 1 - np.array(self._since, np.float64)
        return np.argsort(numbers / waits**2, kind="stable").tolist()

    def without_repeats(self) -> Sequence[int]:
        """Returns ascending indices. If a sample is in the buffer twice, from two epochs, leaves out the newer."""
        count = len(self)
        if len(set(self._places)) == count:
            return range(count)
        return sorted(dict(zip(reversed(self._places), reversed(range(count)), strict=True)).values())
