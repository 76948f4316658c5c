"""Lists the samples of WebDataset tars: a tar, a folder of tars or a brace range, also those that img2dataset writes.

Rows name the bytes of a media file in its tar; nothing is extracted. Captions and labels are read as by the loader:
from `.json`, `.txt` and `.cls`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.paths import written
from univitar_ds.data.importing.rows import Collected, Fault, Listing, Part, ReadOptions, Row
from univitar_ds.data.importing.sidecars import warn_of_lines
from univitar_ds.data.shards.captions import BYTES_LIMIT, EXTENSIONS, Texts, read_texts
from univitar_ds.data.shards.listing import COMPRESSED, Shard, list_shards
from univitar_ds.data.shards.manifest import MANIFEST
from univitar_ds.data.shards.samples import media_member, modality_of
from univitar_ds.data.shards.tar_index import Damage, Group, scan
from univitar_ds.errors import DataError, SampleError


def recognises(source: str) -> bool:
    """Whether a source is a tar, a brace range of tars, or a folder with a tar."""
    if source.endswith((".tar", *COMPRESSED)):
        return not os.path.isdir(source)
    return os.path.isdir(source) and any(name.endswith((".tar", *COMPRESSED)) for name in os.listdir(source))


def rows(source: str, options: ReadOptions) -> Listing:
    """Returns a row for each sample. Samples without media or texts, and damaged parts of a tar, are left out.

    Raises: DataError if a tar is missing or cannot be read, or if there is no sample to pack.
    """
    if os.path.exists(os.path.join(source, MANIFEST)):
        raise DataError(f"{source} is packed already; a run reads it as it is, so give it as a source")
    shards = list_shards(SourceConfig(path=written(source), captions=options.captions), "")
    if not shards:
        raise DataError(f"{source} holds no tar (*.tar); name the folder of the tars, or a range {{000..127}}.tar")
    collected = Collected(Path(source) if os.path.isdir(source) else Path(source).parent)
    several = total = 0
    for shard in shards:
        with shard.storage.open(shard.path) as stream:
            for found in scan(stream, shard.name, shard.size):
                if isinstance(found, Damage):
                    collected.left_out[f"{shard.name}.tar, byte {found.offset}"] = f"{found.kind}: {found.message}"
                    continue
                texts = _add(collected, stream, shard, found, options)
                if texts is not None:
                    total, several = total + 1, several + texts.several_lines
    warn_of_lines(source, several, total)
    return collected.listing(source)


def _add(collected: Collected, stream: BinaryIO, shard: Shard, group: Group, options: ReadOptions) -> Texts | None:
    """Adds the row of a sample. Returns its texts; None if it is left out."""
    name = f"{shard.name}.tar/{group.key}"
    try:
        members = group.members
        if len({member.extension for member in members}) < len(members):
            raise Fault("duplicate: two members have the same name")
        if any(member.link for member in members):
            raise Fault("link: a link has no content in a tar; write it with tar --dereference --hard-dereference")
        modality = modality_of(group)
        media = None if modality is None else media_member(group, modality)
        if media is None:
            extensions = ", ".join(member.extension or "one without an extension" for member in members)
            raise Fault(f"no_media: no image or video among its members ({extensions[:200]})")
        contents, large = {}, ""
        for member in members:
            if member.extension in EXTENSIONS:
                if member.length > BYTES_LIMIT:
                    large = f"its .{member.extension} has {member.length} bytes (limit {BYTES_LIMIT}); shorten it"
                    continue
                stream.seek(member.offset)
                contents[member.extension] = stream.read(member.length)
        texts = read_texts(contents, lines=options.captions == "lines", required=not large)
        if large and not texts.captions and not texts.label:
            raise SampleError("too_large", large)
        part = Part(os.path.abspath(shard.path), media.offset, media.length)
        file = f"{name}.{media.extension}"
        if "\0" in file:
            raise Fault("the name of a member has a zero byte")
        collected.add(Row(file, None, texts.captions, texts.label, options.default_split, texts.set, part), name)
    except (SampleError, Fault) as error:
        kind = f"{error.kind}: " if isinstance(error, SampleError) else ""
        free = f"{name}, byte {group.offset}" if name in collected.left_out else name  # keys may occur several times
        collected.left_out[free] = f"{kind}{error}"
        return None
    return texts
