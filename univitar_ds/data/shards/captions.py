"""The text members of a sample: captions, label and set, from .json, .txt and .cls.

Other producers write other things under the same names. What cannot be used is ignored and counted; it costs a sample
only where nothing else says what is in it.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.shards.class_names import named
from univitar_ds.errors import SampleError

EXTENSIONS = ("json", "txt", "cls")
BYTES_LIMIT = 1 << 20
"""Longest text member that is parsed. The texts of a pool of samples lie in the trainer's memory."""
IGNORED = ("bad_caption", "bad_label", "bad_set", "bad_checksum", "bad_json", "too_large")
"""Kinds of texts that are ignored in samples that are used."""

_OWN_FIELDS = {"captions", "label", "set", "kind", "width", "height", "frames", "file", "crc32"}
"""What only `univitar-ds data pack` writes, of every sample: these mark a sample of a shard that has been copied away
from its manifest."""
_UNMARKED = ("text", "TEXT")
"""Fields that hold a caption where nothing else does, as in LAION's tables."""
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Those of UTF-32 first: one of them begins like one of UTF-16."""
_BEGINS_OF_MARKS = frozenset(mark[:1] for mark, _ in _BYTE_ORDER_MARKS)
_SHOWN = 60

_Aside = dict[str, str]
"""What was ignored so far: of each kind the first message."""


class Ignored(NamedTuple):
    """A text that cannot be used, in a sample that is used without it: one of `IGNORED` and a sentence."""

    kind: str
    message: str


class Texts(NamedTuple):
    """Captions, none empty, and at least one unless there is a label; the label where there is one; the data set that
    the label belongs to; the CRC-32 and the size of the media member, where `data pack` wrote them; what was ignored,
    each kind once; whether its caption is from a .txt of several lines that are read as one caption."""

    captions: tuple[str, ...]
    label: str | None
    set: str | None = None
    crc32: int | None = None
    size: MediaSize | None = None
    ignored: tuple[Ignored, ...] = ()
    several_lines: bool = False


def read_texts(members: Mapping[str, bytes], *, lines: bool = False, packed: bool = False) -> Texts:
    """Captions and label: the fields captions, caption, label and set of .json first, else .txt and .cls.

    Args: contents of the text members by extension; whether each line of .txt is a caption; whether the shard is known
        to be one of `data pack`.
    Raises: SampleError if there is neither a caption nor a label that can be used.
    """
    aside: _Aside = {}
    fields = _json_object(members["json"], aside) if "json" in members else {}
    captions = _of_fields(fields, ("captions", "caption"), aside)
    several = False
    if not captions and "txt" in members:
        captions = _of_txt(members["txt"], aside)
        several = len(captions) > 1 and not lines
        if several:
            captions = (_visible(decoded(members["txt"])),)
    captions = captions or _of_fields(fields, _UNMARKED, {})
    label = _label(fields, members.get("cls"), aside)
    if not captions and not label:
        for kind, message in aside.items():
            raise SampleError(kind, message)
        raise SampleError("no_caption", "neither captions nor caption in its .json nor a .txt member, and no label")
    own = packed or fields.keys() >= _OWN_FIELDS
    data_set, crc32, size = _set(fields, aside), _crc32(fields, own, packed, aside), _size(fields) if own else None
    ignored = tuple(map(Ignored._make, aside.items())) if aside else ()
    return Texts(captions, label, data_set, crc32, size, ignored, several)


def resolve(
    captions: tuple[str, ...],
    label: str | None,
    ignored: tuple[Ignored, ...],
    *,
    class_names: Sequence[str],
    templates: Sequence[str] | None,
) -> tuple[tuple[str, ...], str | None, tuple[Ignored, ...]]:
    """What its source makes of a sample: its captions, its label's name, and what was ignored.

    A sample without a caption gets `templates` with its label, or none at all where that is None.
    Raises: SampleError if it has neither; a captioned sample only loses a label that has no name.
    """
    try:
        label = named(label, class_names)
    except SampleError as error:
        if not captions:
            raise
        return captions, None, (*ignored, Ignored(error.kind, str(error)))
    if captions or templates is None:
        return captions, label, ignored
    if not label or not templates:
        messages = "".join(f"; {one.message}" for one in ignored)
        kind = next((one.kind for one in ignored if one.kind in ("bad_caption", "bad_json")), "no_caption")
        raise SampleError(kind, f"only a label ({label!r}), and its source has no templates to put it in{messages}")
    return tuple(template.replace("{}", label) for template in templates), label, ignored


def _json_object(content: bytes, aside: _Aside) -> dict[str, Any]:
    if len(content) > BYTES_LIMIT:
        aside.setdefault("too_large", f"its .json has {len(content)} bytes (limit {BYTES_LIMIT})")
        return {}
    try:
        fields = _parsed(content)
    except (ValueError, RecursionError) as error:
        aside.setdefault("bad_json", f"its .json does not parse: {str(error)[:120]}")
        return {}
    if not isinstance(fields, dict):
        aside.setdefault("bad_json", f"its .json holds a {type(fields).__name__}, not an object")
        return {}
    return fields


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        raise
    except ValueError:  # once more with control characters in texts and numbers of thousands of digits
        return json.loads(content, strict=False, parse_int=_whole_number)


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)


def _of_fields(fields: Mapping[str, Any], names: Iterable[str], aside: _Aside) -> tuple[str, ...]:
    """The captions of the first of these fields that has any: a text, or a list of texts or objects with a caption."""
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, str | list):
            message = f"{name} is {_brief(value)} ({type(value).__name__}), not a text and not a list of texts"
            aside.setdefault("bad_caption", message)
            continue
        found = []
        for one in [value] if isinstance(value, str) else value:
            if isinstance(one, str) and (caption := _visible(one)):
                found.append(caption)
                continue
            if isinstance(one, dict):
                one = one.get("caption", one)
            if not isinstance(one, str):
                aside.setdefault("bad_caption", f"a caption is {_brief(one)} ({type(one).__name__}), not text")
            elif caption := _visible(one):
                found.append(caption)
            else:
                aside.setdefault("bad_caption", "a caption is empty")
        if found:
            return tuple(found)
    return ()


def _of_txt(content: bytes, aside: _Aside) -> tuple[str, ...]:
    """Its lines that are not empty."""
    if len(content) > BYTES_LIMIT:
        aside.setdefault("too_large", f"its .txt has {len(content)} bytes (limit {BYTES_LIMIT})")
        return ()
    try:
        captions = caption_lines(decoded(content))
    except UnicodeError as error:
        aside.setdefault("bad_caption", f"its .txt is not UTF-8 text ({_where(error)})")
        return ()
    if not captions:
        aside.setdefault("bad_caption", "a caption is empty: its .txt holds no text")
    return captions


def caption_lines(text: str) -> tuple[str, ...]:
    """The lines of a text that are not empty."""
    lines = _LINE_ENDS.split(text) if "\n" in text or "\r" in text else (text,)
    return tuple([caption for line in lines if (caption := _visible(line))])


def _label(fields: Mapping[str, Any], cls: bytes | None, aside: _Aside) -> str | None:
    label = fields.get("label")
    if type(label) is str and label.strip():
        return label
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        aside.setdefault("bad_label", f"label is {_brief(label)} ({type(label).__name__}), not text")
        label = None
    if label is not None and (label := str(label)).strip():
        return label
    return None if cls is None else _of_cls(cls, aside)


def _of_cls(content: bytes, aside: _Aside) -> str | None:
    if len(content) > BYTES_LIMIT:
        aside.setdefault("too_large", f"its .cls has {len(content)} bytes (limit {BYTES_LIMIT})")
        return None
    try:
        return decoded(content).strip() or None
    except UnicodeError as error:
        aside.setdefault("bad_label", f"its .cls is not UTF-8 text ({_where(error)})")
        return None


def _set(fields: Mapping[str, Any], aside: _Aside) -> str | None:
    name = fields.get("set")
    if isinstance(name, str | None):
        return name
    aside.setdefault("bad_set", f"set is {_brief(name)} ({type(name).__name__}), not text")
    return None


def _size(fields: Mapping[str, Any]) -> MediaSize | None:
    """The size that `data pack` wrote; None where it is not whole: layout 2 has no duration of a video."""
    kind, height, width, frames = (fields.get(name) for name in ("kind", "height", "width", "frames"))
    if not all(type(number) is int and number >= 1 for number in (height, width, frames)):
        return None
    if kind == "image":
        return MediaSize("image", height, width, 1)
    seconds = fields.get("duration_s")
    if kind == "video" and isinstance(seconds, float) and 0 <= seconds < math.inf:
        return MediaSize("video", height, width, frames, seconds)
    return None


def _crc32(fields: Mapping[str, Any], own: bool, packed: bool, aside: _Aside) -> int | None:
    """`own`: the sample is one of `data pack`; `packed`: so is its shard, by a manifest.

    Raises: SampleError for a checksum that `data pack` wrote and that has been damaged since.
    """
    value = fields.get("crc32")
    if value is None:
        return None
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32
    if own and fits:
        return value
    if own and packed:
        raise SampleError("bad_json", f"crc32 is {_brief(value)}, not a number of 32 bits")
    aside.setdefault(
        "bad_checksum", f"crc32 is {_brief(value)}, which data pack did not write; nothing is compared with it"
    )
    return None


def _visible(text: str) -> str:
    """A caption without blanks around it; "" where nothing in it can be seen. Halves of surrogate pairs are replaced:
    they have no bytes."""
    text = text.strip()
    if text.isascii() and text.isprintable():
        return text
    text = text.encode("utf-8", "replace").decode()
    return text if any(one.isprintable() and not one.isspace() for one in text) else ""


def decoded(content: bytes) -> str:
    """UTF-8, or what a byte order mark says. Raises: UnicodeError, also for zero bytes, which no text has."""
    encoding = "utf-8"
    if content[:1] in _BEGINS_OF_MARKS:
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), encoding)
    text = content.decode(encoding)
    if "\0" in text:
        raise UnicodeError(f"byte {content.index(0)} is zero")
    return text


def _where(error: UnicodeError) -> str:
    return f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)


def _brief(value: object) -> str:
    """The beginning of a value; of one that has no short text, such as very deep lists, its type."""
    try:
        return repr(str(value)[:_SHOWN])
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
