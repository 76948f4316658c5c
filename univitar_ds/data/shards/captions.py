"""Reads the text members of a sample: captions, label and set, from .json, .txt and .cls.

Shards of other producers may have other content in members with these names. Unusable content is ignored and counted.
A sample is left out only if it then has neither a caption nor a label.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import from_json

from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.shards.class_names import named
from univitar_ds.errors import SampleError

EXTENSIONS = ("json", "txt", "cls")
BYTES_LIMIT = 1 << 20
"""Maximum size in bytes of a text member. The trainer's memory holds the texts of the whole shuffle buffer."""
MAX_CAPTIONS = 1000
"""Maximum number of captions of a sample. Short captions take ten times their bytes in memory."""
IGNORED = ("bad_caption", "bad_label", "bad_set", "bad_checksum", "bad_json", "too_large")
"""Kinds of ignored content."""

_OWN_FIELDS = {"captions", "label", "set", "kind", "width", "height", "frames", "file", "crc32"}
"""Fields that `univitar-ds data pack` writes for every sample, which identify its samples without a manifest."""
_UNMARKED = ("text", "TEXT")
"""Fields that are used as caption if there is no other caption, as in LAION's tables."""
_MAX_SIZE = 1 << 31
"""Pixels, frames and seconds of a file; larger numbers in metadata are not used."""
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and their encodings; UTF-32 first, because its marks begin with one of UTF-16."""
_FIRST_BYTES_OF_MARKS = frozenset(mark[:1] for mark, _ in _BYTE_ORDER_MARKS)
_MAX_SHOWN = 60

_Ignored = dict[str, str]
"""The first message of each kind of ignored content."""


class Ignored(NamedTuple):
    """Unusable content of a sample. `kind`: one of `IGNORED`; the rest of the sample is used."""

    kind: str
    message: str


class Texts(NamedTuple):
    """Usable texts of a sample.

    `captions`: empty only if there is a `label`; `set`: the data set of the label; `crc32`, `size`: of the media
    member, if `data pack` wrote them; `ignored`: at most one entry for each kind; `several_lines`: whether the caption
    is a .txt with several lines; `json`: the requested fields of .json."""

    captions: tuple[str, ...]
    label: str | None
    set: str | None = None
    crc32: int | None = None
    size: MediaSize | None = None
    ignored: tuple[Ignored, ...] = ()
    several_lines: bool = False
    json: Mapping[str, Any] | None = None


def read_texts(
    members: Mapping[str, bytes],
    *,
    lines: bool = False,
    packed: bool = False,
    required: bool = True,
    keep: Collection[str] = (),
) -> Texts:
    """Reads captions, label and set from .json. A .txt replaces missing captions, a .cls a missing label.

    Args: members: contents by extension; lines: whether each line of .txt is a caption; packed: whether a manifest
        shows that `data pack` wrote the shard; required: whether a sample needs a caption or a label; keep: names of
        fields of .json to return.
    Raises: SampleError if there is no usable text and `required`, or the checksum is invalid and `packed`.
    """
    ignored: _Ignored = {}
    fields = _json_object(members["json"], ignored) if "json" in members else {}
    captions = _of_fields(fields, ("captions", "caption"), ignored)
    several = False
    if not captions and "txt" in members:
        captions = _of_txt(members["txt"], ignored)
        several = len(captions) > 1 and not lines
        if several:
            captions = (_visible(decoded(members["txt"])),)
    captions = captions or _of_fields(fields, _UNMARKED, {})
    if len(captions) > MAX_CAPTIONS:
        ignored.setdefault("too_large", f"it has {len(captions)} captions; the first {MAX_CAPTIONS} are used")
        captions = captions[:MAX_CAPTIONS]
    label = _label(fields, members.get("cls"), ignored)
    if required and not captions and not label:
        for kind, message in ignored.items():
            raise SampleError(kind, message)
        raise SampleError("no_caption", "neither captions nor caption in its .json nor a .txt member, and no label")
    own = packed or fields.keys() >= _OWN_FIELDS
    data_set, crc32, size = _set(fields, ignored), _crc32(fields, own, packed, ignored), _size(fields) if own else None
    kinds = tuple(map(Ignored._make, ignored.items())) if ignored else ()
    kept = {name: fields[name] for name in keep if name in fields} if keep else None
    return Texts(captions, label, data_set, crc32, size, kinds, several, kept)


def resolve(
    captions: tuple[str, ...],
    label: str | None,
    ignored: tuple[Ignored, ...],
    *,
    class_names: Sequence[str],
    templates: Sequence[str] | None,
) -> tuple[tuple[str, ...], str | None, tuple[Ignored, ...]]:
    """Applies the class names and templates of a source. Returns captions, label name and ignored content.

    If there are no captions, `templates` filled with the label are the captions; no caption if `templates` is None.
    A label without a class name is ignored if there is a caption.
    Raises: SampleError if there is no caption and `label` has no class name, or `templates` or `label` is empty.
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


def _json_object(content: bytes, ignored: _Ignored) -> dict[str, Any]:
    if len(content) > BYTES_LIMIT:
        ignored.setdefault("too_large", f"its .json has {len(content)} bytes (limit {BYTES_LIMIT})")
        return {}
    try:
        fields = parsed(content)
    except (ValueError, RecursionError) as error:
        ignored.setdefault("bad_json", f"its .json does not parse: {str(error)[:120]}")
        return {}
    if not isinstance(fields, dict):
        ignored.setdefault("bad_json", f"its .json holds a {type(fields).__name__}, not an object")
        return {}
    return fields


def parsed(content: bytes) -> Any:
    """Returns the value of a JSON text. Raises: ValueError or RecursionError if it is none."""
    try:
        return from_json(content, cache_strings="keys")  # takes a third of the time of `json`
    except ValueError:
        return _parsed_loosely(content)


def _parsed_loosely(content: bytes) -> Any:
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        raise
    except ValueError:  # accepts control characters in strings and integers of thousands of digits
        return json.loads(content, strict=False, parse_int=_whole_number)


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)


def _of_fields(fields: Mapping[str, Any], names: Iterable[str], ignored: _Ignored) -> tuple[str, ...]:
    """Returns the captions of the first field that has any: a string, or a list of strings or objects with caption."""
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, str | list):
            message = f"{name} is {_brief(value)} ({type(value).__name__}), not a text and not a list of texts"
            ignored.setdefault("bad_caption", message)
            continue
        found = []
        for one in [value] if isinstance(value, str) else value:
            if isinstance(one, str) and (caption := _visible(one)):
                found.append(caption)
                continue
            if isinstance(one, dict):
                one = one.get("caption", one)
            if not isinstance(one, str):
                ignored.setdefault("bad_caption", f"a caption is {_brief(one)} ({type(one).__name__}), not text")
            elif caption := _visible(one):
                found.append(caption)
            else:
                ignored.setdefault("bad_caption", "a caption is empty")
        if found:
            return tuple(found)
    return ()


def _of_txt(content: bytes, ignored: _Ignored) -> tuple[str, ...]:
    """Returns the lines of a .txt that are not empty; none if the .txt is unusable."""
    if len(content) > BYTES_LIMIT:
        ignored.setdefault("too_large", f"its .txt has {len(content)} bytes (limit {BYTES_LIMIT})")
        return ()
    try:
        captions = caption_lines(decoded(content))
    except UnicodeError as error:
        ignored.setdefault("bad_caption", f"its .txt is not UTF-8 text ({_where(error)})")
        return ()
    if not captions:
        ignored.setdefault("bad_caption", "a caption is empty: its .txt holds no text")
    return captions


def caption_lines(text: str) -> tuple[str, ...]:
    """Returns the lines of a text that are not empty."""
    lines = _LINE_ENDS.split(text) if "\n" in text or "\r" in text else (text,)
    return tuple([caption for line in lines if (caption := _visible(line))])


def _label(fields: Mapping[str, Any], cls: bytes | None, ignored: _Ignored) -> str | None:
    label = fields.get("label")
    if type(label) is str and label.strip():
        return label
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        ignored.setdefault("bad_label", f"label is {_brief(label)} ({type(label).__name__}), not text")
        label = None
    if label is not None and (label := str(label)).strip():
        return label
    return None if cls is None else _of_cls(cls, ignored)


def _of_cls(content: bytes, ignored: _Ignored) -> str | None:
    if len(content) > BYTES_LIMIT:
        ignored.setdefault("too_large", f"its .cls has {len(content)} bytes (limit {BYTES_LIMIT})")
        return None
    try:
        return decoded(content).strip() or None
    except UnicodeError as error:
        ignored.setdefault("bad_label", f"its .cls is not UTF-8 text ({_where(error)})")
        return None


def _set(fields: Mapping[str, Any], ignored: _Ignored) -> str | None:
    name = fields.get("set")
    if isinstance(name, str | None):
        return name
    ignored.setdefault("bad_set", f"set is {_brief(name)} ({type(name).__name__}), not text")
    return None


def _size(fields: Mapping[str, Any]) -> MediaSize | None:
    """Returns the size that `data pack` wrote; None if it is incomplete, as for videos in layout 2 (no duration)."""
    get = fields.get
    kind, height, width, frames = get("kind"), get("height"), get("width"), get("frames")
    for number in (height, width, frames):
        if type(number) is not int or not 1 <= number <= _MAX_SIZE:
            return None
    if kind == "image":
        return MediaSize("image", height, width, 1)
    seconds = fields.get("duration_s")
    if kind == "video" and isinstance(seconds, float) and 0 <= seconds <= _MAX_SIZE:
        return MediaSize("video", height, width, frames, seconds)
    return None


def _crc32(fields: Mapping[str, Any], own: bool, packed: bool, ignored: _Ignored) -> int | None:
    """Returns the checksum if `data pack` wrote the sample (`own`), else None.

    Raises: SampleError for an invalid checksum in a shard that `data pack` wrote according to a manifest (`packed`).
    """
    value = fields.get("crc32")
    if value is None:
        return None
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32
    if own and fits:
        return value
    if own and packed:
        raise SampleError("bad_json", f"crc32 is {_brief(value)}, not a number of 32 bits")
    ignored.setdefault("bad_checksum", f"crc32 is {_brief(value)}, which data pack did not write, so it is not checked")
    return None


def _visible(text: str) -> str:
    """Returns a caption without surrounding whitespace, "" if it is invisible. Lone surrogates become "?"."""
    text = text.strip()
    if text.isascii() and text.isprintable():
        return text
    text = text.encode("utf-8", "replace").decode()
    return text if any(one.isprintable() and not one.isspace() for one in text) else ""


def decoded(content: bytes) -> str:
    """Decodes UTF-8, or the encoding of a byte order mark. Raises: UnicodeError, also if there is a zero byte."""
    encoding = "utf-8"
    if content[:1] in _FIRST_BYTES_OF_MARKS:
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), encoding)
    text = content.decode(encoding)
    if "\0" in text:
        raise UnicodeError(f"character {text.index(chr(0))} is NUL")
    return text


def _where(error: UnicodeError) -> str:
    return f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)


def _brief(value: object) -> str:
    """Returns the beginning of a value's text, or its type if it cannot be converted, such as a very deep list."""
    try:
        return repr(str(value)[:_MAX_SHOWN])
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
