"""Windows of images, their encoding and joining, and counts of pixels, compared with torch and scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.closeness import assert_sums_close, encoder_terms
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.errors import ConfigError
from univitar_ds.evaluation.scores import RESAMPLES
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.tasks.dense import probe
from univitar_ds.tasks.dense.miou import accuracy, constant, counted, intervals, mean_iou
from univitar_ds.tasks.dense.probe import enlarged_classes
from univitar_ds.tasks.dense.views import Box, Views, crop, encode, of_patches, patch_labels
from univitar_ds.tasks.sizes import PatchRule

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def config(merge: int = 1) -> EncoderConfig:
    return EncoderConfig(**SMALL, spatial_merge_size=merge, min_tokens=4, max_tokens=400)


def test_windows_cover_each_patch_and_end_at_the_border():
    views = Views.of(PatchRule.of(config()), 56, 42)
    assert (views.window, views.stride) == (4, 3)
    grid = views.grid(100, 150)
    assert grid == (7, 11)
    covered = np.zeros(grid, int)
    for box in views.boxes(*grid):
        assert box.top + box.rows <= 7
        assert box.left + box.columns <= 11
        covered[box.top : box.top + box.rows, box.left : box.left + box.columns] += 1
    assert covered.min() == 1
    assert [(box.top, box.left) for box in views.boxes(4, 4)] == [(0, 0)]
    assert views.grid(20, 40) == (4, 8)  # enlarged until the shorter side is a window


def test_an_image_without_windows_has_the_native_size():
    views = Views.of(PatchRule.of(config()), None, None)
    assert views.grid(280, 140) == config().resolution.grid(280, 140)[1:]
    assert views.boxes(20, 10) == [Box(0, 0, 20, 10)]


@pytest.mark.parametrize(
    ("window", "stride", "said"),
    [(50, None, "multiples of 28 pixels; give 56"), (56, 84, "above --window 56"), (None, 28, "give --window too"),
     (56, 20, "--stride 20"), (1400, None, "above the encoder's 400")],
)  # fmt: skip
def test_windows_that_the_encoder_cannot_take_are_refused(window, stride, said):
    with pytest.raises(ConfigError, match=said):
        Views.of(PatchRule.of(config(merge=2)), window, stride)


@pytest.mark.numeric
def test_features_are_those_of_each_image_alone_row_by_row():
    """Also with merged patches, whose tokens are in another order."""
    encoder = UniViTAR(config(merge=2)).eval()
    draws = np.random.default_rng(0)
    images = [draws.integers(256, size=size, dtype=np.uint8) for size in ((56, 84, 3), (28, 28, 3), (84, 28, 3))]
    for image, found in zip(images, encode(encoder, images, 30), strict=True):
        h, w = image.shape[0] // 14, image.shape[1] // 14
        pixels = torch.from_numpy(image.reshape(-1))
        with torch.no_grad():
            tokens = encoder(pixels, [(1, h, w)], frames=[1])
        order = torch.arange(h * w).view(h // 2, 2, w // 2, 2).transpose(1, 2).flatten()
        assert found.shape == (h * w, 16)
        assert_sums_close(found[order], tokens, encoder_terms(encoder.config, h * w))


def test_labels_of_a_patch_are_those_of_its_pixels():
    labels = np.arange(28 * 42).reshape(28, 42)
    rows = of_patches(labels, 14)
    assert rows.shape == (6, 196)
    assert np.array_equal(rows[4], labels[14:28, 14:28].reshape(-1))
    assert np.array_equal(crop(labels, Box(1, 1, 1, 1), 14), labels[14:28, 14:28])
    assert np.array_equal(patch_labels(labels, 2, 3, 14), labels)
    assert np.array_equal(patch_labels(np.array([[1, 2], [3, 4]]), 2, 4, 14)[::14, ::14], [[1, 1, 2, 2], [3, 3, 4, 4]])


def test_enlarging_some_rows_at_a_time_changes_nothing(monkeypatch):
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits[None], (37, 23), mode="bilinear", align_corners=False)[0]
    monkeypatch.setattr(probe, "_CELLS", 3 * 23 * 4)
    found = enlarged_classes(logits, 37, 23)
    first, second = whole.topk(2, dim=0).values
    clear = first - second > 1e-5  # elsewhere two classes are equal but for rounding
    assert clear.float().mean() > 0.99
    assert torch.equal(found[clear], whole.argmax(0)[clear])


def test_mean_iou_is_that_of_scikit_learn():
    from sklearn.metrics import jaccard_score

    draws = torch.Generator().manual_seed(0)
    guess, labels = (torch.randint(low, 5, (6, 20, 30), generator=draws) for low in (0, -1))
    images = torch.stack([counted(*one, 6) for one in zip(guess, labels, strict=True)])  # a class occurs nowhere
    known = labels >= 0
    wanted = jaccard_score(labels[known].numpy(), guess[known].numpy(), average="macro")
    assert mean_iou(images.sum(0)).item() == pytest.approx(wanted)
    assert accuracy(images.sum(0)).item() == pytest.approx((guess == labels)[known].double().mean().item())
    draws, resampled = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        sums = images[draws.integers(6, size=6)].sum(0)
        resampled.append([mean_iou(sums).item(), accuracy(sums).item()])
    both = np.percentile(resampled, [2.5, 97.5], axis=0).T
    assert np.array(intervals(images)) == pytest.approx(both, rel=1e-12)
    assert both[0, 0] < wanted < both[0, 1]


def test_always_predicting_one_class_has_its_share_of_the_pixels():
    labels = torch.tensor([[0, 0, 0, 1], [0, 2, 1, 0]])
    counts = constant(counted(torch.ones_like(labels), labels, 3), 0)
    assert torch.equal(counts, counted(torch.zeros_like(labels), labels, 3))
    assert mean_iou(counts).item() == pytest.approx(5 / 8 / 3)
    assert accuracy(counts).item() == 5 / 8
