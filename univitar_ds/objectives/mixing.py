"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) for packs of native resolution.

Pixels can be mixed only between items of one size, since nothing is resized or padded here. So the items of a pack with
equal grids, equal numbers of frames and the same data set form a group, in a random order, and each item is mixed with
the next one of its group. An item that is alone in its group is not mixed: with `kind: fixed` nearly all items are
mixed, at native resolution only items of equal size. Only items of one pack are mixed, so the result does not depend on
the distribution of packs over ranks. Tokens are not mixed: a token has a position, and positions in two different grids
do not match.

All draws depend on seed, step, lane and item only.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from univitar_ds.geometry import PATCH, item_bytes
from univitar_ds.randomness import draw, permutation


class Box(NamedTuple):
    """A rectangle in pixels; `bottom` and `right` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int


class Mix(NamedTuple):
    """What is mixed into an item: the item `partner` of the pack, whose share is 1 - `share`.

    `box`: the rectangle in which the partner replaces the item (CutMix); None: all pixels are averaged (mixup).
    """

    partner: int
    share: float
    box: Box | None


def plan_mixing(
    grids: Sequence[Sequence[int]],
    groups: Sequence[Hashable],
    *,
    mixup: float,
    cutmix: float,
    key: tuple[int | str, ...],
) -> list[Mix | None]:
    """Returns for each item of a pack what is mixed into it; None: nothing.

    Args: grids: (t, h, w) of each item; groups: a value of each item: items with equal grids and values may be mixed,
        an item with None is never mixed; mixup, cutmix: parameter of the symmetric beta distribution of the share, 0
        for off; if both are on, each item is mixed by one of them with equal probability; key: of the pack's random
        draws.
    """
    members: dict[Hashable, list[int]] = {}
    for index, (grid, group) in enumerate(zip(grids, groups, strict=True)):
        if group is not None and (mixup or cutmix):
            members.setdefault((tuple(grid), group), []).append(index)
    found: list[Mix | None] = [None] * len(grids)
    for some in members.values():
        if len(some) > 1:
            order = [some[place] for place in permutation(len(some), *key, "partners", some[0])]
            for index, partner in zip(order, [*order[1:], order[0]], strict=True):
                found[index] = _drawn(partner, grids[index], mixup, cutmix, (*key, "share", index))
    return found


def mix_pixels(
    pixels: Tensor, frames: Sequence[int], grids: Sequence[Sequence[int]], plan: Sequence[Mix | None]
) -> Tensor:
    """Returns the mixed pixels of a pack, (B,) uint8, in new memory; averages are rounded to integers.

    Args: pixels: (B,) uint8, see `kernels.reference.patchify`; frames, grids: of the items; plan: of `plan_mixing`.
    """
    sizes = [item_bytes(grid, count) for grid, count in zip(grids, frames, strict=True)]
    mixed = pixels.clone()
    sources, targets = pixels.split(sizes), mixed.split(sizes)
    for index, mix in enumerate(plan):
        if mix is None:
            continue
        shape = (frames[index], grids[index][1] * PATCH, grids[index][2] * PATCH, 3)
        own, other = (sources[which].view(shape) for which in (index, mix.partner))
        target = targets[index].view(shape)
        if mix.box is None:
            target.copy_((mix.share * own.float() + (1 - mix.share) * other.float()).round_())
        else:
            rows, columns = slice(mix.box.top, mix.box.bottom), slice(mix.box.left, mix.box.right)
            target[:, rows, columns] = other[:, rows, columns]
    return mixed


def _drawn(partner: int, grid: Sequence[int], mixup: float, cutmix: float, key: tuple[int | str, ...]) -> Mix:
    generator = np.random.Generator(np.random.Philox(key=draw(*key)))
    cuts = bool(cutmix) and (not mixup or generator.random() < 0.5)
    alpha = cutmix if cuts else mixup
    share = float(generator.beta(alpha, alpha))
    if not cuts:
        return Mix(partner, share, None)
    height, width = grid[1] * PATCH, grid[2] * PATCH
    tall, wide = round(height * (1 - share) ** 0.5), round(width * (1 - share) ** 0.5)
    top, left = int(generator.integers(height - tall + 1)), int(generator.integers(width - wide + 1))
    share = 1 - tall * wide / (height * width)  # of the whole pixels
    return Mix(partner, share, Box(top, left, top + tall, left + wide))
