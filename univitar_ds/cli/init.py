"""The command `univitar-ds init`."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from univitar_ds.cli.common import add_command, add_storage, add_table, expand_place
from univitar_ds.errors import DataError
from univitar_ds.screen import show

if TYPE_CHECKING:
    from univitar_ds.config.data import TableConfig

_log = logging.getLogger(__name__)
_SURVEY_GIVES_UP_S = 30.0
"""Seconds after which the command fails if a store does not answer. A run waits longer."""
_DESCRIPTION = """Inspect data and this machine, and print a run file with comments that trains on them.

A SOURCE is what data.sources.N.path of a run file may be: a packed folder, tars (also at s3://), or a folder or table
that `data pack` reads. Files are listed, and the headers of some are read. Each chosen number in the run file has a
comment with its reason.

  univitar-ds init photos > run.yaml
  univitar-ds init pairs.csv --image-key filepath --caption-key title > run.yaml
  univitar-ds train --config run.yaml --nproc 2"""


def add_init(commands) -> None:
    """Adds the command `init` to `commands`."""
    summary = "write a run file that fits your data and this machine"
    parser = add_command(commands, "init", _init, summary, _DESCRIPTION, leaves_files=False)
    parser.add_argument(
        "sources",
        nargs="+",
        type=expand_place,
        metavar="SOURCE",
        help="folder, table, JSON of COCO, or tars; also s3://",
    )
    parser.add_argument(
        "--size",
        choices=("tiny", "0.3b", "0.6b", "1b"),
        help="size of the encoder (default: by the data and the machine)",
    )
    parser.add_argument(
        "--gpus", type=_count, metavar="N", help="number of GPUs of the run, 0 for the CPU (default: of this machine)"
    )
    parser.add_argument(
        "--hours",
        type=_hours,
        metavar="H",
        help="maximum length of the run (default: by the size of the data; on a CPU at most an hour)",
    )
    add_table(parser)
    add_storage(parser)


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 4096:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 4096")
    return value


def _hours(text: str) -> float:
    value = float(text)
    if not 0 < value <= 100_000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100,000 hours")
    return value


def _table(arguments: argparse.Namespace) -> TableConfig | None:
    """Returns the columns and the folder that were given; None if there are none."""
    from univitar_ds.config.data import TableConfig
    from univitar_ds.config.paths import written

    given = {
        "image_key": arguments.image_key,
        "caption_keys": arguments.caption_key,
        "label_key": arguments.label_key,
        "split_key": arguments.split_key,
        "images": arguments.images and written(str(arguments.images)),
    }
    given = {key: value for key, value in given.items() if value}
    return TableConfig(**given) if given else None


def _init(arguments: argparse.Namespace) -> None:
    from univitar_ds.data.storage.base import StorageSettings
    from univitar_ds.data.tools.survey import survey
    from univitar_ds.drafting.draft import draft, has_one_pair, is_measured, processes
    from univitar_ds.drafting.machine import measured_core_flops, this_machine

    twice = next((source for source in arguments.sources if arguments.sources.count(source) > 1), None)
    if twice is not None:
        raise DataError(f"{twice} is given twice; give each source once")
    keys = {"endpoint_url": arguments.s3_endpoint, "profile": arguments.s3_profile, "region": arguments.s3_region}
    s3 = {key: value for key, value in keys.items() if value is not None}
    settings = StorageSettings(**s3, give_up_s=_SURVEY_GIVES_UP_S)
    table = _table(arguments)
    surveys = [survey(source, settings, table) for source in arguments.sources]
    machine = this_machine().with_gpus(arguments.gpus)
    if not machine.gpus:
        machine = replace(machine, core_flops=measured_core_flops())
    text = draft(surveys, machine, size=arguments.size, hours=arguments.hours, s3=s3)
    show(text.removesuffix("\n"))
    if not is_measured(text):
        _log.warning("no split of held-out data was found, so the run will not be measured; the file says what to do")
    if has_one_pair(text):
        _log.warning("a step would have one pair, and the contrastive loss of one pair is 0: add samples")
    _log.info("saved as run.yaml, the run starts with: univitar-ds train --config run.yaml --nproc %d", processes(text))
