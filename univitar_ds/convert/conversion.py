"""Converts a model from any format to any other, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from univitar_ds.convert import program, publish
from univitar_ds.convert.card import UNKNOWN_LICENCE, size_name, write_card
from univitar_ds.convert.comparison import compare
from univitar_ds.convert.destination import check_space, new_folder
from univitar_ds.convert.program_check import compare_program
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.recognise import module_of, open_stored
from univitar_ds.formats.run import Weights
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.model.from_stored import check_complete

WRITTEN = ("release", "hf", "universal", "dcp", "megatron")
"""Names of the formats that can be written and read."""
PROGRAMS = ("program", "onnx")
"""Names of the formats that can only be written: programs that run without this package."""
Part = Literal["model", "encoder"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHARDED = ("release", "hf")
"""Formats whose weights may be split into files of `shard_bytes`."""
_SLACK_BYTES = 64 << 20
"""Space for files beside the tensors."""


@dataclass(frozen=True)
class Options:
    """How a model is written.

    `part`: None: the whole model if the source has one and the format can hold it. `dtype`: None: that of the source.
    `shard_bytes`: maximum size of a file of weights; None: one file. `licence`: an identifier of the hub, for the model
    card. `grids`: tokens along time, height and width of each item of an ONNX file. `push`: name of a repository on the
    hub (owner/name) to which the files are uploaded, after they are verified if the format can be read.
    """

    part: Part | None = None
    dtype: torch.dtype | None = None
    shard_bytes: int | None = None
    grids: tuple[tuple[int, int, int], ...] = ()
    replace: bool = False
    verify: bool = False
    licence: str = UNKNOWN_LICENCE
    push: str | None = None


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    options: Options | None = None,
    weights: Weights | None = None,
    config_folder: Path | None = None,
) -> str:
    """Converts the model `source` to the format `to` in the folder `out`, which is replaced atomically.

    Args: source, weights, config_folder: see `open_stored`; to: a name in WRITTEN or PROGRAMS.
    Returns: a sentence about what was written.
    Raises: CheckpointError if the source is missing or damaged, or `out` may not be replaced; StorageError if there is
        too little space or `out` cannot be written, or the upload fails.
    """
    options, out = options or Options(), Path(out)
    _check_format(to, options)
    if options.push is not None:
        publish.check_name(options.push)
    model = open_stored(source, weights, config_folder)
    _refuse_overlap(Path(source), model, out)
    model = _part(model, to, options.part)
    check_complete(model)
    dtype = torch.float32 if to == "onnx" else options.dtype
    if dtype is not None:
        model = model.converted(dtype)
    check_space(out, _needed_bytes(model, to) + _SLACK_BYTES)
    verify = options.verify or (options.push is not None and to in WRITTEN)
    with new_folder(out, replace=options.replace) as folder:
        write(model, folder, to, options)
        write_card(model, folder, to, options.licence, options.grids)
        compared = _compared(model, folder, to, options) if verify else None
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    kind = "encoder" if model.joint is None else "model"
    sentence = f"{kind} {size_name(model)}, {len(model.tensors)} tensors, in {out} ({to}, {size / 1e6:.1f} MB)"
    if to == "universal" and model.optimizer is None:
        sentence += "; the optimizer's moments in it are zeros, since the source has none"
    sentences = [sentence] if compared is None else [sentence, compared]
    if options.push is not None:
        sentences.append(publish.push(out, options.push, weights_only_from_here=to in _SHARDED))
    return "\n".join(sentences)


def write(model: StoredModel, folder: Path, to: str, options: Options | None = None) -> None:
    """Writes a model to the empty folder `folder`. Raises: CheckpointError if the format cannot hold the model."""
    options = options or Options()
    if to == "program":
        program.export_program(model, folder)
    elif to == "onnx":
        program.export_onnx(model, folder, options.grids)
    else:
        arguments = {"shard_bytes": options.shard_bytes} if to in _SHARDED else {}
        module_of(to).write(model, folder, **arguments)


def _check_format(to: str, options: Options) -> None:
    if to not in (*WRITTEN, *PROGRAMS):
        raise CheckpointError(
            f"{to!r} is no format that can be written; choose one of {', '.join((*WRITTEN, *PROGRAMS))}"
        )
    if options.shard_bytes is not None and to not in _SHARDED:
        raise CheckpointError(f"--shard-size is for {' and '.join(_SHARDED)}, not for {to}; leave it out")
    if (to == "onnx") != bool(options.grids):
        raise CheckpointError(
            "--grid T,H,W, such as --grid 1,16,16, is required for an ONNX file and only for it; add it or leave it out"
        )
    if to == "onnx" and options.dtype not in (None, torch.float32):
        raise CheckpointError(
            f"--dtype {str(options.dtype).removeprefix('torch.')}: an ONNX file has float32 weights; leave --dtype out"
        )


def _compared(model: StoredModel, folder: Path, to: str, options: Options) -> str:
    """Returns a sentence about the outputs of the source and the result. Raises: CheckpointError if they differ."""
    if to in PROGRAMS:
        return compare_program(model, folder, options.grids)
    return compare(model, open_stored(folder))


def _part(model: StoredModel, to: str, part: Part | None) -> StoredModel:
    if part == "model" and model.joint is None:
        raise CheckpointError(f"{model.path} holds an encoder alone; leave --part model out")
    if part == "encoder" or (part is None and to == "release"):
        return model.encoder_only()
    return model


def _needed_bytes(model: StoredModel, to: str) -> int:
    """Returns the size of all tensors that the format `to` gets."""
    if to == "universal":
        return 3 * sum(info.nbytes // info.dtype.itemsize * 4 for info in model.tensors.infos.values())
    moments = (model.optimizer.exp_avg.nbytes, model.optimizer.exp_avg_sq.nbytes) if model.optimizer else ()
    return model.tensors.nbytes + (0 if to in (*_SHARDED, *PROGRAMS) else sum(moments))


def _refuse_overlap(source: Path, model: StoredModel, out: Path) -> None:
    """Checks that the result neither replaces its source nor is in it. Raises: CheckpointError.

    A result may be in the folder of a run, but not among its checkpoints."""
    there = out.resolve()
    for place in (source, model.path):
        one = place.resolve()
        if there == one or there in one.parents:
            raise CheckpointError(f"{out} is the source or a folder above it; name another folder for the result")
    inner = model.path.parent if model.format == "run" else source
    if inner.resolve() in there.parents:
        raise CheckpointError(f"{out} is inside of {inner}, which is not changed; name another folder for the result")
