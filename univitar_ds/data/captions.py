"""The text members of a sample: captions, label and set, from .json, .txt and .cls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from univitar_ds.errors import SampleError

EXTENSIONS = ("json", "txt", "cls")
BYTES_LIMIT = 1 << 20
"""Longest text member that is parsed. The texts of a pool of samples lie in the trainer's memory."""


class Texts(NamedTuple):
    """Captions, none empty, and at least one unless there is a label; the label where there is one; the data set that
    the label belongs to; the CRC-32 of the media member, where its packer wrote one."""

    captions: tuple[str, ...]
    label: str | None
    set: str | None = None
    crc32: int | None = None


def read_texts(members: Mapping[str, bytes]) -> Texts:
    """Captions and label: the fields captions (a list), caption, label and set of .json first, else .txt and .cls.

    Args: contents of the text members by extension.
    Raises: SampleError if there is neither a caption nor a label, or one that is not text.
    """
    for extension, content in members.items():
        if len(content) > BYTES_LIMIT:
            raise SampleError("too_large", f"its .{extension} has {len(content)} bytes (limit {BYTES_LIMIT})")
    fields = _json_object(members["json"]) if "json" in members else {}
    captions = _captions(fields, members.get("txt"))
    label = _label(fields, members.get("cls"))
    if not captions and not label:
        raise SampleError("no_caption", "neither captions nor caption in its .json nor a .txt member, and no label")
    return Texts(captions, label, _set(fields), _crc32(fields))


def captions_of(captions: tuple[str, ...], label: str | None, templates: Sequence[str]) -> tuple[str, ...]:
    """What may be said of a sample: its captions or, where it has a label only, its source's templates of it.

    Raises: SampleError if there is neither.
    """
    if captions:
        return captions
    if not label or not templates:
        raise SampleError("no_caption", f"only a label ({label!r}), and its source has no templates to put it in")
    return tuple(template.replace("{}", label) for template in templates)


def _captions(fields: Mapping[str, Any], txt: bytes | None) -> tuple[str, ...]:
    captions = fields.get("captions")
    if captions is None and fields.get("caption") is not None:
        captions = [fields["caption"]]
    if captions is None and txt is not None:
        captions = [_utf8(txt, "txt")]
    if captions is None:
        return ()
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list):
        raise SampleError("bad_caption", f"captions is {str(captions)[:60]!r}, not a list of texts")
    for caption in captions:
        if not isinstance(caption, str):
            raise SampleError("bad_caption", f"a caption is {str(caption)[:60]!r} ({type(caption).__name__}), not text")
        if not caption.strip():
            raise SampleError("bad_caption", "a caption is empty")
    return tuple(caption.strip() for caption in captions)


def _label(fields: Mapping[str, Any], cls: bytes | None) -> str | None:
    label = fields.get("label")
    if label is None and cls is not None:
        label = _utf8(cls, "cls").strip() or None
    if label is not None and not isinstance(label, (str, int)):
        raise SampleError("bad_label", f"label is {str(label)[:60]!r} ({type(label).__name__}), not text")
    return None if label is None else str(label)


def _set(fields: Mapping[str, Any]) -> str | None:
    name = fields.get("set")
    if not isinstance(name, str | None):
        raise SampleError("bad_label", f"set is {str(name)[:60]!r} ({type(name).__name__}), not text")
    return name


def _crc32(fields: Mapping[str, Any]) -> int | None:
    value = fields.get("crc32")
    if value is not None and (not isinstance(value, int) or not 0 <= value < 1 << 32):
        raise SampleError("bad_json", f"crc32 is {str(value)[:60]!r}, not a number of 32 bits")
    return value


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", f"its .json does not parse: {str(error)[:120]}") from error
    if not isinstance(fields, dict):
        raise SampleError("bad_json", f"its .json holds a {type(fields).__name__}, not an object")
    return fields


def _utf8(text: bytes, extension: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("bad_caption", f"its .{extension} is not UTF-8 text (byte {error.start})") from error
