"""The commands `univitar-ds embed` and `univitar-ds classify`."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from univitar_ds import startup
from univitar_ds.cli.common import add_command, add_storage, add_weights, expand, expand_place, positive, shown
from univitar_ds.screen import show

if TYPE_CHECKING:
    from univitar_ds.inference.classify import Classified
    from univitar_ds.inference.embed_files import ModelOptions

_MODEL = "a run's folder, an export, a folder in any format of convert, s3://..., or owner/name on the Hugging Face hub"
EMBED = """Write the embeddings of images and videos to files.

SOURCE: an image or video; a folder, with the folders in it; or shards: a tar, a brace range of tars
(train-{000..127}.tar), a packed folder. Each may be on s3://.

A row is the joint embedding of an item, a unit vector; if MODEL is only an encoder, it is the mean of the tokens. With
--tokens it is all tokens of the last block. Items are resized by the model's native-resolution rule (its config.json).
A video is read as --frames evenly spaced frames; by default as in the configuration of the run MODEL, else as 8 frames.
Files are decoded in separate processes; a damaged or hostile file is left out and listed.

--out features.safetensors writes
  features-00000.safetensors, ...      parts of at most 100,000 rows (1,000 with --tokens): embedding or mean
                                       (N, width), or tokens (T, width), offsets (N + 1,) and grid_thw (N, 3)
  features.safetensors.index.json      columns key, part and row
  features.safetensors.bad.jsonl       the files that were left out and the reasons; only if there are any
--out features.parquet writes parts with the column key and either embedding, mean, or tokens and grid_thw
(pip install 'univitar_ds[parquet]').

After an interruption the same command continues with the first unfinished part. It may use another number of
processes: the features are the same.

  univitar-ds embed runs/photos ~/photos --out photos.safetensors
  univitar-ds embed runs/photos s3://bucket/photos --out photos.safetensors
  univitar-ds embed export/model data/photos --tokens --out tokens.safetensors --nproc 4"""
CLASSIFY = """Name the most probable classes of images and videos.

FILE: an image or video, or a folder, with the folders in it.

With --labels, the embedding of a class is the mean over its templates, as in zero_shot() of the Python interface; the
probabilities of all labels sum to 1. Without --labels, MODEL must be a run of objective.kind classification: its
trained head predicts the classes of the training data (classes.json), separately for each data set.

A damaged file gets a row with the reason, and the exit status is then 1. With --json, one line per file: file, ok, and
classes (label, probability, and set if the data set has a name), or error and message.

  univitar-ds classify runs/photos *.jpg --labels cat,dog,horse --top 2
  univitar-ds classify runs/labels *.jpg --top 5"""


def add_inference(commands) -> None:
    """Adds the commands `embed` and `classify` to `commands`."""
    embed = add_command(
        commands, "embed", _embed, "write the embeddings of images and videos to files", EMBED, announced=True
    )
    embed.add_argument("model", type=expand_place, metavar="MODEL", help=_MODEL)
    embed.add_argument(
        "sources", nargs="+", type=expand_place, metavar="SOURCE", help="files, folders or shards; also s3://"
    )
    embed.add_argument("--out", type=expand, required=True, metavar="FILE", help="name.safetensors or name.parquet")
    embed.add_argument("--tokens", action="store_true", help="write all tokens instead of one vector per item")
    embed.add_argument("--split", help="split of packed folders (default: all)")
    embed.add_argument("--part-rows", type=positive, metavar="N", help="maximum rows of a part")
    embed.add_argument("--nproc", type=positive, help="processes; default: one per GPU, one on the CPU")
    add_reading(embed)
    add_storage(embed)
    classify = add_command(
        commands,
        "classify",
        _classify,
        "name the most probable classes of files",
        CLASSIFY,
        leaves_files=False,
        announced=True,
    )
    classify.add_argument("model", type=expand_place, metavar="MODEL", help=_MODEL)
    classify.add_argument("files", nargs="+", type=expand_place, metavar="FILE", help="files or folders")
    classify.add_argument(
        "--labels",
        metavar="A,B,C",
        help="names of the classes; leave it out for a run of objective.kind classification",
    )
    classify.add_argument(
        "--templates",
        type=expand,
        metavar="TEXTFILE",
        help="a sentence per line, with {} for the label (default: a photo of a {}.)",
    )
    classify.add_argument(
        "--top", type=positive, default=1, metavar="K", help="classes per file and data set (default 1)"
    )
    classify.add_argument("--json", action="store_true", help="print one line of JSON per file")
    add_reading(classify)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds the options for opening a model and reading items."""
    parser.add_argument(
        "--frames", type=positive, metavar="N", help="evenly spaced frames of a video (default: as in the run, else 8)"
    )
    parser.add_argument(
        "--token-budget", type=positive, default=16384, metavar="N", help="maximum tokens of a pack (default 16384)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the weights (default: bfloat16 on a GPU, else as stored)",
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="decoding processes of each process that runs MODEL"
    )
    add_weights(parser)


def model_options(arguments: argparse.Namespace) -> ModelOptions:
    """Returns the options of `add_reading` and `add_storage` as `ModelOptions`."""
    import torch

    from univitar_ds.config.data import S3Config
    from univitar_ds.inference.embed_files import ModelOptions

    names = {"endpoint_url": "s3_endpoint", "profile": "s3_profile", "region": "s3_region"}
    s3 = {name: value for name, option in names.items() if (value := getattr(arguments, option, None)) is not None}
    return ModelOptions(
        weights=arguments.weights,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        token_budget=arguments.token_budget,
        frames=arguments.frames,
        nproc=getattr(arguments, "nproc", 1),
        workers=arguments.workers,
        s3=S3Config(**s3),
    )


def _embed(arguments: argparse.Namespace) -> int:
    from univitar_ds.inference.embed_files import EmbedOptions, embed_files

    options = EmbedOptions(arguments.tokens, arguments.part_rows, arguments.split)
    rows, sentence = embed_files(arguments.model, arguments.sources, arguments.out, options, model_options(arguments))
    show(shown(sentence))
    return 0 if rows else 1


def _classify(arguments: argparse.Namespace) -> int:
    from univitar_ds.inference.classify import Classifier, listed

    labels = None if arguments.labels is None else [label.strip() for label in arguments.labels.split(",")]
    templates = None if arguments.templates is None else _templates(arguments.templates)
    width = max(map(len, map(shown, listed(arguments.files))))
    classifier = Classifier(arguments.model, labels, templates, model_options(arguments))
    faults, several = 0, len(classifier.sets) > 1
    startup.phase("reading the files")
    for one in classifier.classify(arguments.files, arguments.top):
        startup.done()
        faults += one.fault is not None
        show(json.dumps(one.to_json()) if arguments.json else _row(one, width, several))
    return 1 if faults else 0


def _row(one: Classified, width: int, several: bool) -> str:
    """Returns the line of a file. Args: several: whether the model has classes of several data sets."""
    if one.fault is not None:
        found = f"{one.fault.kind}: {one.fault.message.removeprefix(f'{one.file}: ')}"
    else:
        sets = groupby(one.classes, key=lambda guess: guess.set)
        parts = [(name, "  ".join(f"{one.probability:6.1%} {one.label}" for one in guesses)) for name, guesses in sets]
        found = "  ".join(f"[{name or 'unnamed set'}] {text}" if several else text for name, text in parts)
    return f"{shown(one.file):<{width}}  {shown(found)}"


def _templates(path: Path) -> list[str]:
    """Returns the lines of a file that are not blank. Raises: ConfigError if there are none or it cannot be read."""
    from univitar_ds.tasks.templates import template_text

    return [line.strip() for line in template_text(path).splitlines() if line.strip()]
