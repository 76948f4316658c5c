"""A small run, and a folder of images, videos and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tests.support import hostile, shards
from tests.support.media import encoded, noise

BAD = ("cut.jpg", "empty.png", "tile.tif", "words.jpg")
IMAGES, VIDEOS = 10, 3


def write_media(folder: Path) -> Path:
    """Images of whole patches as PNG, which no resizing changes, two videos among them, and the files `BAD`."""
    folder.mkdir(parents=True)
    for index in range(IMAGES):
        sides = 14 * (2 + index % 3), 14 * (2 + index % 4)
        (folder / f"i{index:02d}.png").write_bytes(encoded(noise(*sides, seed=index), "PNG"))
    for index in range(VIDEOS):
        (folder / f"i{index:02d}-moving.mp4").write_bytes(shards.video(28, 42, 8 + index, index))
    whole = encoded(noise(200, 300))
    (folder / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.png").write_bytes(b"")
    (folder / "tile.tif").write_bytes(hostile.FILES["tile.tif"]())
    (folder / "words.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not read")
    return folder


def index_of(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.index.json").read_bytes())


def vectors_of(out: Path, name: str = "embedding") -> dict[str, Tensor]:
    """The vector of each key, through the index."""
    index = index_of(out)
    parts = [load_file(out.with_name(part["file"]))[name] for part in index["parts"]]
    rows = zip(index["key"], index["part"], index["row"], strict=True)
    return {key: parts[part][row] for key, part, row in rows}


def left_out(out: Path) -> dict[str, str]:
    """The kind of fault of each key that was left out."""
    report = out.with_name(f"{out.name}.bad.jsonl")
    return {one["key"]: one["kind"] for one in map(json.loads, report.read_text().splitlines())}


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of all files in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
