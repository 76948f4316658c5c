"""The attentive probe: its pooling compared with torch's attention, classes that need attention, and chance."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.support.cached_tokens import cached
from tests.support.closeness import assert_sums_close
from univitar_ds.errors import DataError
from univitar_ds.tasks.probes.attentive import AttentiveHead, Split, Workspace, attentive, heads_of, sweep_logits

WIDTH = 32


def made(items: int, seed: int, signal: float = 8.0, classes: int = 4) -> tuple[list[torch.Tensor], list[str]]:
    """Noise, with one token of each item that determines its class: the mean over tokens hardly depends on it."""
    draws = torch.Generator().manual_seed(seed)
    tokens = []
    for item in range(items):
        length = int(torch.randint(8, 24, (1,), generator=draws))
        one = torch.randn(length, WIDTH, generator=draws)
        one[int(torch.randint(length, (1,), generator=draws)), [item % classes, 10]] += signal
        tokens.append(3 * one + 100)
    return tokens, [f"class {item % classes}" for item in range(items)]


def probed(folder: Path, train: tuple, test: tuple, epochs: int = 1) -> tuple[list, list[str]]:
    with cached(folder, train[0], test[0]) as found:
        splits = [
            Split(tokens, list(range(len(tokens))), labels)
            for tokens, (_, labels) in zip(found, (train, test), strict=True)
        ]
        return attentive(*splits, "image", Workspace(torch.device("cpu"), 512), epochs=epochs, progress=False)


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


def test_it_learns_classes_that_one_token_of_an_item_determines(tmp_path):
    figures, notes = probed(tmp_path, made(240, 0), made(160, 1), epochs=120)
    assert figures[0].value > 0.8
    assert (figures[0].n, figures[0].candidates, figures[0].chance) == (160, 4, 0.25)
    assert figures[0].interval[0] < figures[0].value
    assert "24 training items held out" in notes[0]


def test_random_tokens_are_at_chance(tmp_path):
    figures, _ = probed(tmp_path, made(160, 0, 0.0), made(320, 1, 0.0), epochs=10)
    low, high = figures[0].interval
    assert low - 0.03 < 0.25 < high + 0.03


def test_labels_that_the_training_split_lacks_are_left_out(tmp_path):
    figures, notes = probed(tmp_path, made(32, 0, classes=2), made(32, 1, classes=4))
    assert figures[0].n == 16
    assert "16 images have a label that the training split lacks" in notes[1]


def test_data_with_one_class_is_an_error(tmp_path):
    with pytest.raises(DataError, match="only the label 'class 0'"):
        probed(tmp_path, made(16, 0, classes=1), made(16, 1))
