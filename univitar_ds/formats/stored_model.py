"""A stored model in no particular format: its configuration, and tensors that are read one at a time.

Each format reads its files as a `StoredModel` and writes a `StoredModel` as its files, so any format can be converted
to any other. Tensors have the names of `ContrastiveModel`:

    vision.embeddings..., vision.encoder.layers...     encoder, as in the release with the prefix "vision."
    pool.norm.weight, pool.query, pool.kv...           attention pooling
    vision_proj.weight, text_proj.weight               projections to the joint space
    text.model....                                     text tower, with the names of transformers
    logit_scale, logit_bias                            (1,); the scale is stored as its logarithm
    distill....                                        heads that only training uses
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from univitar_ds.config.encoder import EncoderConfig

VISION = "vision."
"""Prefix of the encoder's tensors."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, as fields of `OptimizerState`."""
HEADS = "distill."
"""Prefix of the distillation heads, which only training uses."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(Mapping[str, Tensor]):
    """Stored tensors by name, in a fixed order. Each access reads the tensor, on the CPU; nothing is kept.

    Args: infos: shape and type of every tensor; read: reads one tensor by name, as `infos` describes it.
    """

    def __init__(self, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> None:
        self.infos = dict(infos)
        self._read = read

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Tensors:
        """Returns tensors that are in memory."""
        infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        return cls(infos, lambda name: state[name].detach().cpu())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.infos:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def renamed(self, rename: Callable[[str], str | None]) -> Tensors:
        """Returns the tensors under new names. Tensors for which `rename` returns None are left out."""
        source = {new: name for name in self.infos if (new := rename(name)) is not None}
        return Tensors({new: self.infos[name] for new, name in source.items()}, lambda new: self._read(source[new]))

    def converted(self, dtype: torch.dtype) -> Tensors:
        """Returns the tensors with floating-point values converted to `dtype`."""
        infos = {
            name: replace(info, dtype=dtype) if info.dtype.is_floating_point else info
            for name, info in self.infos.items()
        }
        return Tensors(infos, lambda name: self._read(name).to(infos[name].dtype))


@dataclass(frozen=True)
class JointConfig:
    """Configuration of everything that a whole model has besides its encoder.

    `text` is the configuration of the text model in the form of transformers' config.json (`model_type`
    clip_text_model or siglip_text_model). `tokenizer` is the content of tokenizer.json. `context_length` is the maximum
    length of a text in tokens. `objective` determines what logits mean: independent probabilities (sigmoid) or one
    distribution over the texts (softmax).
    """

    embed_dim: int
    pool_heads: int
    objective: Literal["sigmoid", "softmax"]
    text: dict[str, Any]
    context_length: int
    tokenizer: str


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state: number of updates, both moments by the names of the trained parameters, and parameter groups.

    Each group has lr, betas, eps, weight_decay and `params`, the names of its parameters.
    """

    step: int
    exp_avg: Tensors
    exp_avg_sq: Tensors
    groups: list[dict[str, Any]]


@dataclass(frozen=True)
class StoredModel:
    """A model in a format's files. Without `joint` it is an encoder alone, whose tensors all begin with "vision.".

    `origin` describes the source for messages and the model card: path, format, and what the format knows about the
    training (run, step, samples seen, whether the weights are averaged).
    """

    path: Path
    format: str
    encoder: EncoderConfig
    tensors: Tensors
    joint: JointConfig | None = None
    optimizer: OptimizerState | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    def encoder_only(self) -> StoredModel:
        """Returns the encoder alone, without an optimizer's state."""
        tensors = self.tensors.renamed(lambda name: name if name.startswith(VISION) else None)
        return replace(self, tensors=tensors, joint=None, optimizer=None)

    def converted(self, dtype: torch.dtype) -> StoredModel:
        """Returns the model with floating-point tensors of type `dtype`. An optimizer's state keeps its type."""
        return replace(self, tensors=self.tensors.converted(dtype))
