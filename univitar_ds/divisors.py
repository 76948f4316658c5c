"""Divisors of a number, which messages name as the values that fit."""

from __future__ import annotations

import math


def divisors(number: int) -> list[int]:
    """Returns the numbers that divide `number`, the smallest first."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})
