"""Which frames of a clip are seen: pure functions of counts and a number that was drawn for the item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Sampling:
    """The rule of a stage; see `config.schema.ClipSampling`."""

    kind: Literal["uniform", "fps"] = "uniform"
    fps: float = 2.0
    jitter: bool = False


UNIFORM = Sampling()
