"""Embeds all items of a data set and their captions, in one process and without gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from univitar_ds.data.batch import PackedBatch
from univitar_ds.geometry import Modality
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.screen import progress_bar
from univitar_ds.tokenization import encode

TEXTS_AT_ONCE = 256
"""Number of sentences that are embedded at a time."""


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of n items of one modality, in the order of the data. Row i of each field belongs to item i.

    `vision` and `text` are (n, E) float32 on the host, with rows of length 1. An item that has only a label has a row
    of zeros in `text` and the caption "". Equal `caption_ids` mean equal captions. `sets` are the names of the items'
    data sets, if the data has them. `others` are further captions of each item, () without any. `bad` counts the
    samples that were left out, by kind, or by rule if a condition of a source left them out.
    """

    vision: Tensor
    text: Tensor
    captions: list[str]
    caption_ids: list[int]
    labels: list[str | None]
    sets: list[str | None]
    keys: list[str]
    modality: Modality
    others: Sequence[tuple[str, ...]] = ()
    bad: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def captioned(self) -> list[int]:
        """Rows of the items that have a caption."""
        return [row for row, caption in enumerate(self.captions) if caption]


def embed(model: ContrastiveModel, packs: Iterable[PackedBatch], modality: Modality, *, progress: bool) -> Embeddings:
    """Embeds all packs, which have one modality, on the model's device. The model must be in evaluation mode.

    Returns: Embeddings, with n = 0 if there are no items.
    """
    return embed_by_each([model], packs, modality, progress=progress)[0]


def embed_by_each(
    models: Sequence[ContrastiveModel], packs: Iterable[PackedBatch], modality: Modality, *, progress: bool
) -> list[Embeddings]:
    """Embeds all packs by each of several models of one shape on one device, so that the packs are decoded once.

    Returns: the Embeddings of each model, as `embed`.
    """
    device = next(models[0].parameters()).device
    width = models[0].vision_proj.out_features
    vision, text = ([[torch.empty(0, width)] for _ in models] for _ in range(2))
    captions, caption_ids, labels, sets, keys, others = [], [], [], [], [], []
    bad: Counter[str] = Counter()
    with torch.no_grad(), progress_bar(desc=f"embedding {modality}s", unit=modality, disable=not progress) as bar:
        for pack in packs:
            assert pack.modality == modality, f"a pack of {pack.modality}s among {modality}s"
            bad.update(pack.bad)
            bad.update(pack.filtered)
            if not len(pack):  # bad samples at the end of the data
                continue
            pixels = pack.pixels.to(device)
            for model, of_items, of_texts in zip(models, vision, text, strict=True):
                of_items.append(model.encode_vision(pixels, pack.frames, pack.grid_thw).float().cpu())
                of_texts.append(_texts(model, pack, width, device))
            captions += pack.captions
            caption_ids += pack.caption_ids.tolist()
            labels += pack.labels
            sets += pack.sets
            keys += pack.keys
            others += pack.other_captions or [()] * len(pack)
            bar.update(len(pack))
    about = captions, caption_ids, labels, sets, keys, modality, others, bad
    return [
        Embeddings(torch.cat(of_items), torch.cat(of_texts), *about)
        for of_items, of_texts in zip(vision, text, strict=True)
    ]


def _texts(model: ContrastiveModel, pack: PackedBatch, width: int, device: torch.device) -> Tensor:
    """Returns the text embeddings of a pack, (items, width); 0 for an item without a caption."""
    vectors = torch.zeros(len(pack), width)
    rows = [row for row, caption in enumerate(pack.captions) if caption]
    if rows:
        ids, lengths = pack.token_ids[rows], pack.text_lengths[rows]
        vectors[rows] = _text_vectors(model, ids, lengths, device)
    return vectors


def _text_vectors(model: ContrastiveModel, ids: Tensor, lengths: Tensor, device: torch.device) -> Tensor:
    """Returns unit vectors (n, E) float32 on the host.

    A pack may have as many texts as tokens, all padded to the longest, so `TEXTS_AT_ONCE` bounds the memory."""
    parts = zip(ids.split(TEXTS_AT_ONCE), lengths.split(TEXTS_AT_ONCE), strict=True)
    return torch.cat([model.encode_text(some.to(device), counts).float().cpu() for some, counts in parts])


def embed_texts(model: ContrastiveModel, tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> Tensor:
    """Embeds sentences. Returns unit vectors (len(texts), E) float32 on the host."""
    device = next(model.parameters()).device
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            ids, lengths = encode(tokenizer, texts[start : start + TEXTS_AT_ONCE], context_length)
            rows.append(_text_vectors(model, ids, lengths, device))
    return torch.cat(rows)
