"""A peer's patches are those of transformers' own last hidden state, without class and register tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.closeness import assert_sums_close
from tests.support.peers import ALONE, PATCH, WHOLE, save_peer
from univitar_ds.peers.families import FAMILIES
from univitar_ds.peers.model import PeerModel
from univitar_ds.peers.sizes import PatchSizes

KINDS = (*WHOLE, *ALONE)
TERMS = 2 * (3 * 24 + 40) + 3 * 8 * 8
"""Of the sums on the longest path: two blocks and the patches."""
BEFORE = {"clip": 1, "clip_vision_model": 1, "siglip": 0, "siglip2": 0, "dinov2": 1, "dinov2_with_registers": 5}
BEFORE["dinov3_vit"] = 3
"""Tokens before the patches: the class token and registers."""
NORMS = {
    "siglip2": ((0.5,) * 3,) * 2,
    "dinov2": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dinov3_vit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and deviation of the image processors: their defaults, since `save_peer` names none."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("peers")
    return {kind: save_peer(kind, root / kind) for kind in KINDS}


def pixels(height: int, width: int) -> np.ndarray:
    draws = np.random.default_rng(height)
    small = Image.fromarray(draws.integers(0, 256, (6, 8, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.BICUBIC))


@torch.no_grad()
def by_transformers(folder: Path, kind: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return (model.vision_model if kind in WHOLE else model)(**inputs).last_hidden_state[0]


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_those_of_transformers(folders, kind):
    from transformers import AutoImageProcessor

    image = pixels(40, 60)
    model = PeerModel(folders[kind], kind, None, torch.device("cpu"))
    (found, other), grids = model.encoded([image, pixels(61, 33)], 40, patches=True)
    if kind == "dinov3_vit":  # its image processor needs torchvision
        inputs = model._images(Image.fromarray(image), None)
    else:
        processor = AutoImageProcessor.from_pretrained(folders[kind], backend="pil", local_files_only=True)
        inputs = processor(images=Image.fromarray(image), return_tensors="pt")
    wanted = by_transformers(folders[kind], kind, inputs)[BEFORE[kind] :][: grids[0][0] * grids[0][1]]
    assert grids[0] == ((3, 5) if kind == "siglip2" else (4, 4))
    assert (len(found), len(other)) == tuple(rows * columns for rows, columns in grids)
    assert_sums_close(found, wanted, TERMS)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.numeric
@pytest.mark.parametrize("kind", [kind for kind in KINDS if FAMILIES[kind].any_size])
def test_an_image_keeps_the_size_that_is_asked_for(folders, kind):
    """Rows and columns are in their order: the patches of an image of 5 x 7 patches are those of transformers."""
    image = pixels(5 * PATCH, 7 * PATCH)
    model = PeerModel(folders[kind], kind, None, torch.device("cpu"))
    (found, resized), grids = model.encoded([image, pixels(61, 33)], 40, sizes=[(5, 7), (2, 3)], patches=True)
    assert grids == [(5, 7), (2, 3)]
    assert resized.shape == (6, model.token_width)
    mean, std = NORMS.get(kind, NORMS["dinov2"])
    values = torch.from_numpy((image / 255 - np.array(mean)) / np.array(std)).float().permute(2, 0, 1)
    inputs = {"pixel_values": values[None]}
    if kind == "siglip2":
        patches = values.view(3, 5, PATCH, 7, PATCH).permute(1, 3, 2, 4, 0).reshape(1, 35, -1)
        inputs = {"pixel_values": patches, "pixel_attention_mask": torch.ones(1, 35, dtype=torch.int32)}
        inputs["spatial_shapes"] = torch.tensor([[5, 7]])
    wanted = by_transformers(folders[kind], kind, inputs)[-35:]
    assert_sums_close(found, wanted, TERMS)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()  # the processor rounds pixels in another order


def test_sizes_have_at_most_the_tokens_that_are_asked_for():
    for rule in (PatchSizes(16, 200), PatchSizes(16, 200, enlarges=True), PatchSizes(16, 196, square=True)):
        for size in ((480, 640), (10, 10), (31, 4000)):
            for frames in (1, 8):
                rows, columns = rule.grid(*size, frames)
                assert 1 <= rows * columns * frames <= max(rule.tokens, frames)
    assert PatchSizes(16, 200).grid(32, 64) == (2, 4)
    assert PatchSizes(16, 200, enlarges=True).grid(32, 64) == (10, 20)
    assert PatchSizes(16, 196, square=True).grid(31, 4000) == (14, 14)
