"""A tiny ContrastiveModel, trained by DeepSpeed on the ranks of a test, and stored models in memory."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.support.closeness import encoder_terms, gradient_terms, transformer_terms
from tests.support.standin import ITEMS, LANES, TOKENS, VOCAB
from tests.support.training import ds_config, steps
from tests.unit.model.made import small_config
from univitar_ds.config.model import ModelConfig, TextConfig
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.formats.sidecar import SIDECAR, write_sidecar
from univitar_ds.formats.stored_model import JointConfig, OptimizerState, StoredModel, Tensors
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.config import PRESETS
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.engine.engine import Engine, build_engine

ENCODER = small_config(hidden_size=24, num_attention_heads=2, intermediate_size=48)
TEXT = TextConfig(hidden_size=15, layers=1, heads=3, intermediate_size=24, context_length=8)
"""Of odd width: two ranks of stage 3 store its vectors with padding."""
JOINT = JointConfig(
    embed_dim=16, pool_heads=2, objective="sigmoid", text={"model_type": "clip_text_model"}, context_length=8,
    tokenizer='{"version": "1.0"}',
)  # fmt: skip
TERMS = gradient_terms(
    588
    + encoder_terms(ENCODER, TOKENS)
    + transformer_terms(width=24, inner=0, head=12, layers=1, longest=TOKENS)
    + transformer_terms(width=15, inner=24, head=5, layers=1, longest=5)
    + TOKENS
    + 16,
    LANES * ITEMS * TOKENS + (LANES * ITEMS) ** 2,
)
"""`terms` of a gradient of the model; see `tests.support.closeness`."""
KINDS = ("fp32", "exp_avg", "exp_avg_sq", "frozen")
Pieces = list[tuple[str, tuple[int, ...], int, dict[str, Tensor]]]


class Wrapped(nn.Module):
    """A model as the attribute `module` of another, whose parameters have the prefix "module."."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


def tiny_model(*, frozen: bool = True, seed: int = 0) -> nn.Module:
    """Args: frozen: whether the text tower is."""
    text = TEXT.model_copy(update={"frozen": frozen})
    config = ModelConfig(text=text, embed_dim=JOINT.embed_dim, pool_heads=JOINT.pool_heads)
    with patch.dict(PRESETS, {"tiny": ENCODER}):
        return build_contrastive(config, vocab_size=VOCAB, eos_id=2, pad_id=0, seed=seed)


def tiny_stored(*, optimizer: bool = True, frozen: bool = True) -> StoredModel:
    """A stored model in memory, with moments of random values and two parameter groups."""
    model = tiny_model(frozen=frozen)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    generator = torch.Generator().manual_seed(1)
    moments = [{name: torch.rand(value.shape, generator=generator) for name, value in trained.items()} for _ in "mv"]
    common = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8}
    groups = [
        {**common, "weight_decay": 0.1, "step": 7, "params": [name for name in trained if trained[name].ndim > 1]},
        {**common, "weight_decay": 0.0, "step": 5, "params": [name for name in trained if trained[name].ndim < 2]},
    ]
    state = OptimizerState(7, *map(Tensors.of, moments), groups) if optimizer else None
    return StoredModel(Path("memory"), "memory", ENCODER, Tensors.of(model.state_dict()), JOINT, state)


def with_sidecar(folder: Path) -> Path:
    """Returns `folder` with the configuration of the tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sidecar(tiny_stored(optimizer=False), folder)
    return folder


def tiny_engine(
    world: World,
    *,
    frozen: bool = True,
    wrapped: bool = False,
    sub_group: int | None = None,
    universal: bool = False,
    **settings: Any,
) -> Engine:
    """The engine of the tiny model. With `universal` all trained values are wrong until a checkpoint is loaded."""
    model = tiny_model(frozen=frozen)
    config = ds_config(LANES // world.size, **settings)
    if sub_group is not None:
        config["zero_optimization"]["sub_group_size"] = sub_group
    if universal:
        config["checkpoint"] = {"load_universal": True}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1)
    model = Wrapped(model) if wrapped else model
    return build_engine(model, OptimizerConfig(betas=(0.9, 0.98)), config, world)


def pieces_of(engine: Engine) -> Pieces:
    """This rank's shard of every parameter, in memory of its own."""
    return [
        (piece.name, piece.shape, piece.start, {kind: value.clone() for kind, value in piece.tensors.items()})
        for piece in engine.pieces()
    ]


def whole(ranks: list[Pieces]) -> dict[str, dict[str, Tensor]]:
    """Whole tensors by kind (see KINDS) and name, sorted, from the pieces of all ranks."""
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for pieces in ranks:
        for name, shape, start, tensors in pieces:
            for kind, value in tensors.items():
                if value.numel():
                    target = found[kind].setdefault(name, torch.full(shape, torch.nan, dtype=value.dtype))
                    target.view(-1)[start : start + value.numel()] = value
    return {kind: dict(sorted(tensors.items())) for kind, tensors in found.items()}


def trained_to(engine: Engine, first: int, last: int) -> list[float]:
    """The losses of these steps."""
    return [result.loss for result in steps(engine, first, last)]


def assert_same(got: StoredModel, wanted: StoredModel) -> None:
    """Check that two models are bitwise equal, with configuration and optimizer's state."""
    assert (got.encoder, got.joint) == (wanted.encoder, wanted.joint)
    assert_equal(got.tensors, wanted.tensors)
    assert (got.optimizer is None) == (wanted.optimizer is None)
    if wanted.optimizer is not None:
        assert got.optimizer.step == wanted.optimizer.step
        assert_equal(got.optimizer.exp_avg, wanted.optimizer.exp_avg)
        assert_equal(got.optimizer.exp_avg_sq, wanted.optimizer.exp_avg_sq)
        for one, other in zip(got.optimizer.groups, wanted.optimizer.groups, strict=True):
            assert {key: one[key] for key in other} == other


def assert_equal(got: Any, wanted: Any) -> None:
    """Check that tensors by name are bitwise equal and described as they are."""
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        found = got[name]
        assert (tuple(found.shape), found.dtype) == (tuple(value.shape), value.dtype)
        assert not found.requires_grad, f"{name} keeps what it was copied from"
        if isinstance(got, Tensors):
            assert (got.infos[name].shape, got.infos[name].dtype) == (tuple(value.shape), value.dtype)
            assert found.untyped_storage().nbytes() == value.nbytes, f"{name} holds more memory than its own"
        assert torch.equal(found.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


class Counted:
    """Tensors that count how many of them exist at the same time."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors, self.alive, self.most = tensors, 0, 0

    def read(self, name: str) -> Tensor:
        import weakref

        value = self.tensors[name].clone()
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(value, self._gone)
        return value

    def _gone(self) -> None:
        self.alive -= 1

    def model(self, stored: StoredModel) -> StoredModel:
        return dataclasses.replace(stored, tensors=Tensors(self.tensors.infos, self.read))


class Trap:
    """An object whose unpickling would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def damages(content: bytes) -> Iterator[bytes]:
    """A file's content, damaged in several ways."""
    yield b""
    yield content[: len(content) // 2]
    yield b"\x80\x04garbage"
    yield pickle.dumps(["a list"])
    yield json.dumps({"SIDECAR": SIDECAR}).encode()
