"""The programs of examples/ run, and do what their texts state."""

import dataclasses
import importlib.util
from types import ModuleType

import pytest
import torch
from PIL import Image

from tests.support.paths import ROOT
from tests.unit.model.made import small_config
from univitar_ds import Preprocessor, UniViTAR
from univitar_ds.model.config import PRESETS


@pytest.fixture(scope="module")
def tower() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vlm_tower", ROOT / "examples" / "vlm_tower.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gradients_of_the_text_reach_every_weight_of_the_encoder_and_of_the_merger(tower, capsys):
    model = tower.main()
    said = "grids [[1, 4, 8], [2, 6, 4]]: 80 tokens, 8 + 12 merged, loss "
    assert capsys.readouterr().out.startswith(said)
    for part in (model.vision, model.merger):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_a_merged_token_is_a_block_of_2x2_neighbours_of_the_image(tower):
    """Without attention and feed-forward layers (a LayerScale of 0) a token depends on its own patch only."""
    config = small_config(spatial_merge_size=2, resize_factor=1, min_tokens=4, max_tokens=128, initializer_factor=0.0)
    encoder, merger = UniViTAR(config), tower.Merger(config.hidden_size, 16)
    rows, columns = 3, 4  # blocks, 28 pixels each
    grey = Image.new("RGB", (28 * columns, 28 * rows), "grey")

    def merged(item) -> torch.Tensor:
        with torch.no_grad():
            return merger(encoder(*Preprocessor(config)([item])))

    plain = merged([grey] * 4)
    assert len(plain) == 2 * rows * columns
    for row in range(rows):
        for column in range(columns):
            marked = grey.copy()
            marked.paste("white", (28 * column, 28 * row, 28 * column + 28, 28 * row + 28))
            changed = (merged([grey, grey, marked, marked]) != plain).any(dim=1)
            assert changed.nonzero().flatten().tolist() == [rows * columns + row * columns + column]


def test_a_trained_encoder_keeps_its_sizes_with_merged_patches():
    for config in PRESETS.values():
        merging = dataclasses.replace(config, spatial_merge_size=2, resize_factor=1)
        assert merging.resolution == config.resolution
        assert merging.parameter_count() == config.parameter_count()
