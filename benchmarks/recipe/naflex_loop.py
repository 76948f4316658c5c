"""Trains timm's NaFlexViT against a text tower by a plain loop, in an environment with timm and without this project.

    python naflex_loop.py REQUEST.json OUT.npz

`naflex.py` writes the request. The encoder is timm's with its own defaults but the sizes of the request: learned
position embeddings, attention pooling, no dropout. Batches are those of timm's NaFlex loader without augmentation, with
one decoding worker. The text tower is torch's transformer, causal and pooled at the last token. Optimizer, rates, loss
and batch size are those of the arm `video-0`. OUT has unit vectors of the test images and of all sentences, and the
samples, tokens without padding and seconds of the training.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_naflex_loader
from timm.models import NaFlexVit
from timm.models.naflexvit import NaFlexVitCfg
from torch import Tensor, nn

PATCH = 14
BETAS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.98), 0.1, 1.0
"""Those of the project's run file."""
LOGIT_SCALE = 10.0
TEXTS_AT_ONCE = 256


class Images(torch.utils.data.Dataset):
    """Decoded images and their numbers. timm's loader sets the transform."""

    transform = None

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with Image.open(self.rows[index]["file"]) as file:
            image = file.convert("RGB")
        return (self.transform(image) if self.transform else image), index


class Towers(nn.Module):
    """timm's encoder and a text tower of the request's sizes, with projections and the logit scale."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__()
        shape = NaFlexVitCfg(
            patch_size=PATCH,
            embed_dim=request["width"],
            depth=request["depth"],
            num_heads=request["heads"],
            mlp_ratio=request["feed_forward"] / request["width"],
        )
        self.vision = NaFlexVit(shape, num_classes=0)
        text = request["text"]
        width = text["hidden_size"]
        self.embedding = nn.Embedding(request["vocab_size"], width)
        self.positions = nn.Parameter(torch.zeros(text["context_length"], width))
        block = nn.TransformerEncoderLayer(
            width, text["heads"], text["intermediate_size"], 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.text = nn.TransformerEncoder(block, text["layers"], nn.LayerNorm(width), enable_nested_tensor=False)
        self.vision_proj = nn.Linear(request["width"], request["embed_dim"], bias=False)
        self.text_proj = nn.Linear(width, request["embed_dim"], bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(LOGIT_SCALE)))
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def encode_vision(self, patches: dict[str, Tensor]) -> Tensor:
        """Returns (N, E) unit vectors."""
        return F.normalize(self.vision_proj(self.vision(patches)), dim=-1)

    def encode_text(self, rows: list[list[int]]) -> Tensor:
        """Returns (N, E) unit vectors. Padding comes after the last token, which attends to none of it."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = nn.Transformer.generate_square_subsequent_mask(longest)
        states = self.text(self.embedding(ids) + self.positions[:longest], mask=mask, is_causal=True)
        last = states[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
        return F.normalize(self.text_proj(last), dim=-1)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.manual_seed(request["seed"])
    model = Towers(request)
    count = sum(weight.numel() for weight in model.vision.parameters())
    print(f"{count:,} parameters of the encoder, {torch.get_num_threads()} threads", flush=True)
    progress = train(model, request)
    model.eval()
    with torch.no_grad():
        rows = request["sentences"]
        text = [model.encode_text(rows[i : i + TEXTS_AT_ONCE]) for i in range(0, len(rows), TEXTS_AT_ONCE)]
        vision = [model.encode_vision(patches) for patches, _ in loader(request, "test")]
    np.savez(sys.argv[2], vision=torch.cat(vision).numpy(), text=torch.cat(text).numpy(), **progress)


def loader(request: dict[str, Any], split: str, epoch: int = 0) -> Any:
    """Returns timm's loader of a split: for train one shuffled epoch."""
    return create_naflex_loader(
        Images(request[split]),
        patch_size=PATCH,
        train_seq_lens=(request["tokens"],),
        max_seq_len=request["tokens"],
        batch_size=request["batch"],
        is_training=split == "train",
        no_aug=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        num_workers=1,
        seed=request["seed"],
        epoch=epoch,
        pin_memory=False,
        persistent_workers=False,
        device=torch.device("cpu"),
    )


def batches(request: dict[str, Any]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yields batches of one epoch after the other."""
    epoch = 0
    while True:
        yield from loader(request, "train", epoch)
        epoch += 1


def train(model: Towers, request: dict[str, Any]) -> dict[str, float]:
    """Trains until the samples or CPU seconds of the request are reached; the rate follows that share."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=request["lr"], betas=BETAS)
    draws = random.Random(request["seed"])
    start, samples, tokens = time.monotonic(), 0, 0
    for patches, numbers in batches(request):
        share = done(request, samples)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(request, share)
        captions = [draws.choice(request["train"][number]["captions"]) for number in numbers.tolist()]
        loss = contrastive(model, patches, captions, request["sentences"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        samples += len(captions)
        tokens += int(patches["patch_valid"].sum())
        if samples // 500 > (samples - len(captions)) // 500:
            print(f"{samples} samples, loss {loss.item():.3f}, {cpu_seconds():.0f} CPU s", flush=True)
    return {"samples": samples, "tokens": tokens, "seconds": time.monotonic() - start}


def done(request: dict[str, Any], samples: int) -> float:
    """Returns the share of the training that is done."""
    return cpu_seconds() / request["cpu_s"] if "cpu_s" in request else samples / request["samples"]


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its workers that have ended, those of earlier epochs."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def rate(request: dict[str, Any], share: float) -> float:
    """Returns the learning rate: linear warm-up, then a cosine to the final ratio."""
    warmup, last = request["warmup"], request["final_lr_ratio"]
    if share < warmup:
        return request["lr"] * share / warmup
    progress = (share - warmup) / (1 - warmup)
    return request["lr"] * (last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2)


def contrastive(model: Towers, patches: dict[str, Tensor], captions: list[int], sentences: list[list[int]]) -> Tensor:
    """Returns the softmax loss in both directions. Equal captions of a batch are positives of each other."""
    vision = model.encode_vision(patches)
    text = model.encode_text([sentences[caption] for caption in captions])
    logits = model.log_scale.exp() * vision @ text.T
    ids = torch.tensor(captions)
    positives = (ids[:, None] == ids).float()
    positives /= positives.sum(1, keepdim=True)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


if __name__ == "__main__":
    main()
