"""The sizes at which tasks read items, beside those of a model's own preprocessing.

A sweep over tokens per item has two views of each item at each number.

In the square view an item is stretched to the square of whole cells (squares of merged patches) that is nearest to the
number. In the native view it keeps its aspect ratio and is as large as possible with at most the tokens of that square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.errors import ConfigError
from univitar_ds.geometry import PATCH, TUBELET, Resolution, smart_resize
from univitar_ds.peers.sizes import PatchSizes

MOST = 1 << 16
"""Maximum number of tokens of an item."""
NATIVE, SQUARE = "native", "square"
"""The views of an item."""


@dataclass(frozen=True)
class MostTokens(Resolution):
    """Resizes every item, small ones too, to as many tokens as fit into `max_tokens`, so that accuracy is a function of
    that number."""

    def grid(self, height: int, width: int, frames: int = 1) -> tuple[int, int, int]:
        steps = math.ceil(frames / TUBELET)
        most = self.max_tokens * PATCH * PATCH // steps
        # The item is enlarged first, so that `smart_resize` reduces it: it rounds down only when it reduces.
        grow = math.ceil(math.sqrt(most / (height * width))) + 1
        h, w = smart_resize(height * grow, width * grow, self.divisor_px, 0, most)
        return steps, h // PATCH, w // PATCH


def views(encoder: EncoderConfig, count: int, frames: int) -> dict[str, Resolution]:
    """Returns the resolutions of both views of an item for a number of tokens.

    The number may be above the encoder's own limit: a native-resolution encoder can be tested beyond its training.
    Args: count: number of tokens; frames: of an item, 1 for an image.
    Raises: ConfigError if the number is above `MOST`, or too small for one cell in each time step.
    """
    merge, steps = encoder.spatial_merge_size, math.ceil(frames / TUBELET)
    side = _side(count, steps, steps * merge**2, merge, frames) * merge
    least, held, cell = steps * merge**2, steps * side**2, PATCH * merge
    return {NATIVE: MostTokens(least, held, cell), SQUARE: Resolution(least, held, cell, side * PATCH)}


def peer_views(patch: int, count: int, frames: int) -> dict[str, PatchSizes]:
    """As `views` for a peer with patches of `patch` pixels, which reads the frames of a video one by one."""
    tokens = frames * _side(count, frames, frames, 1, frames) ** 2
    return {NATIVE: PatchSizes(patch, tokens, enlarges=True), SQUARE: PatchSizes(patch, tokens, square=True)}


def _side(count: int, steps: int, least: int, merge: int, frames: int) -> int:
    """Returns the side in cells of the square that is nearest to `count` tokens. Raises: ConfigError as `views`."""
    if not least <= count <= MOST:
        what = f"a video of {frames} frames" if frames > 1 else "an item"
        raise ConfigError(f"--counts {count}: {what} has {least} to {MOST} tokens; give another number")
    return max(round(math.sqrt(count / steps) / merge), 1)


def at_most(encoder: EncoderConfig, tokens: int | None) -> Resolution | None:
    """Returns an encoder's resolution with at most `tokens` tokens of an item; None if `tokens` is None.

    Raises: ConfigError for fewer tokens than a cell (a square of merged patches) of the encoder has.
    """
    if tokens is None:
        return None
    rule = encoder.resolution
    cell = (rule.divisor_px // PATCH) ** 2
    if tokens < cell:
        raise ConfigError(f"--max-tokens {tokens}: sides are multiples of {rule.divisor_px} px; give at least {cell}")
    return replace(rule, min_tokens=min(rule.min_tokens, tokens), max_tokens=tokens, fixed_px=None)


@dataclass(frozen=True)
class PatchRule:
    """How a model divides images into patches of `patch` x `patch` pixels, in cells of `merge` x `merge` patches.

    `least`, `most`: limits of the tokens of an image; `divisor_px`: the native size has multiples of it; `fixed_px`:
    side of the squares of a model of one size, else None; `only_fixed`: whether it reads no others, also as windows.
    """

    patch: int
    merge: int
    least: int
    most: int
    divisor_px: int
    fixed_px: int | None = None
    only_fixed: bool = False

    @classmethod
    def of(cls, encoder: EncoderConfig) -> PatchRule:
        """Returns the rule of an encoder of this project."""
        rule = encoder.resolution
        merge = encoder.spatial_merge_size
        return cls(PATCH, merge, rule.min_tokens, rule.max_tokens, rule.divisor_px, rule.fixed_px)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of patches of an image at its native size."""
        if self.fixed_px is not None:
            return self.fixed_px // self.patch, self.fixed_px // self.patch
        area = self.patch**2
        h, w = smart_resize(height, width, self.divisor_px, self.least * area, self.most * area)
        return h // self.patch, w // self.patch
