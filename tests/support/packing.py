"""Helpers for tests of packing: source folders, packing in this process or another, and reading the result."""

import json
import os
import sys
import tarfile
from dataclasses import fields
from pathlib import Path

from tests.support import media
from tests.support.paths import ROOT
from tests.support.progress import run_watched
from univitar_ds.data.importing.rows import ReadOptions
from univitar_ds.data.writing.writer import PackOptions, pack_folder


def pack(folder, out, **options):
    where = {name: options.pop(name) for name in ("settings", "state") if name in options}
    reading = {field.name: options.pop(field.name) for field in fields(ReadOptions) if field.name in options}
    chosen = PackOptions(**{"workers": 1, "progress": False, **options}, reading=ReadOptions(**reading))
    return pack_folder(folder, out, chosen, **where)


def image_row(index: int, **fields) -> dict:
    return {"file": f"images/{index}.jpg", "kind": "image", "caption": f"image {index}", **fields}


def numbers_folder(tmp_path: Path) -> Path:
    """A source folder of 30 images with two labels, every fifth in the test split, and 4 videos."""
    files = {f"images/{i}.jpg": media.encoded(media.noise(40 + i, 60, i)) for i in range(30)}
    files |= {f"clips/video {i}.mp4": media.video(media.grey_frames(4 + i)) for i in range(4)}
    rows = [
        image_row(i, label="even" if i % 2 == 0 else "odd", set="numbers", split="test" if i % 5 == 0 else "train")
        for i in range(30)
    ]
    rows += [{"file": f"clips/video {i}.mp4", "kind": "video", "captions": ["grey", f"clip {i}"]} for i in range(4)]
    return media.write_folder(tmp_path / "folder", files, rows)


def spoil(folder: Path) -> None:
    """Overwrites all .jpg and .mp4 files but keeps sizes and times, so that only a program that reads them notices."""
    for path in folder.rglob("*"):
        if path.suffix in (".jpg", ".mp4"):
            before = path.stat()
            path.write_bytes(b"x" * before.st_size)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def run_script(*command: str) -> str:
    """Runs Python with these arguments in a separate process, which must exit with status 0. Returns its stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = run_watched([sys.executable, *command], env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def samples_of(out: Path, manifest: dict) -> dict[str, dict]:
    """Returns {source file of a sample: {extension: bytes of the member, ..., "shard": name of the tar}}."""
    found = {}
    for shard in manifest["shards"]:
        with tarfile.open(out / shard["file"]) as tar:
            for member in tar.getmembers():
                key, extension = member.name.split(".")
                found.setdefault((shard["file"], key), {})[extension] = tar.extractfile(member).read()
    return {json.loads(members["json"])["file"]: {**members, "shard": key[0]} for key, members in found.items()}
