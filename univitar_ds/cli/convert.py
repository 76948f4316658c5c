"""The command `univitar-ds convert`."""

from __future__ import annotations

import argparse
import re

from univitar_ds.cli.common import add_command, add_weights, expand, expand_place
from univitar_ds.errors import ConfigError
from univitar_ds.screen import show

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
DESCRIPTION = """Convert a model to another format. The format of SRC is detected from its files.

SRC: a local folder, an s3:// address, or the name of a model on the Hugging Face hub (owner/name). It may be a
run's folder or one of its checkpoints.
DST: a new folder, which appears only when it is complete. An earlier result is replaced only with --force.

formats of DST
  hf         transformers: AutoModel.from_pretrained(DST, trust_remote_code=True), pipelines
  release    the encoder as published: config.json, model.safetensors
  universal  DeepSpeed's universal checkpoint in float32, with the optimizer state of a run. For any other SRC the
             moments are zeros. It has about three times the size of the weights
  megatron   Megatron-Core's dist_checkpointing, to be read as tensor-parallel slices
  dcp        torch.distributed.checkpoint, a file for each tensor and moment
  program    torch.export, for any number of tokens and items
  onnx       ONNX, for the grids of tokens given by --grid
SRC may also be DeepSpeed's own checkpoint of ZeRO stage 1, 2 or 3.

  univitar-ds convert runs/photos photos_hf --to hf
  univitar-ds convert runs/photos/checkpoints/step-00000200 early --to release --weights trained
  univitar-ds convert export runs/photos OUT           the encoder, as with --to release --part encoder"""


def add_convert(commands) -> None:
    """Adds the command `convert` to `commands`."""
    parser = add_command(commands, "convert", _convert, "convert weights to another format", DESCRIPTION)
    parser.usage = (
        "univitar-ds convert SRC DST --to FORMAT [options]\n"
        "       univitar-ds convert export RUN OUT [--weights trained|averaged]"
    )
    parser.add_argument(
        "places", nargs="+", type=expand_place, metavar="SRC DST", help="the model, and the folder to write"
    )
    parser.add_argument("--to", metavar="FORMAT", help="hf, release, universal, megatron, dcp, program or onnx")
    parser.add_argument(
        "--part", choices=("model", "encoder"), help="part to convert (default: everything in SRC that FORMAT can hold)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (default: as stored; onnx: float32)"
    )
    parser.add_argument(
        "--shard-size", type=_size, metavar="SIZE", help="maximum size of a file, such as 5GB (default: one file)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the result and compare its output with that of SRC for one pack; exit status 2 if they differ",
    )
    parser.add_argument("--force", action="store_true", help="replace the result of an earlier conversion")
    parser.add_argument("--license", default="unknown", help="licence in the model card, such as apache-2.0")
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="verify the result and upload it to the Hugging Face hub, to a private repository if it is new; needs "
        "`hf auth login` or HF_TOKEN",
    )
    parser.add_argument(
        "--config-from",
        type=expand,
        metavar="FOLDER",
        help="a run or export of the same model, if SRC has tensors and no configuration (DeepSpeed, dcp)",
    )
    parser.add_argument(
        "--grid",
        type=_grid,
        action="append",
        default=[],
        metavar="T,H,W",
        help="for onnx: tokens of an item along time, height and width; repeat it for each item of a pack",
    )
    add_weights(parser)


def _convert(arguments: argparse.Namespace) -> None:
    from univitar_ds.convert.conversion import DTYPES, Options, convert
    from univitar_ds.convert.export import export_run

    places = arguments.places
    if len(places) == 3 and places[0] == "export":
        export_run(places[1], places[2], arguments.weights, whole=False)
        show(f"encoder in {places[2]}")
        return
    if len(places) != 2:
        raise ConfigError(f"convert takes SRC and DST, got {len(places)} names: {' '.join(places)}")
    if arguments.to is None:
        raise ConfigError("convert needs --to FORMAT, such as --to hf; `univitar-ds convert --help` lists the formats")
    options = Options(
        arguments.part,
        DTYPES[arguments.dtype] if arguments.dtype else None,
        arguments.shard_size,
        tuple(arguments.grid),
        arguments.force,
        arguments.verify,
        arguments.license,
        arguments.push,
    )
    show(convert(places[0], places[1], arguments.to, options, arguments.weights, arguments.config_from))


def _grid(text: str) -> tuple[int, int, int]:
    """Parses a grid of tokens T,H,W, for argparse. Raises: ArgumentTypeError."""
    parts = re.fullmatch(r"(\d+),(\d+),(\d+)", text)
    if parts is None or 0 in (grid := (int(parts[1]), int(parts[2]), int(parts[3]))):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a grid; give tokens along time, height and width, each at least 1, as 1,16,16"
        )
    return grid


def _size(text: str) -> int:
    """Parses a size in bytes, such as 5GB or 500MB, for argparse. Raises: ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip(), re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    unit = unit if unit in _UNITS or unit == "?" else {"K": "KB", "M": "MB", "G": "GB", "B": ""}[unit]
    size = int(float(match[1]) * _UNITS[unit]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give a number with KB, MB or GB, such as 5GB")
    return size
