"""Trains several heads at once on the same frozen features: one for each learning rate, as DINOv2 does.

The heads share only the features that they read, so each is trained as it would be alone. They are in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from univitar_ds.screen import progress_bar

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Recipe:
    """How heads are trained.

    `rates`: learning rates, each for a head of its own; they decay to 0 by a cosine. `batch`: items of a step;
    `epochs`: passes over the items, more if they have fewer than `least_steps` steps; `decay`: weight decay.
    """

    optimizer: Literal["sgd", "adamw"]
    rates: tuple[float, ...]
    batch: int
    epochs: int
    least_steps: int
    decay: float = 0.0

    def plan(self, items: int) -> tuple[int, int]:
        """Returns the number of steps, and the number of items in a step, for a number of training items."""
        batch = min(self.batch, items)
        steps = max(self.epochs * -(-items // batch), self.least_steps)
        return steps, batch


@dataclass(frozen=True)
class ProbeOptions:
    """Options of a probe on tokens. `epochs`: None: those of its recipe; `max_gb`: maximum size of the stored tokens of
    a split, in GB; `progress`: whether to show progress bars on stderr."""

    epochs: int | None
    max_gb: float
    progress: bool

    def applied(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with these epochs."""
        return recipe if self.epochs is None else replace(recipe, epochs=self.epochs, least_steps=1)


def train(
    heads: Sequence[nn.Module],
    rates: Sequence[float],
    recipe: Recipe,
    batches: Iterable[Sequence[Batch]],
    loss: Callable[[Batch], Tensor],
    *,
    steps: int,
    progress: str | None,
) -> None:
    """Trains each head with its rate.

    Args:
        batches: the packs of each step, for at least `steps` steps.
        loss: returns the losses of a pack, (heads,). The gradients of the packs of a step are accumulated, so that
            memory is needed for one pack at a time.
        progress: text of a progress bar on stderr; None: no bar.
    """
    groups = [{"params": list(head.parameters()), "lr": rate} for head, rate in zip(heads, rates, strict=True)]
    if recipe.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=recipe.decay)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad(), progress_bar(total=steps, desc=progress, unit="step", disable=progress is None) as bar:
        for _, packs in zip(range(steps), batches, strict=False):
            optimizer.zero_grad()
            for pack in packs:
                loss(pack).sum().backward()
            optimizer.step()
            schedule.step()
            bar.update()


def row_batches(rows: Tensor, batch: int, seed: int = 0) -> Iterable[Tensor]:
    """Yields random batches of rows endlessly. In each pass over the rows, every row is in exactly one batch.

    The last batch of a pass may be smaller.
    """
    draws = torch.Generator().manual_seed(seed)
    while True:
        yield from rows[torch.randperm(len(rows), generator=draws)].split(batch)


def best_of(scores: Sequence[float]) -> int:
    """Returns the index of the best score, the first of equal ones. NaN is the worst score."""
    return max(range(len(scores)), key=lambda place: (scores[place] if scores[place] == scores[place] else -1, -place))


def chosen(rates: Sequence[float], scores: Sequence[float], measure: str, held: str) -> tuple[int, str]:
    """Returns the index of the rate with the best score on the held-out items, and a sentence about the choice.

    If all scores are NaN, since no items are held out, it is the middle rate.
    Args: measure, held: the score and the held-out items, in words for the sentence.
    """
    if all(score != score for score in scores):
        place = len(rates) // 2
        return place, f"learning rate {rates[place]:g}, the middle one of {_span(rates)}: no item is held out."
    place = best_of(scores)
    at_end = place in (0, len(rates) - 1) and len(rates) > 1 and scores[place] < 1
    edge = " It is at the end of the rates: one beyond may be better." if at_end else ""
    said = f"learning rate {rates[place]:g} of {_span(rates)}, with {measure} {100 * scores[place]:.1f} % on {held}."
    return place, said + edge


def _span(rates: Sequence[float]) -> str:
    return f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"


def linear_heads(count: int, width: int, classes: int, device: torch.device) -> list[nn.Linear]:
    """Returns linear heads that all start from the same weights, normal with deviation 0.01 as DINOv2's, and bias 0."""
    first = torch.randn(classes, width, generator=torch.Generator().manual_seed(0)) * 0.01
    heads = [nn.utils.skip_init(nn.Linear, width, classes, device=device) for _ in range(count)]
    for head in heads:
        head.weight.data.copy_(first)
        head.bias.data.zero_()
    return heads
