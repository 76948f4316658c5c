"""Compares an exported program with its model by their outputs for one pack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from univitar_ds.convert.program import ONNX, PROGRAM, image_program, program_inputs
from univitar_ds.errors import CheckpointError
from univitar_ds.extras import extra
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.geometry import token_count
from univitar_ds.kernels.reference import PATCH_VALUES

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2.0**-4}
"""Maximum difference of an output by the type of the weights, relative to its largest absolute value. Chosen: other
libraries sum in another order. 2**-4 is 16 times the rounding of bfloat16."""
Grids = Sequence[Sequence[int]]


def compare_program(model: StoredModel, folder: Path, grids: Grids = ()) -> str:
    """Runs one pack of random patches through a model and the program in `folder`. Returns a sentence with the
    largest difference.

    Args: model: what was exported; grids: those of an ONNX file; none: `model.pt2`, with three items of other grids.
    Raises: CheckpointError if an output differs by more than `LIMITS`; InstallationError for an ONNX file without the
        extra `onnx`.
    """
    merge = model.encoder.spatial_merge_size
    pack = [list(map(int, grid)) for grid in grids] or [[1, 3 * merge, 2 * merge], [2, merge, merge], [1, merge, merge]]
    patches = torch.randn(sum(map(token_count, pack)), PATCH_VALUES, generator=torch.Generator().manual_seed(0))
    wanted = _outputs(model, patches, pack)
    with torch.no_grad():
        found = _run_onnx(folder, patches) if grids else _run_program(folder, patches, pack, merge)
    limit = LIMITS[next(iter(model.tensors.infos.values())).dtype]
    largest = 0.0
    for (name, one), other in zip(wanted.items(), found, strict=True):
        scale = one.double().abs().max().item()
        difference = (other.double() - one.double()).abs().max().item()
        if not difference <= limit * scale:  # also if it is NaN
            raise CheckpointError(
                f"the {name} of the program differ by up to {difference:.3g} from those of {model.path}, whose largest "
                f"value is {scale:.3g} (limit {limit:.3g} of it); check the disk and the versions of torch and onnx"
            )
        largest = max(largest, difference / scale if scale else 0.0)
    return (
        f"verified: the program and the model give the same output for one pack, largest difference {largest:.2g} of "
        f"the largest value (limit {limit:.2g})"
    )


def _outputs(model: StoredModel, patches: Tensor, grids: Grids) -> dict[str, Tensor]:
    """Returns the tokens, and the embeddings of a whole model, by the modules' own forward passes, which are not those
    that were recorded."""
    modules = image_program(model)
    with torch.no_grad():
        tokens = modules.vision(patches, grids)
        if modules.pool is None:
            return {"tokens": tokens}
        pooled = modules.pool(tokens, [token_count(grid) for grid in grids])
        return {"tokens": tokens, "embeddings": F.normalize(modules.vision_proj(pooled).float(), dim=-1)}


def _run_program(folder: Path, patches: Tensor, grids: Grids, merge: int) -> list[Tensor]:
    run = torch.export.load(folder / PROGRAM).module()
    found = run(patches, *program_inputs(grids, merge))
    return [found] if isinstance(found, Tensor) else list(found)


def _run_onnx(folder: Path, patches: Tensor) -> list[Tensor]:
    with extra("onnx"):
        import onnxruntime
    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"pixel_values": patches.numpy()})]
