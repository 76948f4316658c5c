"""Compares two stored models by their outputs for one pack of an image, a wide image and a video."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from univitar_ds.errors import CheckpointError
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.model.from_stored import build_encoder, build_model
from univitar_ds.preprocessing import Preprocessor

_TOKEN_IDS = ((5, 9, 4, 7), (8, 6, 3, 3))
_LENGTHS = (4, 3)


def compare(source: StoredModel, written: StoredModel) -> str:
    """Runs one pack through both models. Returns a sentence with the largest difference, which is 0.

    Both run in float32, since formats may store different types, and a model may have tensors of several types. Smaller
    types are converted to float32 exactly, so the outputs are bitwise equal unless a tensor differs.
    Raises: CheckpointError if an output differs.
    """
    outputs, finite = _outputs(written.converted(torch.float32)), True
    for name, wanted in _outputs(source.converted(torch.float32)).items():
        found = outputs[name]
        finite = finite and bool(wanted.isfinite().all())
        if not torch.equal(found.view(torch.int32), wanted.view(torch.int32)):  # NaN differs from itself
            difference = (found.double() - wanted.double()).abs().max().item()
            raise CheckpointError(
                f"the {name} of {written.path} differ by up to {difference:.3g} from those of {source.path}; check the "
                "disk and repeat"
            )
    values = "" if finite else " (with values that are not finite: the source's weights are broken)"
    return f"verified: both models give the same output for one pack{values}, largest difference 0"


def _outputs(stored: StoredModel) -> dict[str, Tensor]:
    """Returns the output tokens of the encoder, and the embeddings if the model is whole."""
    pixels, frames, grids = Preprocessor(stored.encoder).pixels(_items())
    with torch.no_grad():
        if stored.joint is None:
            return {"tokens": build_encoder(stored)(pixels, grids, frames=frames)}
        model = build_model(stored)
        tokens = model.vision(pixels, grids, frames=frames)
        vision = model.encode_vision(pixels, torch.tensor(frames), torch.tensor(grids))
        text = model.encode_text(torch.tensor(_TOKEN_IDS), torch.tensor(_LENGTHS))
    return {"tokens": tokens, "image embeddings": vision, "text embeddings": text}


def _items() -> list[Image.Image | list[Image.Image]]:
    rows, columns = np.mgrid[0:113, 0:187]
    image = Image.fromarray(np.stack([rows * 2, columns, (rows * columns) % 251], axis=-1).astype(np.uint8))
    return [image, image.resize((400, 60)), [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]]
