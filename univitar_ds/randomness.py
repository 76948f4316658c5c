"""Counter-based randomness: a draw depends only on its key, so no state of a generator has to be stored.

Keys are (seed, purpose, counters...). Single numbers come from BLAKE2b, arrays from SHAKE128. The numbers are equal on
all machines and with all library versions, as the order of a run's samples requires.
"""

from __future__ import annotations

import hashlib

import numpy as np


def draw(*key: int | str) -> int:
    """Returns a uniform unsigned 64-bit number for `key`."""
    return int.from_bytes(hashlib.blake2b(_bytes(key), digest_size=8).digest(), "little")


def draws(n: int, *key: int | str) -> np.ndarray:
    """Returns `n` uniform numbers for `key`, (n,) uint64. A smaller `n` gives a prefix of the same numbers."""
    return np.frombuffer(hashlib.shake_128(_bytes(key)).digest(8 * n), dtype="<u8")


def permutation(n: int, *key: int | str) -> list[int]:
    """Returns the numbers 0..n-1 in a random order: sorted by the `draw` of key and number."""
    beginning = _bytes((*key, ""))
    digests = [hashlib.blake2b(beginning + b"%d" % index, digest_size=8).digest() for index in range(n)]
    return np.argsort(np.frombuffer(b"".join(digests), dtype="<u8"), kind="stable").tolist()


def _bytes(key: tuple[int | str, ...]) -> bytes:
    return "\x1f".join([str(part) for part in key]).encode("utf-8", "surrogateescape")
