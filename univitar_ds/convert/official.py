"""Exports a run's encoder in the release's layout: `config.json` and `model.safetensors`."""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from univitar_ds import UniViTAR
from univitar_ds.atomic_write import move_into_place
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.run_folder import CHECKPOINTS, EXPORT, EXPORT_FILES
from univitar_ds.config.run_folder import CONFIG as RUN_CONFIG
from univitar_ds.config.stage import StageConfig
from univitar_ds.errors import CheckpointError, writing
from univitar_ds.geometry import PATCH
from univitar_ds.model.weights import save_encoder
from univitar_ds.owned import MARK, foreign, is_empty, is_marked, mark, remove
from univitar_ds.preprocessing import Preprocessor
from univitar_ds.training.checkpoint.offline import Weights, open_trained

KIND = "export"
"""Kind of the marker file in an exported folder. A folder without the file is not replaced."""


def export_encoder(source: str | Path, out: str | Path, weights: Weights | None = None) -> Path:
    """Writes the encoder of a run (or of one of its checkpoints) to the folder `out` and reads it back.

    `config.json` has the size rule of the run's last stage, so that `Preprocessor` prepares images as in
    that stage. The folder is replaced atomically: an export that fails leaves the previous content.

    Args: weights: see `open_trained`.
    Returns: `out`.
    Raises: CheckpointError if the source is not a run or is damaged, if `out` contains other files, or if the release
        cannot express the size rule; StorageError if `out` cannot be written.
    """
    out = Path(out)
    own = _is_run(out.parent) and out.name == EXPORT
    partial, earlier = (out.with_name(f".{out.name}.{word}") for word in ("partial", "earlier"))
    with writing(out):
        for folder in (out, partial, earlier):
            _refuse_foreign(folder, own)
    trained = open_trained(source, weights)
    encoder = trained.model.vision
    encoder.config = with_size_rule(encoder.config, trained.config.stages[-1])
    with writing(out):
        remove(partial, EXPORT_FILES)
        partial.mkdir(parents=True)
        try:
            mark(partial, KIND)
            save_encoder(partial, encoder)
            verify_export(partial, encoder)
            _put_in_place(partial, out, earlier)
        finally:
            with suppress(OSError):
                remove(partial, EXPORT_FILES)
    return out


def with_size_rule(config: EncoderConfig, stage: StageConfig) -> EncoderConfig:
    """Returns `config` with the size rule of a stage: the rule for images, or for videos if the stage has no images.

    The release has one rule for images and videos. Raises: CheckpointError if it cannot express the stage's rule.
    """
    rule = stage.video if stage.video_ratio == 1 else stage.image
    if rule.size_px is not None:
        return dataclasses.replace(config, resolution_mode=str(rule.size_px), relarge_ratio=1.0)
    block = PATCH * config.spatial_merge_size
    if rule.divisor_px % block:
        raise CheckpointError(
            f"stage {stage.name} has divisor_px {rule.divisor_px}, config.json can only hold multiples of {block} px; "
            "end the run with a stage that has one"
        )
    return dataclasses.replace(
        config,
        resolution_mode="native",
        relarge_ratio=1.0,
        resize_factor=rule.divisor_px // block,
        min_tokens=rule.min_tokens,
        max_tokens=rule.max_tokens,
    )


def verify_export(folder: Path, encoder: nn.Module) -> None:
    """Reads the folder with the public API and compares its output with the encoder's, bitwise.

    Raises: CheckpointError if they differ, which indicates a faulty disk.
    """
    read = UniViTAR.from_pretrained(folder)
    pixel_values, grid_thw = Preprocessor.from_pretrained(folder)([_test_image()])
    with torch.no_grad():
        same = torch.equal(read(pixel_values, grid_thw), encoder.eval()(pixel_values, grid_thw))
    if not same or read.config != encoder.config:
        raise CheckpointError(
            f"the encoder read back from {folder} is not the one that was written; check the disk and repeat"
        )


def _test_image() -> Image.Image:
    rows, columns = np.mgrid[0:113, 0:187]
    return Image.fromarray(np.stack([rows * 2, columns, (rows * columns) % 251], axis=-1).astype(np.uint8))


def _is_run(folder: Path) -> bool:
    return (folder / RUN_CONFIG).is_file() and (folder / CHECKPOINTS).is_dir()


def _refuse_foreign(out: Path, own: bool) -> None:
    """Raises: CheckpointError if `out` is not a folder that an export wrote.

    Args: own: whether `out` is the export in a run's folder, where exports of earlier versions without a marker file
        may be replaced.
    """
    if out.is_symlink():
        raise CheckpointError(f"{out} is a link, and nothing is replaced through a link; name the folder itself")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; name a folder for the export")
    if is_empty(out):
        return
    other = foreign(out, EXPORT_FILES)
    if other is not None:
        raise CheckpointError(f"{out} holds {other}, which no export wrote; name another folder or empty it")
    if not own and not is_marked(out, KIND):
        raise CheckpointError(
            f"{out} holds an encoder without the marker file of an export ({MARK}), so it may be another's; name "
            "another folder, or remove this one"
        )


def _put_in_place(partial: Path, out: Path, earlier: Path) -> None:
    """Renames `partial` to `out`. An earlier export is renamed to `earlier` first and removed at the end.

    The system cannot rename a folder over a folder that is not empty.
    """
    remove(earlier, EXPORT_FILES)
    if not is_empty(out):
        os.rename(out, earlier)
    move_into_place(partial, out)
    remove(earlier, EXPORT_FILES)
