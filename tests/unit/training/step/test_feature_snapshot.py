"""Which tokens of a training step are copied for its images."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.grey import grey_pack
from univitar_ds.training.step import feature_snapshot
from univitar_ds.training.step.feature_snapshot import capture_features


class Encoder(nn.Module):
    """Its tokens are their own numbers, from `first` on; those that `drops` leaves out are missing."""

    def forward(self, count, first=0, *, drops=None):
        numbers = torch.arange(first, first + count)
        return (numbers if drops is None else numbers[drops.kept])[:, None].float().requires_grad_()


def test_the_first_pack_is_copied_as_it_left_the_encoder_and_the_hook_is_removed():
    encoder = Encoder()
    with capture_features(encoder, grey_pack((1, 2, 3), (1, 1, 2))) as snapshots:
        tokens = encoder(8)
        encoder(8, 100)
        tokens.data.zero_()
    encoder(8, 200)
    (snapshot,) = snapshots
    assert snapshot.items == 2
    assert snapshot.tokens.flatten().tolist() == list(range(8))
    assert not snapshot.tokens.requires_grad


@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_pack_is_known_by_how_many_are_encoded_before_it(before):
    encoder = Encoder()
    with capture_features(encoder, grey_pack((1, 1, 2)), before=before) as snapshots:
        for first in (0, 10, 20, 30):
            encoder(2, first)
    (snapshot,) = snapshots
    assert snapshot.tokens.flatten().tolist() == [10 * before, 10 * before + 1]


def test_the_hook_is_removed_after_a_step_that_failed():
    encoder = Encoder()
    with pytest.raises(ValueError, match="the step"), capture_features(encoder, grey_pack((1, 1, 2))) as snapshots:
        raise ValueError("the step")
    encoder(2)
    assert snapshots == []


@pytest.mark.parametrize("nothing", [None, grey_pack()])
def test_without_a_pack_or_items_nothing_is_copied(nothing):
    encoder = Encoder()
    with capture_features(encoder, nothing) as snapshots:
        encoder(0)
    assert snapshots == []


def test_only_a_few_items_are_kept(monkeypatch):
    monkeypatch.setattr(feature_snapshot, "MAX_ITEMS", 3)
    monkeypatch.setattr(feature_snapshot, "MAX_TOKENS", 10)
    for grids, items in (([(1, 1, 2)] * 5, 3), ([(1, 2, 3), (1, 2, 2), (1, 1, 1)], 2), ([(1, 3, 4), (1, 1, 1)], 1)):
        pack = grey_pack(*grids)
        with capture_features(encoder := Encoder(), pack) as snapshots:
            encoder(pack.tokens)
        assert snapshots[0].items == items
        assert len(snapshots[0].tokens) == pack.grid_thw[:items].prod(1).sum()


def test_the_places_of_tokens_that_were_not_dropped_are_known(monkeypatch):
    monkeypatch.setattr(feature_snapshot, "MAX_ITEMS", 1)
    with capture_features(encoder := Encoder(), grey_pack((1, 2, 4), (1, 1, 2))) as snapshots:
        encoder(10, drops=SimpleNamespace(kept=torch.tensor([0, 1, 2, 3, 5, 8])))
    assert snapshots[0].items == 1
    assert snapshots[0].kept.tolist() == [0, 1, 2, 3, 5]
