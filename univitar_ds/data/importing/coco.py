"""Lists the images of COCO's captions: a JSON with `images` and `annotations`, or a folder with such files in
`annotations/`.

The images are found beside the JSON, as in COCO's own folders.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from univitar_ds.data.importing.rows import Collected, Fault, Listing, ReadOptions, Row, captions_of, file_inside, short
from univitar_ds.data.importing.table_files import load_json
from univitar_ds.data.storage.local import open_regular
from univitar_ds.errors import DataError

_SPLIT = re.compile(r"(?<![a-z])(train|val|test)(?![a-z])")
_TRIED = 20
"""Number of images that are looked up to find their folder."""


def recognises(source: str) -> bool:
    """Whether a source is a JSON object, or a folder with `annotations/captions_*.json`."""
    path = Path(source)
    if path.is_dir():
        return any(path.glob("annotations/captions_*.json"))
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        with open_regular(path) as stream:
            return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    except OSError:
        return False


def rows(source: str, options: ReadOptions) -> Listing:
    """Returns a row for each image with its captions. The split is `train`, `val` or `test` if the JSON's name has it.

    Raises: DataError if a JSON does not have this form, its images are not found, or there is no row without a fault.
    """
    path = Path(source)
    files = sorted(path.glob("annotations/captions_*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no annotations/captions_*.json; give a JSON with images and annotations")
    documents = [(file, _document(file)) for file in files]
    starts = [options.images or _images_of(file, document["images"]) for file, document in documents]
    collected = Collected(path if path.is_dir() and options.images is None else starts[0])
    for (file, document), start in zip(documents, starts, strict=True):
        named = _SPLIT.search(file.stem.lower())
        split = options.split or (named[1] if named else options.default_split)
        _add(collected, file, document, start, split)
    return collected.listing(path)


def _document(file: Path) -> dict[str, list[Any]]:
    document = load_json(file)
    for name in ("images", "annotations"):
        if not isinstance(document, dict) or not isinstance(document.get(name), list):
            keys = ", ".join(list(document)[:10]) if isinstance(document, dict) else f"a {type(document).__name__}"
            if isinstance(document, dict) and name in document:
                keys = f"a {type(document[name]).__name__} there"
            raise DataError(f"{file}: has no list of {name}, as COCO's captions have; it has {keys or 'nothing'}")
    if not document["images"]:
        raise DataError(f"{file}: its list of images is empty; give COCO's captions_*.json")
    annotations = document["annotations"]
    if annotations and not any(isinstance(one, dict) and "caption" in one for one in annotations):
        keys = list(annotations[0])[:10] if isinstance(annotations[0], dict) else [type(annotations[0]).__name__]
        raise DataError(
            f"{file}: its annotations have no caption but {', '.join(map(str, keys))}; give COCO's captions_*.json"
        )
    return document


def _images_of(file: Path, images: list[Any]) -> Path:
    """Returns the folder with the images of a JSON. Raises: DataError with the folders that were tried."""
    names = [one.get("file_name") for one in images[:_TRIED] if isinstance(one, dict)]
    tried = list(dict.fromkeys(_candidates(file)))
    for folder in tried:
        if any(isinstance(name, str) and "\0" not in name and _in(folder, name) for name in names):
            return folder
    raise DataError(
        f"{file}: none of its first {len(names)} images, such as {short(names[0] if names else None)}, is in "
        f"{', '.join(map(str, tried))}; give their folder with --images FOLDER"
    )


def _in(folder: Path, name: str) -> bool:
    try:
        file_inside(folder, name, folder, folder)
    except Fault:
        return False
    return True


def _candidates(file: Path) -> Iterator[Path]:
    name = file.stem.rpartition("_")[2]
    for parent in (file.parent, file.parent.parent):
        for inner in (f"images/{name}", name, "images", ""):
            if (folder := parent / inner).is_dir():
                yield folder


def _add(collected: Collected, file: Path, document: dict[str, list[Any]], start: Path, split: str) -> None:
    left_out = collected.left_out
    captions: dict[Any, list[str]] = {}
    ids = Counter(one["id"] for one in document["images"] if isinstance(one, dict) and _is_id(one.get("id")))
    for number, one in enumerate(document["annotations"]):
        where = f"{file.name}, annotation {number}"
        image = one.get("image_id") if isinstance(one, dict) else None
        if not _is_id(image) or image not in ids:
            left_out[where] = f"its image_id {short(image)} is not the id of an image"
            continue
        try:
            texts = captions_of(one.get("caption"))
            if not texts:
                raise Fault("bad_caption: the caption is empty")
            captions.setdefault(image, []).extend(texts)
        except Fault as fault:
            left_out[where] = str(fault)
    for number, one in enumerate(document["images"]):
        where = f"{file.name}, image {number}"
        try:
            if not isinstance(one, dict) or not _is_id(one.get("id")):
                raise Fault("it is not an object with an id and a file_name")
            if ids[one["id"]] > 1:
                raise Fault(f"duplicate: {ids[one['id']]} images have the id {short(one['id'])}; give each its own")
            texts = tuple(dict.fromkeys(captions.get(one["id"], ())))
            if not texts:
                raise Fault(f"no_caption: no annotation has the image_id {short(one['id'])}")
            name = file_inside(collected.root, one.get("file_name"), start, start)
            collected.add(Row(name, None, texts, None, split), where)
        except Fault as fault:
            left_out[where] = str(fault)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)
