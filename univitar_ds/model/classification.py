"""The classifier: encoder, attention pooling and a linear head, without a text tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.model import ModelConfig
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.model.blocks.dropping import DropPlan
from univitar_ds.model.build import build_vision, described_encoder, load_start, seeded
from univitar_ds.model.contrastive import AttentionPool, leave_heads_aside
from univitar_ds.model.distill_heads import Distilled, DistillHeads
from univitar_ds.model.encoder import UniViTAR


class Classified(NamedTuple):
    """Output for a pack of N items: `logits` (N, C) of all classes; features in the teacher's width if requested."""

    logits: Tensor
    distilled: Distilled | None = None


class ClassificationModel(nn.Module):
    """The trained model of `objective.kind: classification`. Distillation heads: as in `ContrastiveModel`.

    The head has a row for each class of all data sets, in the order of `univitar_ds.classes.ClassList`, in one matrix:
    every rank uses all weights in each step, as ZeRO-3 needs, whichever data sets its packs come from.
    """

    def __init__(self, vision: UniViTAR, config: ModelConfig, classes: int, teacher_width: int | None = None) -> None:
        super().__init__()
        width, eps = vision.config.hidden_size, vision.config.layer_norm_eps
        self.vision = vision
        self.pool = AttentionPool(width, config.pool_heads, eps, config.attention)
        self.head = nn.Linear(width, classes)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.distill: DistillHeads | None = None
        if teacher_width is None:
            self.register_load_state_dict_pre_hook(leave_heads_aside)
        else:
            self.distill = DistillHeads(width, teacher_width, eps)

    def description(self) -> dict[str, Any]:
        """Returns the configuration of the encoder as a JSON object, and the number of classes."""
        return {"encoder": self.vision.config.to_dict(), "classes": self.head.out_features}

    def forward(
        self, pixels: Tensor, frames: Tensor, grid_thw: Tensor, distill: bool = False, drops: DropPlan | None = None
    ) -> Classified:
        """Classifies one pack; N may be 0. Args: as `ContrastiveModel.forward`."""
        grids = grid_thw.tolist()
        tokens = self.vision(pixels, grids, frames=frames, drops=drops)
        pooled = self.pool(tokens, self.vision.lengths(grids, drops))
        return Classified(self.head(pooled), self.distill(tokens, pooled) if distill else None)


def build_classifier(
    config: ModelConfig,
    *,
    classes: int,
    seed: int,
    teacher_width: int | None = None,
    start: StoredModel | None = None,
    description: Mapping[str, Any] | None = None,
) -> ClassificationModel:
    """Builds the model of a classification run, on the CPU in float32. Equal arguments give bitwise equal weights.

    The global random state does not change.

    Args: classes: C; teacher_width, start, description: as `build_contrastive`. Only the encoder is taken from `start`.
    Raises: ConfigError or CheckpointError as `build_contrastive`.
    """
    shape = EncoderConfig.from_dict(description["encoder"]) if description else described_encoder(config, start)
    vision = build_vision(config, shape, seed)
    with seeded(seed, "heads"):
        model = ClassificationModel(vision, config, classes, teacher_width)
    if start is not None:
        load_start(model, start, "encoder")
    return model


@torch.no_grad()
def class_logits(model: ClassificationModel, pixels: Tensor, frames: Tensor, grid_thw: Tensor) -> Tensor:
    """Returns the logits of a pack without gradients, (N, C) float32. Args: as `ContrastiveModel.encode_vision`."""
    return model(pixels, frames, grid_thw).logits.float()
