"""Small synthetic shards for tests: encoded images and videos in tars with a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from univitar_ds.data.media.probe import probe

Sample = tuple[str, Mapping[str, bytes]]
"""(key, {extension: content})."""


def image(height: int, width: int, seed: int = 0, form: str = "JPEG") -> bytes:
    """An encoded image: a colour gradient that differs with `seed`."""
    from PIL import Image

    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows * 255 // height, columns * 255 // width, np.full_like(rows, seed * 37 % 256)]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(planes, axis=2).astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()


def video(height: int, width: int, frames: int = 8, seed: int = 0) -> bytes:
    """An MP4 in which a bright bar moves to the right; sides must be even."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.thread_count = 1
        for index in range(frames):
            array = np.full((height, width, 3), seed * 37 % 200, np.uint8)
            left = index * width // frames
            array[:, left : left + max(2, width // frames)] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def sidecar(captions: list[str], label: str | None, kind: str, size: tuple[float, ...], name: str) -> bytes:
    """The JSON member of a packed sample. `size` is (height, width, frames), for a video also the duration in s."""
    fields = {"captions": captions, "label": label, "kind": kind, "file": name}
    return json.dumps(fields | dict(zip(("height", "width", "frames", "duration_s"), size, strict=False))).encode()


def write_tar(path: Path, samples: Iterable[Sample]) -> Path:
    """Write a tar of members {key}.{extension} in the given order; the name is {key} if the extension is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}" if extension else key)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def image_sample(index: int, rng: np.random.Generator, prefix: str = "i") -> Sample:
    height, width = (int(side) for side in rng.integers(40, 160, 2))
    label = ("red", "green", "blue", "grey")[index % 4]
    form, extension = (("JPEG", "jpg"), ("PNG", "png"))[index % 3 == 0]
    captions = [f"a {label} image number {index}", f"number {index}, {label}"][: 1 + index % 2]
    content = image(height, width, index, form)
    text = sidecar(captions, label, "image", (height, width, 1), f"{prefix}{index:05d}.{extension}")
    return f"{prefix}{index:05d}", {extension: content, "json": text}


def video_sample(index: int, rng: np.random.Generator, prefix: str = "v") -> Sample:
    height, width = (2 * int(side) for side in rng.integers(24, 60, 2))
    label = ("left", "right")[index % 2]
    frames, name = 6 + index % 5, f"{prefix}{index:05d}.mp4"
    content = video(height, width, frames, index)
    size = height, width, frames, probe(content, "mp4").duration_s
    text = sidecar([f"a bar moves {label} in video {index}"], label, "video", size, name)
    return f"{prefix}{index:05d}", {"mp4": content, "json": text}


def write_demo_shards(folder: Path, images: int = 64, videos: int = 16, shards: int = 4, seed: int = 0) -> Path:
    """Write a packed folder: `images` and `videos` for training in `shards` shards each, a quarter as many for test."""
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    rows = []
    for kind, make, total in (("image", image_sample, images), ("video", video_sample, videos)):
        samples = [make(index, rng) for index in range(total + -(-total // 4))]
        parts = [("train", number, samples[number:total:shards]) for number in range(shards)]
        parts.append(("test", 0, samples[total:]))
        for split, number, part in parts:
            if not part:
                continue
            path = write_tar(folder / f"{split}-{kind}-{number:06d}.tar", part)
            content = path.read_bytes()
            row = {"file": path.name, "split": split, "kind": kind, "samples": len(part), "bytes": len(content)}
            rows.append({**row, "sha256": hashlib.sha256(content).hexdigest()})
    manifest = {"version": 1, "counts": {split: _counts(rows, split) for split in ("train", "test")}, "shards": rows}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return folder


def _counts(rows: list[dict], split: str) -> dict[str, int]:
    return {
        kind: sum(row["samples"] for row in rows if row["split"] == split and row["kind"] == kind)
        for kind in ("image", "video")
    }
