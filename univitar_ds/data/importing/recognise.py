"""Recognises the form of a data set, and lists its samples."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from univitar_ds.data.importing import (
    class_folders,
    coco,
    from_plugins,
    imagefolder,
    img2dataset,
    own_folder,
    tables,
    tars,
)
from univitar_ds.data.importing.forms import Format
from univitar_ds.data.importing.own_folder import METADATA
from univitar_ds.data.importing.rows import Listing, ReadOptions, check_split
from univitar_ds.data.importing.table_files import EXTENSIONS
from univitar_ds.data.shards.manifest import MANIFEST, PROGRESS_FILE
from univitar_ds.data.storage.address import check_address
from univitar_ds.data.storage.base import S3
from univitar_ds.errors import DataError

_log = logging.getLogger(__name__)


_KEYS = frozenset(["image_key", "caption_keys", "label_key", "split_key"])
_OPTIONS = {
    "captions": "--captions lines",
    "image_key": "--image-key",
    "caption_keys": "--caption-key",
    "label_key": "--label-key",
    "split_key": "--split-key",
    "images": "--images",
    "class_names": "--class-names",
}


def _never(source: str) -> bool:
    return False


FORMATS: dict[str, Format] = {
    "img2dataset": Format("output of img2dataset", img2dataset.recognises, img2dataset.rows, frozenset(["captions"])),
    "folder": Format("a folder with captions", own_folder.recognises, own_folder.rows, frozenset(["captions"])),
    "coco": Format("COCO captions", coco.recognises, coco.rows, frozenset(["images"])),
    "table": Format("a table", tables.recognises, tables.rows, _KEYS | {"images"}),
    "imagefolder": Format("an imagefolder", imagefolder.recognises, imagefolder.rows, _KEYS),
    "classes": Format("class folders", class_folders.recognises, class_folders.rows, frozenset(["class_names"])),
    # After the others: a folder may have the archive from which it was extracted.
    "webdataset": Format("WebDataset tars", tars.recognises, tars.rows, frozenset(["captions"])),
    # Nearly last: tables may lie beside the files or tars that they describe.
    "tables": Format("a folder of Parquet tables", tables.recognises_parts, tables.rows_of_parts, _KEYS | {"images"}),
    "folder_table": Format("a folder with a table", tables.recognises_one, tables.rows_of_one, _KEYS | {"images"}),
    **{
        form: Format(f"a table ({form})", _never, partial(tables.rows, form=form), _KEYS | {"images"})
        for form in ("csv", "tsv", "jsonl", "json", "parquet")
    },
}
"""All formats, in the order in which they are tried. `folder` precedes formats of other files, so that a folder with
captions in .txt files keeps this format. `img2dataset` precedes it, because its output may have .txt files too."""


def known_formats() -> dict[str, Format]:
    """Returns the formats that plugins register, then `FORMATS`.

    Raises: PluginError if a plugin's reader has the name of one of `FORMATS`.
    """
    return {**from_plugins.formats(FORMATS), **FORMATS}


def format_of(source: str) -> str | None:
    """Returns the name of the format of a source, None if it is not recognised. Plugins come first.

    Raises: DataError for a folder that `data pack` has written.
    """
    own = next((name for name, form in from_plugins.formats(FORMATS).items() if form.recognises(source)), None)
    if own is not None:
        return own
    if os.path.isdir(source) and {MANIFEST, PROGRESS_FILE} & set(os.listdir(source)):
        raise DataError(f"{source} is packed already; a run reads it as it is, so give it as a source")
    if os.path.isfile(os.path.join(source, METADATA)):
        return "imagefolder" if imagefolder.recognises(source) else "folder"
    return next((name for name, form in FORMATS.items() if form.recognises(source)), None)


def read_source(source: str | Path, options: ReadOptions, copy_of: str | None = None) -> Listing:
    """Returns the samples of a data set in any of `FORMATS`, without opening media files.

    Args: copy_of: the source of which `source` is a copy, for the log.
    Raises: DataError if the source is missing, is not recognised or has nothing to pack, or for an option that its
        format does not use.
    """
    source = str(source)
    if not from_plugins.reads(source):
        check_address(source)
    if source.startswith(S3):
        raise DataError(
            f"{source}: only tars and packed folders are read from s3:// as they are; pack the source first "
            f"(univitar-ds data pack {source} OUT), and give OUT instead"
        )
    check_split(options.split)
    name = options.format or format_of(source)
    if name is None:
        return own_folder.rows(source, _checked(source, "folder", options))  # raises an error that says what is missing
    options = _checked(source, name, options)
    if options.format is None and name != "folder":
        _log.info("%s is read as %s (--format %s)", copy_of or source, known_formats()[name].title, name)
    return known_formats()[name].rows(source, options)


def files_named(source: str, options: ReadOptions) -> set[str]:
    """Returns the paths of files that the rows of a table name; none if a source is no table.

    Raises: DataError for a JSON of COCO, which does not say where its images are, or a table that cannot be read.
    """
    if options.format in (None, "coco") and coco.recognises(source):
        raise DataError(f"{source}: is a JSON of COCO, whose images are elsewhere; give the folder that holds both")
    form = None if options.format == "table" else options.format
    if form in (None, *EXTENSIONS.values()):
        return tables.files_named(source, options, form)
    return set()


def _checked(source: str, name: str, options: ReadOptions) -> ReadOptions:
    forms = known_formats()
    if name not in forms:
        raise DataError(f"--format {name}: there is no such format; give one of {', '.join(forms)}")
    defaults = ReadOptions()
    unused = [
        given
        for option, given in _OPTIONS.items()
        if getattr(options, option) != getattr(defaults, option) and option not in forms[name].uses
    ]
    if unused:
        raise DataError(
            f"{source} is read as {forms[name].title}, which does not use {', '.join(unused)}; leave it out, or "
            "give another --format"
        )
    return options
