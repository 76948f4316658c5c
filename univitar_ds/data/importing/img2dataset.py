"""Lists what img2dataset has downloaded: tars, or folders of files with a .txt and a .json for each image.

Its statistics (`00000_stats.json`) and tables (`00000.parquet`) beside them are not needed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from univitar_ds.data.importing import own_folder, tars
from univitar_ds.data.importing.rows import Collected, Fault, Listing, ReadOptions, Row, is_media
from univitar_ds.data.importing.sidecars import read_sidecars
from univitar_ds.data.shards.captions import BYTES_LIMIT, Texts, read_texts
from univitar_ds.data.storage.local import read_file
from univitar_ds.errors import DataError, SampleError

_STATS = re.compile(r"\d+_stats\.json")


def recognises(source: str) -> bool:
    """Whether a source is a folder with img2dataset's statistics."""
    return os.path.isdir(source) and any(map(_STATS.fullmatch, os.listdir(source)))


def rows(source: str, options: ReadOptions) -> Listing:
    """Returns a row for each image, with the texts in its .txt or else in its .json. Images without a text are left
    out.

    Raises: DataError if there is no image with a text, or the output has another form.
    """
    if tars.recognises(source) and not own_folder.recognises(source):
        return tars.rows(source, options)
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the output folder of img2dataset")
    sidecars = read_sidecars(folder, lines=options.captions == "lines")
    collected = Collected(folder)
    for file, captions in sidecars.captions.items():
        collected.add(Row(file, None, captions, None, options.default_split), file)
    for file, reason in sidecars.left_out.items():
        try:
            texts = _texts(folder / file)
            if texts is None:
                collected.left_out[file] = reason
                continue
            collected.add(Row(file, None, texts.captions, texts.label, options.default_split, texts.set), file)
        except SampleError as error:
            collected.left_out[file] = f"{error.kind}: {error}"
        except Fault as fault:
            collected.left_out[file] = str(fault)
    if not sidecars.captions and not sidecars.left_out:
        raise DataError(
            f"{folder} has no image that is a file; if they are inside its .parquet or .tfrecord, download with "
            "--output_format webdataset or files"
        )
    return collected.listing(folder)


def _texts(file: Path) -> Texts | None:
    """Returns the texts in the .json of a file; None if there is a .txt or no .json. Raises: SampleError."""
    path = file.with_suffix(".json")
    if file.with_suffix(".txt").exists() or not is_media(file.name) or not path.exists():
        return None
    return read_texts({"json": read_file(path, BYTES_LIMIT, f" (limit {BYTES_LIMIT})")})
