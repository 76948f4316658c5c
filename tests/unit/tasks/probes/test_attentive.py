"""The attentive probe: its pooling compared with torch's attention, classes that need attention, and chance."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.support.closeness import assert_sums_close
from univitar_ds.errors import DataError, StorageError
from univitar_ds.tasks.probes import token_store
from univitar_ds.tasks.probes.attentive import AttentiveHead, Workspace, attentive, heads_of, sweep_logits
from univitar_ds.tasks.probes.token_store import TokenStore

WIDTH = 32


def packs(items: int, seed: int, signal: float = 8.0, classes: int = 4) -> Iterator[tuple]:
    """Noise, with one token of each item that determines its class: the mean over tokens hardly depends on it."""
    draws = torch.Generator().manual_seed(seed)
    for begin in range(0, items, 16):
        tokens, lengths, labels = [], [], []
        for item in range(begin, begin + 16):
            length = int(torch.randint(8, 24, (1,), generator=draws))
            one = torch.randn(length, WIDTH, generator=draws)
            one[int(torch.randint(length, (1,), generator=draws)), [item % classes, 10]] += signal
            tokens.append(3 * one + 100)
            lengths.append(length)
            labels.append(f"class {item % classes}")
        yield torch.cat(tokens), lengths, labels


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "cache", torch.device("cpu"), 512)


@pytest.mark.numeric
def test_the_pooling_is_cross_attention_of_each_item():
    """Against torch's attention of keys and values that are projected token by token."""
    heads = [AttentiveHead(128, 5, seed).double() for seed in (1, 2)]
    lengths = [3, 7, 1, 3]
    tokens = torch.randn(sum(lengths), 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert heads[0].heads == heads_of(128) == 2
    for head in heads:
        head.query.data.mul_(50)  # scores that differ between tokens
    found = sweep_logits(heads, tokens, lengths)
    for head, logits in zip(heads, found, strict=True):
        query = head.query.view(1, 2, 64).transpose(0, 1)
        rows = []
        for item in tokens.split(lengths):
            key, value = ((item @ weight.T).view(-1, 2, 64).transpose(0, 1) for weight in (head.key, head.value))
            rows.append(F.scaled_dot_product_attention(query, key, value).flatten())
        wanted = torch.stack(rows) @ head.weight.T + head.bias
        assert_sums_close(logits, wanted, 128 * 4 + max(lengths))


def test_it_learns_classes_that_one_token_of_an_item_determines(workspace):
    figures, notes = attentive(packs(240, 0), packs(160, 1), "image", workspace, epochs=120, progress=False)
    assert figures[0].value > 0.8
    assert (figures[0].n, figures[0].candidates, figures[0].chance) == (160, 4, 0.25)
    assert figures[0].interval[0] < figures[0].value
    assert "24 training items held out" in notes[0]
    assert list(workspace.folder.iterdir()) == []


def test_random_tokens_are_at_chance(workspace):
    figures, _ = attentive(packs(160, 0, 0.0), packs(320, 1, 0.0), "image", workspace, epochs=10, progress=False)
    low, high = figures[0].interval
    assert low - 0.03 < 0.25 < high + 0.03


def test_labels_that_the_training_split_lacks_are_left_out(workspace):
    figures, notes = attentive(
        packs(32, 0, classes=2), packs(32, 1, classes=4), "image", workspace, epochs=1, progress=False
    )
    assert figures[0].n == 16
    assert "16 images have a label that the training split lacks" in notes[1]


def test_data_without_labels_is_nothing_and_with_one_class_an_error(workspace):
    assert attentive(iter([]), iter([]), "image", workspace, progress=False) == ([], [])
    with pytest.raises(DataError, match="only the label 'class 0'"):
        attentive(packs(16, 0, classes=1), packs(16, 1), "image", workspace, progress=False)
    with pytest.raises(DataError, match="no label"):
        attentive(iter([]), packs(16, 1), "image", workspace, progress=False)


def test_a_store_returns_items_in_any_order_with_mean_0_and_variance_1(tmp_path):
    given = list(packs(48, 0))
    with TokenStore(tmp_path) as store:
        for tokens, lengths, _ in given:
            store.append(tokens, lengths)
        store.finish(torch.device("cpu"))
        every = store.read(range(48))
        tokens = torch.cat([tokens for tokens, *_ in given])
        mean, deviation = tokens.double().mean(0), tokens.double().std(0, correction=0)
        # Stored values reach 10 deviations of the first pack, and float16 rounds them by 2**-11 of that.
        assert (every - (tokens - mean) / deviation).abs().max() < 10 * 2**-10
        assert (every - store.standardised(tokens)).abs().max() < 10 * 2**-10
        parts = every.split(store.lengths)
        assert torch.equal(store.read([40, 3]), torch.cat([parts[40], parts[3]]))
        assert all(sum(store.lengths[item] for item in pack) <= 100 for pack in store.packs(range(48), 100))
        assert [item for pack in store.packs(range(48), 100) for item in pack] == list(range(48))


def test_a_disk_that_is_nearly_full_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "_SPARE_BYTES", 1 << 62)
    with TokenStore(tmp_path) as store, pytest.raises(StorageError, match="--cache, or use fewer items"):
        store.append(torch.zeros(4, 2), [4])
