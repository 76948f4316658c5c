"""Reads the reference results of the released encoder; tests/golden/README.md describes how they were made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.support.closeness import assert_sums_close, encoder_terms, gradient_terms
from univitar_ds.config.encoder import read_encoder_config

FOLDER = Path(__file__).parents[1] / "golden"
CASES = ("merge1", "merge2")


@dataclass(frozen=True)
class Golden:
    folder: Path
    grid_thw: Tensor
    loss: float
    pixel_values: Tensor
    last_hidden_state: Tensor
    hidden_states: Tensor
    loss_weight: Tensor
    grads: dict[str, Tensor]

    @property
    def terms(self) -> int:
        """`terms` of an entry of `last_hidden_state`; see `closeness`."""
        return encoder_terms(read_encoder_config(self.folder), int(self.grid_thw.prod(1).max()))

    @property
    def gradient_terms(self) -> int:
        return gradient_terms(self.terms, len(self.pixel_values))

    def items(self) -> list[Image.Image | list[Image.Image]]:
        """Images and videos, in the order of the grids."""
        return [
            [Image.open(self.folder / name) for name in sample["frames"]]
            if "frames" in sample
            else Image.open(self.folder / sample["file"])
            for sample in _expected(self.folder)["samples"]
        ]


@cache
def golden(case: str) -> Golden:
    folder = FOLDER / case
    expected = _expected(folder)
    return Golden(
        folder=folder,
        grid_thw=torch.tensor([sample["grid_thw"] for sample in expected["samples"]]),
        loss=expected["loss"],
        grads=load_file(folder / "expected_grads.safetensors"),
        **load_file(folder / "expected.safetensors"),
    )


def assert_loss_close(loss: float, numbers: Golden) -> None:
    """Check the loss. It is a mean of n products of both signs, so its scale is their 2-norm divided by n."""
    products = numbers.last_hidden_state * numbers.loss_weight
    scale = (products.norm() / products.numel()).item()
    assert_sums_close(loss, numbers.loss, numbers.terms + products.numel(), "loss", scale=scale)


def resize_rows() -> list[list[int]]:
    """Rows of height, width, factor, min_pixels, max_pixels, resized height, resized width."""
    return json.loads((FOLDER / "smart_resize.json").read_text())["rows"]


def _expected(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text())
