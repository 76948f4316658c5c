"""Attentive probe: one learned query attends to all tokens of an item, and a linear head classifies the result.

The probe is that of AIM (arXiv:2401.08541): cross-attention pooling without a feed-forward part, on frozen tokens that
are standardised as by a batch norm. It is trained as in V-JEPA 2 (arXiv:2506.09985): with AdamW, a cosine schedule and
a sweep of the same learning rates. A tenth of the training items is held out to choose the rate; the head of this rate
is scored without further training.

Items keep their own number of tokens: the tokens of a pack are concatenated without padding, and the softmax is over
the tokens of one item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univitar_ds.evaluation.scores import Figure
from univitar_ds.geometry import cumulative
from univitar_ds.tasks.cached.token_cache import Standard, Tokens
from univitar_ds.tasks.labelled import Features, divided, labelled
from univitar_ds.tasks.probes.sweep import Recipe, chosen, row_batches, train

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 5e-3)
"""The learning rates of V-JEPA 2."""
RECIPE = Recipe("adamw", RATES, batch=256, epochs=20, least_steps=200, decay=0.01)
"""The number of epochs is that of V-JEPA 2, the weight decay the smallest that V-JEPA 2 tries. The batch size and the
minimum number of steps are our choice."""
HELD_OUT = 0.1
"""Share of the training items on which the learning rate is chosen."""
HEAD_WIDTH = 64
"""Minimum width of an attention head."""


@dataclass(frozen=True)
class Split:
    """The labelled items of one modality in a split: their indices in `tokens`, and their labels."""

    tokens: Tokens
    items: list[int]
    labels: list[str]


@dataclass(frozen=True)
class Workspace:
    """How a probe computes: device, and maximum number of tokens of a pack."""

    device: torch.device
    token_budget: int


class AttentiveHead(nn.Module):
    """Cross-attention pooling with a learned query, and a linear head.

    All items share the query, so both projections can be moved out of the sum over tokens: the score of a token x is
    q . (W_k x) = (W_k^T q) . x, and the result is W_v (sum of a_t x_t). A token thus costs 2 H D (H attention heads)
    multiplications instead of the 2 D^2 of both projections. One call of `attend` serves all learning rates.
    """

    def __init__(self, width: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.heads = heads_of(width)
        draws = torch.Generator().manual_seed(seed)
        self.query = nn.Parameter(torch.randn(width, generator=draws) * 0.02)
        self.key, self.value = (nn.Parameter(torch.empty(width, width)) for _ in range(2))
        for weight in (self.key, self.value):
            nn.init.xavier_uniform_(weight, generator=draws)
        self.weight = nn.Parameter(torch.randn(classes, width, generator=draws) * 0.01)
        self.bias = nn.Parameter(torch.zeros(classes))

    def directions(self) -> Tensor:
        """Returns one vector per attention head, (H, D). Its dot product with a token is the token's score."""
        key = self.key.unflatten(0, (self.heads, -1))
        query = self.query.view(self.heads, -1)
        return torch.einsum("hkd,hk->hd", key, query) * query.shape[1] ** -0.5

    def logits(self, attended: Tensor) -> Tensor:
        """Returns the logits, (N, C). Args: attended: result of `attend`, (N, H, D)."""
        value = self.value.unflatten(0, (self.heads, -1))
        return F.linear(torch.einsum("hkd,nhd->nhk", value, attended).flatten(1), self.weight, self.bias)


def heads_of(width: int) -> int:
    """Returns the largest number of attention heads that divides `width`, each at least `HEAD_WIDTH` wide; else 1."""
    return next(heads for heads in range(max(width // HEAD_WIDTH, 1), 0, -1) if width % heads == 0)


def attend(tokens: Tensor, lengths: Sequence[int], directions: Tensor) -> Tensor:
    """Returns the mean of each item's tokens, weighted by the softmax of their scores, for each direction.

    Args: tokens: (T, D); lengths: number of tokens of each of the N items; directions: (J, D). Returns: (N, J, D).
    """
    scores = F.linear(tokens, directions)
    begins = cumulative(lengths)
    alike: dict[int, list[int]] = {}
    for item, length in enumerate(lengths):
        alike.setdefault(length, []).append(item)
    found = []
    for length, items in alike.items():  # items of equal length share a matrix product
        rows = (torch.tensor([begins[item] for item in items])[:, None] + torch.arange(length)).to(tokens.device)
        found.append(scores[rows].softmax(1).transpose(1, 2) @ tokens[rows])
    order = torch.tensor([item for items in alike.values() for item in items]).argsort()
    return torch.cat(found)[order.to(tokens.device)]


def sweep_logits(heads: Sequence[AttentiveHead], tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns the logits of several probe heads, (heads, N, C), with one call of `attend` for all of them."""
    directions = [head.directions() for head in heads]
    attended = attend(tokens, lengths, torch.cat(directions)).split([len(one) for one in directions], dim=1)
    return torch.stack([head.logits(one) for head, one in zip(heads, attended, strict=True)])


def attentive(
    train: Split, test: Split, modality: str, workspace: Workspace, *, epochs: int | None = None, progress: bool
) -> tuple[list[Figure], list[str]]:
    """Returns top-1 and top-5 accuracy of the probe, and notes about the chosen rate and the items left out.

    Raises: DataError as `labelled`.
    """
    recipe = RECIPE if epochs is None else replace(RECIPE, epochs=epochs, least_steps=1)
    both = labelled(_without(train.labels), _without(test.labels), modality)
    learned = _Learned(train, both.train_classes, len(both.classes), workspace)
    head, said = learned.head(recipe, f"{modality}s" if progress else None)
    known = set(both.classes)
    items = [item for item, label in zip(test.items, test.labels, strict=True) if label in known]
    scores = learned.scores(head, test.tokens, items)
    notes = [f"Attentive probe of {modality}s: {said}"]
    if both.unknown:
        notes.append(f"{both.unknown} {modality}s have a label that the training split lacks, and are left out.")
    return both.accuracies(scores, "attentive probe", modality), notes


def _without(labels: list[str]) -> Features:
    """Returns labels with empty features: those of a probe on tokens are not vectors."""
    return Features(torch.empty(len(labels), 0), labels)


class _Pack(NamedTuple):
    """Items of a pack by their place in the split, and the number of items of the step that it belongs to, over which
    losses are averaged."""

    places: list[int]
    of_step: int


@dataclass(frozen=True)
class _Learned:
    """The items that a probe learns from, with their classes (n,); `count`: number of classes."""

    split: Split
    classes: Tensor
    count: int
    workspace: Workspace

    @cached_property
    def _standard(self) -> Standard:
        return Standard(self.split.tokens, self.split.items, self.workspace.device)

    def head(self, recipe: Recipe, of: str | None) -> tuple[AttentiveHead, str]:
        """Returns the head of the learning rate that is best on the held-out items, and a sentence about the choice.

        Args: of: the items, for the progress bar; None: no bar.
        """
        learns, checks = divided(self.classes, HELD_OUT)
        width, device = self.split.tokens.width, self.workspace.device
        heads = [AttentiveHead(width, self.count).to(device) for _ in recipe.rates]
        steps, batch = recipe.plan(len(learns))

        def loss(pack: _Pack) -> Tensor:
            right = self.classes[pack.places].to(device)
            losses = [F.cross_entropy(one, right, reduction="sum") for one in self._logits(heads, pack.places)]
            return torch.stack(losses) / pack.of_step

        def batches() -> Iterator[list[_Pack]]:
            for rows in row_batches(learns, batch):
                yield [_Pack(places, len(rows)) for places in self._packs(rows.tolist())]

        desc = None if of is None else f"attentive probe of {of}"
        train(heads, recipe.rates, recipe, batches(), loss, steps=steps, progress=desc)
        held_out = self._accuracies(heads, checks.tolist())
        place, said = chosen(recipe.rates, held_out, "top-1", f"{len(checks)} training items held out")
        return heads[place], said

    def _packs(self, places: list[int]) -> Iterator[list[int]]:
        """Yields places of the split in packs."""
        items = [self.split.items[place] for place in places]
        begin = 0
        for pack in self.split.tokens.packs(items, self.workspace.token_budget):
            yield places[begin : begin + len(pack)]
            begin += len(pack)

    def _logits(self, heads: Sequence[AttentiveHead], places: list[int]) -> Tensor:
        """Returns the logits of some items of the split, (heads, n, classes)."""
        items, tokens = [self.split.items[place] for place in places], self.split.tokens
        return sweep_logits(heads, self._standard.read(tokens, items), [tokens.lengths[item] for item in items])

    @torch.no_grad()
    def _accuracies(self, heads: Sequence[AttentiveHead], checks: list[int]) -> list[float]:
        """Returns the top-1 accuracy of each head on the held-out items; NaN if there are none."""
        # Not scikit-learn's: items are counted pack by pack, for all heads, and logits that are not finite are wrong.
        hits = torch.zeros(len(heads), dtype=torch.float64)
        for places in self._packs(checks):
            logits = self._logits(heads, places).cpu()
            right = (logits.argmax(-1) == self.classes[places]) & logits.isfinite().all(-1)
            hits += right.double().sum(1)
        return (hits / len(checks)).tolist()

    @torch.no_grad()
    def scores(self, head: AttentiveHead, tokens: Tokens, items: list[int]) -> Tensor:
        """Returns the logits of items that are scored, (n, classes) float64 on the host."""
        rows = [torch.empty(0, self.count, dtype=torch.float64)]
        for pack in tokens.packs(items, self.workspace.token_budget):
            values, lengths = self._standard.read(tokens, pack), [tokens.lengths[item] for item in pack]
            rows.append(sweep_logits([head], values, lengths)[0].double().cpu())
        return torch.cat(rows)
