"""Writes the folder of a finished run without training and DeepSpeed: config, tokenizer and a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from univitar_ds.classes import class_list
from univitar_ds.config.load import check_config, config_fingerprint, dump_config
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.labels import iterate_labels
from univitar_ds.formats.elastic import MASTER
from univitar_ds.formats.stored_model import MOMENTS
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.classification import ClassificationModel, build_classifier
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.tokenization import special_ids, train_tokenizer
from univitar_ds.training.checkpoint.sharded import save_checkpoint
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.engine.engine import ParamShard

CAPTIONS = ["a red image", "a green image", "a blue video moving left", "a grey video moving right"]


def run_config(shards: Path | str = "nowhere", **changes: Any) -> RunConfig:
    """A run file with one stage of images and videos, evaluated on the test split of `shards`.

    `changes` replace whole sections.
    """
    source = str(shards)
    content = {
        "name": "tried",
        "model": {
            "embed_dim": 16,
            "text": {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 64, "vocab_size": 300},
        },
        "data": {"sources": [{"path": source}], "workers": 0},
        "stages": [
            {
                "name": "both",
                "samples": 10,
                "image": {"min_tokens": 4, "max_tokens": 36, "divisor_px": 14},
                "video": {"min_tokens": 8, "max_tokens": 64, "divisor_px": 14},
                "video_ratio": 0.5,
                "video_frames": 4,
                "token_budget": 200,
                "lr": 1e-3,
            }
        ],
        "evaluation": {"sources": [{"path": source, "split": "test"}], "token_budget": 200},
    }
    return check_config({**content, **changes}, "the test")


class Untrained:
    """An engine with only the attributes that `save_checkpoint` uses, around an untrained model."""

    def __init__(self, model: ContrastiveModel | ClassificationModel) -> None:
        self.module = model
        self.world = World(0, 1, 0, torch.device("cpu"))
        self.disk = None

    def pieces(self) -> Iterator[ParamShard]:
        for name, parameter in self.module.named_parameters():
            flat = parameter.detach().view(-1)
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            yield ParamShard(name, tuple(parameter.shape), 0, {MASTER: flat, **moments})

    def optimizer_state(self) -> dict:
        return {"updates": 7.0, "groups": [], "global_steps": 7}


def write_run(folder: Path, config: RunConfig) -> ContrastiveModel | ClassificationModel:
    """Writes the folder of a run; for a classifier, with the classes of its sources.

    Returns the model whose weights are in its checkpoint, step-00000007.
    """
    folder.mkdir(parents=True)
    dump_config(config, folder / "config.yaml")
    if config.objective.classifies:
        classes = class_list(iterate_labels(config.data.sources))
        classes.write(folder / "classes.json")
        model = build_classifier(config.model, classes=len(classes), seed=5)
    else:
        tokenizer = train_tokenizer(CAPTIONS, config.model.text.vocab_size)
        tokenizer.save(str(folder / "tokenizer.json"))
        special = special_ids(tokenizer)
        model = build_contrastive(config.model, **special.of_text_model, seed=5)
    state = {"fingerprint": config_fingerprint(config), "config": config.model_dump(mode="json")}
    save_checkpoint(Untrained(model), folder / "checkpoints", 7, state, {}, keep=1)
    return model.eval()
