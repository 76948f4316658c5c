"""Zero-shot and retrieval have the figures of CLIP_benchmark on the same embeddings.

Its published formulas (v1.6.2, `metrics/zeroshot_classification.py` and `metrics/zeroshot_retrieval.py`) are repeated
here in torch. If the package is installed (pip install --no-deps clip_benchmark), its own functions are called too.
CLIP_benchmark counts equal captions of several items separately, this project counts them once: the captions here
differ.
"""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.retrieval import retrieval
from univitar_ds.evaluation.zero_shot import zero_shot
from univitar_ds.tokenization import caption_id

ITEMS, CAPTIONS, WIDTH, CLASSES = 300, 5, 24, 12
NAMES = [f"class {index}." for index in range(CLASSES)]
TEMPLATES = ["a photo of {}", "the {}", "many {}"]
TRUTH = torch.arange(ITEMS) % CLASSES
AXES = F.normalize(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)


def embedded(sentences: list[str]) -> Tensor:
    """Unit vectors near the axis of the class that a sentence names."""
    rows = []
    for sentence in sentences:
        noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(caption_id(sentence) % 2**31))
        rows.append(AXES[next(index for index, name in enumerate(NAMES) if name in sentence)] + 0.3 * noise)
    return F.normalize(torch.stack(rows), dim=-1)


@pytest.fixture(scope="module")
def found() -> Embeddings:
    draws = torch.Generator().manual_seed(1)
    vision = F.normalize(AXES[TRUTH] + 0.5 * torch.randn(ITEMS, WIDTH, generator=draws), dim=-1)
    captions = [[f"{NAMES[truth]} {row} {k}" for k in range(CAPTIONS)] for row, truth in enumerate(TRUTH)]
    first = [some[0] for some in captions]
    labels = [NAMES[truth] for truth in TRUTH]
    others = [tuple(some[1:]) for some in captions]
    ids, keys = [caption_id(one) for one in first], [str(row) for row in range(ITEMS)]
    return Embeddings(vision, embedded(first), first, ids, labels, [None] * ITEMS, keys, "image", others)


def ours(found: Embeddings) -> dict[str, float]:
    accuracy = {one.measure: one.value for one in zero_shot(found, TEMPLATES, embedded)[0]}
    recall = {f"{one.task} {one.measure}": one.value for one in retrieval(found, embedded)}
    return accuracy | recall


def test_the_figures_are_those_of_the_published_formulas(found):
    classes = torch.stack([embedded([one.replace("{}", name) for one in TEMPLATES]).mean(0) for name in NAMES])
    logits = 100.0 * found.vision @ F.normalize(classes, dim=-1).T
    wanted = {}
    for k in (1, 5):
        right = (logits.topk(k, dim=1).indices == TRUTH[:, None]).any(1)
        wanted[f"top-{k}"] = right.double().mean().item()
    right = (logits.argmax(1) == TRUTH).double()
    wanted["top-1, mean of classes"] = (torch.bincount(TRUTH, right) / torch.bincount(TRUTH)).mean().item()
    texts = [
        caption for first, others in zip(found.captions, found.others, strict=True) for caption in (first, *others)
    ]
    scores = embedded(texts) @ found.vision.T
    of_text = torch.arange(len(texts)) // CAPTIONS
    for k in (1, 5, 10):
        hits = (scores.topk(k, dim=1).indices == of_text[:, None]).any(1)
        wanted[f"text to image R@{k}"] = hits.double().mean().item()
        hits = (of_text[scores.T.topk(k, dim=1).indices] == torch.arange(ITEMS)[:, None]).any(1)
        wanted[f"image to text R@{k}"] = hits.double().mean().item()
    assert ours(found) == pytest.approx(wanted)
    assert all(0 < value < 1 for value in wanted.values())


class _Tokens(list):
    def to(self, device):
        return self


class _Data(list):
    dataset = type("Dataset", (), {"classes": NAMES})


class _Model:
    encode_text = staticmethod(embedded)
    encode_image = staticmethod(lambda images: images)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("clip_benchmark") is None, reason="clip_benchmark is not installed")
def test_the_figures_are_those_of_the_package(found, monkeypatch):
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    # numpy 2.4 refuses float() of an array of one element, which its `accuracy` calls.
    monkeypatch.setattr(zeroshot_classification, "float", lambda one: np.asarray(one).item(), raising=False)
    parts = [slice(start, start + 64) for start in range(0, ITEMS, 64)]
    labelled = _Data((found.vision[part], TRUTH[part]) for part in parts)
    templates = [one.replace("{}", "{c}") for one in TEMPLATES]
    accuracy = zeroshot_classification.evaluate(_Model, labelled, _Tokens, NAMES, templates, "cpu", amp=False)
    texts = [[first, *others] for first, others in zip(found.captions, found.others, strict=True)]
    captioned = _Data((found.vision[part], texts[part]) for part in parts)
    recall = zeroshot_retrieval.evaluate(_Model, captioned, _Tokens, "cpu", amp=False, recall_k_list=[1, 5, 10])
    result = ours(found)
    names = {"acc1": "top-1", "acc5": "top-5", "mean_per_class_recall": "top-1, mean of classes"}
    for k in (1, 5, 10):
        names |= {f"image_retrieval_recall@{k}": f"text to image R@{k}"}
        names |= {f"text_retrieval_recall@{k}": f"image to text R@{k}"}
    theirs = accuracy | recall
    assert {name: theirs[name] for name in names} == pytest.approx({name: result[names[name]] for name in names})
