"""Counter-based randomness: a draw depends on its key alone, so there is no generator whose state could be lost.

Keys are (seed, purpose, counters...). The numbers come from BLAKE2b and stay the same on every machine and
with every version of every library: the order of a run's samples rests on them.
"""

from __future__ import annotations

import hashlib


def draw(*key: int | str) -> int:
    """A uniform 64-bit number for this key."""
    text = "\x1f".join([str(part) for part in key])
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def permutation(n: int, *key: int | str) -> list[int]:
    """The numbers 0..n-1 in a random order."""
    return sorted(range(n), key=lambda index: draw(*key, index))
