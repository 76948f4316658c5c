"""Attentive probe: one learned query attends to all tokens of an item, and a linear head classifies the result.

The probe is that of AIM (arXiv:2401.08541): cross-attention pooling without a feed-forward part, on frozen tokens that
are standardised as by a batch norm. It is trained as in V-JEPA 2 (arXiv:2506.09985): with AdamW, a cosine schedule and
a sweep of the same learning rates. A tenth of the training items is held out to choose the rate; the head of this rate
is scored without further training.

Items keep their own number of tokens: the tokens of a pack are concatenated without padding, and the softmax is over
the tokens of one item.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univitar_ds.evaluation.scores import Figure
from univitar_ds.geometry import cumulative
from univitar_ds.tasks.labelled import Features, class_names, divided, labelled
from univitar_ds.tasks.probes.sweep import Recipe, chosen, row_batches, train
from univitar_ds.tasks.probes.token_store import TokenStore

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 5e-3)
"""The learning rates of V-JEPA 2."""
RECIPE = Recipe("adamw", RATES, batch=256, epochs=20, least_steps=200, decay=0.01)
"""The number of epochs is that of V-JEPA 2, the weight decay the smallest that V-JEPA 2 tries. The batch size and the
minimum number of steps are our choice."""
HELD_OUT = 0.1
"""Share of the training items on which the learning rate is chosen."""
HEAD_WIDTH = 64
"""Minimum width of an attention head."""

Packs = Iterable[tuple[Tensor, Sequence[int], Sequence[str]]]
"""Tokens (T, D) of the items of a pack, the number of tokens of each, and their labels."""


@dataclass(frozen=True)
class Workspace:
    """Where a probe computes: folder for the stored tokens, device, and maximum number of tokens of a pack."""

    folder: Path
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
    train_packs: Packs,
    test_packs: Packs,
    modality: str,
    workspace: Workspace,
    *,
    epochs: int | None = None,
    progress: bool,
) -> tuple[list[Figure], list[str]]:
    """Returns top-1 and top-5 accuracy of the probe, and notes about the chosen rate and the items left out.

    Returns empty lists if neither split has an item. The tokens of the training items are stored in a file in
    `workspace.folder`, in float16; the test items are scored pack by pack.
    Raises: StorageError and CheckpointError as `TokenStore.append`; DataError as `labelled`.
    """
    recipe = RECIPE if epochs is None else replace(RECIPE, epochs=epochs, least_steps=1)
    with TokenStore(workspace.folder) as store:
        labels: list[str] = []
        for tokens, lengths, some in train_packs:
            store.append(tokens, lengths)
            labels += some
        tests = iter(test_packs)
        ahead = next(tests, None)
        if not labels and ahead is None:
            return [], []
        names = class_names(labels, modality)
        store.finish(workspace.device)
        index_of = {name: index for index, name in enumerate(names)}
        classes = torch.tensor([index_of[label] for label in labels])
        head, said = _chosen(store, classes, len(names), recipe, workspace, f"{modality}s" if progress else None)
        scores, found = _scored(head, store, len(names), [] if ahead is None else itertools.chain([ahead], tests))
    both = labelled(_without(labels), _without(found), modality)
    known = [row for row, label in enumerate(found) if label in index_of]
    notes = [f"Attentive probe of {modality}s: {said}"]
    if both.unknown:
        notes.append(f"{both.unknown} {modality}s have a label that the training split lacks, and are left out.")
    return both.accuracies(scores[known], "attentive probe", modality), notes


def _without(labels: list[str]) -> Features:
    """Returns labels with empty features, since features are not needed once the items have been scored."""
    return Features(torch.empty(len(labels), 0), labels)


def _chosen(
    store: TokenStore, classes: Tensor, count: int, recipe: Recipe, workspace: Workspace, of: str | None
) -> tuple[AttentiveHead, str]:
    """Returns the head of the learning rate that is best on the held-out items, and a sentence about the choice.

    Args: count: number of classes; of: name of the items in the text of the progress bar; None: no bar.
    """
    learns, checks = divided(classes, HELD_OUT)
    heads = [AttentiveHead(store.width, count).to(workspace.device) for _ in recipe.rates]
    steps, batch = recipe.plan(len(learns))

    def loss(pack: _Pack) -> Tensor:
        logits = sweep_logits(heads, store.read(pack.items), [store.lengths[item] for item in pack.items])
        right = classes[pack.items].to(workspace.device)
        losses = [F.cross_entropy(one, right, reduction="sum") for one in logits]
        return torch.stack(losses) / pack.of_step

    def batches() -> Iterator[list[_Pack]]:
        for rows in row_batches(learns, batch):
            yield [_Pack(items, len(rows)) for items in store.packs(rows.tolist(), workspace.token_budget)]

    desc = None if of is None else f"attentive probe of {of}"
    train(heads, recipe.rates, recipe, batches(), loss, steps=steps, progress=desc)
    held_out = _accuracies(heads, store, classes, checks, workspace)
    place, said = chosen(recipe.rates, held_out, "top-1", f"{len(checks)} training items held out")
    return heads[place], said


class _Pack(NamedTuple):
    """`items`: the items of a pack; `of_step`: number of items of its step, over which the losses are averaged."""

    items: list[int]
    of_step: int


@torch.no_grad()
def _accuracies(
    heads: Sequence[AttentiveHead], store: TokenStore, classes: Tensor, checks: Tensor, workspace: Workspace
) -> list[float]:
    """Returns the top-1 accuracy of each head on the held-out items; NaN if there are none."""
    hits = torch.zeros(len(heads), dtype=torch.float64)
    for items in store.packs(checks.tolist(), workspace.token_budget):
        logits = sweep_logits(heads, store.read(items), [store.lengths[item] for item in items]).cpu()
        right = (logits.argmax(-1) == classes[items]) & logits.isfinite().all(-1)
        hits += right.double().sum(1)
    return (hits / len(checks)).tolist()


@torch.no_grad()
def _scored(head: AttentiveHead, store: TokenStore, classes: int, packs: Packs) -> tuple[Tensor, list[str]]:
    """Returns the logits of the items of all packs, (n, classes) float64 on the host, and the items' labels."""
    rows, labels = [torch.empty(0, classes, dtype=torch.float64)], []
    for tokens, lengths, some in packs:
        rows.append(sweep_logits([head], store.standardised(tokens), lengths)[0].double().cpu())
        labels += some
    return torch.cat(rows), labels
