"""timm's NaFlexViT on the scenes: writes what `naflex_loop.py` needs, starts it, and scores its embeddings.

The loop runs in an environment with timm and without this project. It gets the files of the scenes, captions as the
ids of the tokenizer of `video-0` with the same seed, and returns embeddings of the test images and of all sentences
that the scores need, so that both encoders are scored by the same code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.recipe.arms import ARMS, run_file
from benchmarks.recipe.runs import Bench, append_rows, cpu_seconds, is_done, result_row, run_process
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.run_folder import TOKENIZER
from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.measure import measure
from univitar_ds.model.config import PRESETS
from univitar_ds.tokenization import caption_id, load_tokenizer, special_ids, token_rows

NAFLEX_ARMS = ("timm-samples", "timm-cpu")
LOOP = Path(__file__).with_name("naflex_loop.py")
TOKENS = 64
"""Length to which timm resizes and pads images, the mean number of tokens of an image of `video-0`."""


def provide_naflex(bench: Bench, arm: str, seed: int, python: str) -> None:
    """Trains and scores timm's encoder with one seed, unless its rows exist.

    Raises: SystemExit if `video-0` with this seed has not been trained, or its CPU seconds are not known.
    """
    if is_done(bench, arm, seed):
        return
    peer = bench.run("video-0", seed)
    if not (peer / "export/config.json").is_file():
        raise SystemExit(f"{arm} is compared with video-0, which is not trained with seed {seed}; name that arm too")
    budget = cpu_seconds(bench.folder / f"{peer.name}.cpu")
    if arm == "timm-cpu" and budget is None:
        raise SystemExit(f"the CPU seconds of {peer} are not known, since it was interrupted; delete it and repeat")
    lines = (bench.work / "scenes/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    images = [item for item in items if item["kind"] == "image"]
    templates = run_file(arm, ARMS["video-0"], bench.data, bench.samples, seed)["evaluation"]["image_templates"]
    sentences = _sentences(images, templates)
    request, out = (bench.folder / f"{arm}-{seed}.{kind}" for kind in ("json", "npz"))
    if not out.is_file():
        asked = {"cpu_s": budget} if arm == "timm-cpu" else {"samples": bench.samples}
        content = _request(bench, seed, images, sentences) | asked
        request.write_text(json.dumps(content), encoding="utf-8")
        record = bench.folder / f"{arm}-{seed}.cpu"
        run_process([python, str(LOOP), str(request), str(out)], record, fresh=True)
    append_rows(_rows(bench, arm, seed, images, templates, sentences))


def _sentences(images: Sequence[dict[str, Any]], templates: Sequence[str]) -> list[str]:
    """Returns all captions, and the sentences of all labels of test images, each once."""
    captions = [caption for item in images for caption in item["captions"]]
    labels = [item["label"] for item in images if item["split"] == "test" and item["label"] is not None]
    return list(dict.fromkeys([*captions, *(text.replace("{}", label) for label in labels for text in templates)]))


def _request(bench: Bench, seed: int, images: Sequence[dict[str, Any]], sentences: Sequence[str]) -> dict[str, Any]:
    """Returns the input of the loop: the sizes, rates and data of `video-0`."""
    config = run_file("peer", ARMS["video-0"], bench.data, bench.samples, seed)
    tokenizer = load_tokenizer(bench.run("video-0", seed) / TOKENIZER)
    index = {sentence: number for number, sentence in enumerate(sentences)}
    shape: EncoderConfig = PRESETS[config["model"]["encoder"]]
    stage = config["stages"][0]
    rows = {
        split: [
            {
                "file": str(bench.work / "scenes" / item["file"]),
                "captions": [index[caption] for caption in item["captions"]],
            }
            for item in images
            if item["split"] == split
        ]
        for split in ("train", "test")
    }
    return {
        **rows,
        "sentences": token_rows(tokenizer, sentences, config["model"]["text"]["context_length"]),
        "vocab_size": special_ids(tokenizer).vocab_size,
        "seed": seed,
        "width": shape.hidden_size,
        "depth": shape.num_hidden_layers,
        "heads": shape.num_attention_heads,
        "feed_forward": shape.intermediate_size,
        "text": config["model"]["text"],
        "embed_dim": config["model"]["embed_dim"],
        "tokens": TOKENS,
        "batch": stage["token_budget"] // TOKENS,
        "lr": stage["lr"],
        "final_lr_ratio": stage["final_lr_ratio"],
        "warmup": stage["warmup_samples"] / stage["samples"],
    }


def _rows(
    bench: Bench,
    arm: str,
    seed: int,
    images: Sequence[dict[str, Any]],
    templates: Sequence[str],
    sentences: Sequence[str],
) -> list[dict[str, Any]]:
    """Scores the embeddings that the loop has written."""
    with np.load(bench.folder / f"{arm}-{seed}.npz") as file:
        vision, text = torch.from_numpy(file["vision"]), torch.from_numpy(file["text"])
        progress = {name: file[name].item() for name in ("samples", "tokens", "seconds")}
    progress["cpu_s"] = cpu_seconds(bench.folder / f"{arm}-{seed}.cpu")
    index = {sentence: number for number, sentence in enumerate(sentences)}
    tests = [item for item in images if item["split"] == "test"]
    captions = [item["captions"][0] for item in tests]
    ids = [caption_id(caption) for caption in captions]
    found = Embeddings(
        vision,
        text[[index[caption] for caption in captions]],
        captions,
        ids,
        [item["label"] for item in tests],
        [None] * len(tests),
        [item["file"] for item in tests],
        "image",
    )

    def texts(wanted: Sequence[str]) -> Tensor:
        return text[[index[sentence] for sentence in wanted]]

    figures, _ = measure(found, templates, texts, expected=True, named=False)
    return [result_row(bench, arm, seed, progress, figure.to_dict()) for figure in figures]
