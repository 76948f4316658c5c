"""Counter-based randomness: a draw depends on its key alone, so there is no generator whose state could be lost.

Keys are (seed, purpose, counters...). The numbers come from BLAKE2b, many at once from SHAKE128, and stay the same on
every machine and with every version of every library: the order of a run's samples depends on them.
"""

from __future__ import annotations

import hashlib

import numpy as np


def draw(*key: int | str) -> int:
    """A uniform 64-bit number for this key."""
    return int.from_bytes(hashlib.blake2b(_bytes(key), digest_size=8).digest(), "little")


def draws(n: int, *key: int | str) -> np.ndarray:
    """`n` uniform 64-bit numbers for this key, (n,) uint64; a smaller `n` gives the first of them."""
    return np.frombuffer(hashlib.shake_128(_bytes(key)).digest(8 * n), dtype="<u8")


def permutation(n: int, *key: int | str) -> list[int]:
    """The numbers 0..n-1 in a random order: by `draw` of the key and the number."""
    beginning = _bytes((*key, ""))
    digests = [hashlib.blake2b(beginning + b"%d" % index, digest_size=8).digest() for index in range(n)]
    return np.argsort(np.frombuffer(b"".join(digests), dtype="<u8"), kind="stable").tolist()


def _bytes(key: tuple[int | str, ...]) -> bytes:
    return "\x1f".join([str(part) for part in key]).encode("utf-8", "surrogateescape")
