"""The sizes at which a peer reads images, in patches: one size, or any."""

from __future__ import annotations

import math
from dataclasses import dataclass

from univitar_ds.geometry import smart_resize

MOST_TOKENS = 4096
"""Maximum number of tokens of an image at its native size: our choice, 896 px squares at 14 px a patch."""


@dataclass(frozen=True)
class PatchSizes:
    """Sizes of images that are resized before they enter a peer, instead of by its image processor.

    `patch`: side of a patch in pixels; `tokens`: maximum of an item, over all frames of a video; `square`: stretches to
    the largest square; else the aspect ratio is kept, and with `enlarges` small items have the most tokens too.
    """

    patch: int
    tokens: int
    square: bool = False
    enlarges: bool = False

    def grid(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """Returns the rows and columns of patches of an image, or of each frame of a video."""
        most = max(self.tokens // frames, 1)
        if self.square:
            side = max(math.isqrt(most), 1)
            return side, side
        area = most * self.patch**2
        grow = math.ceil(math.sqrt(area / (height * width))) + 1 if self.enlarges else 1
        h, w = smart_resize(height * grow, width * grow, self.patch, 0, area)
        return h // self.patch, w // self.patch
