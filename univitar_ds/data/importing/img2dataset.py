"""Lists what img2dataset has downloaded: tars, or folders of files with a .txt and a .json for each image.

Its statistics (`00000_stats.json`) and tables (`00000.parquet`) beside them are not needed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from univitar_ds.data.importing import tars
from univitar_ds.data.importing.folders import folders_of
from univitar_ds.data.importing.rows import Collected, Fault, Listing, ReadOptions, Row, is_media
from univitar_ds.data.shards.captions import BYTES_LIMIT, EXTENSIONS, read_texts
from univitar_ds.data.storage.local import read_file
from univitar_ds.errors import DataError, SampleError

_STATS = re.compile(r"\d+_stats\.json")


def recognises(source: str) -> bool:
    """Whether a source is a folder with img2dataset's statistics."""
    return os.path.isdir(source) and any(map(_STATS.fullmatch, os.listdir(source)))


def rows(source: str, options: ReadOptions) -> Listing:
    """Returns a row for each image. Images without a text are left out.

    Raises: DataError if there is none, or the output has another form.
    """
    if tars.recognises(source):
        return tars.rows(source, options)
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the output folder of img2dataset")
    collected = Collected(folder)
    for parent, names in folders_of(folder, collected.left_out):
        there = set(names)
        for name in filter(is_media, names):
            file = Path(parent, name)
            key = file.relative_to(folder).as_posix()
            try:
                texts = [
                    (extension, file.with_suffix(f".{extension}"))
                    for extension in EXTENSIONS
                    if f"{file.stem}.{extension}" in there
                ]
                said = read_texts(
                    {extension: read_file(path, BYTES_LIMIT, f" (limit {BYTES_LIMIT})") for extension, path in texts},
                    lines=options.captions == "lines",
                )
                collected.add(Row(key, None, said.captions, said.label, options.default_split, said.set), key)
            except SampleError as error:
                collected.left_out[key] = f"{error.kind}: {error}"
            except Fault as fault:
                collected.left_out[key] = str(fault)
    if not collected.left_out and any(name.endswith((".parquet", ".tfrecord")) for name in os.listdir(folder)):
        try:
            return collected.listing(folder)
        except DataError as error:
            remedy = "download with --output_format webdataset or files"
            raise DataError(f"{error}: its images are inside tables or records; {remedy}") from None
    return collected.listing(folder)
