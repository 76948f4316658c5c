"""Creates images and videos of known content in memory."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from PIL import Image

RED, GREEN, BLUE, YELLOW = (220, 20, 20), (20, 180, 20), (20, 20, 220), (220, 220, 20)
HELD = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""The transposition of the stored image by EXIF orientation; its inverse makes the image upright."""


def quarters(height: int = 40, width: int = 64) -> Image.Image:
    """Red and green above blue and yellow, so that all rotations and reflections differ."""
    pixels = np.zeros((height, width, 3), np.uint8)
    half_h, half_w = height // 2, width // 2
    pixels[:half_h, :half_w], pixels[:half_h, half_w:] = RED, GREEN
    pixels[half_h:, :half_w], pixels[half_h:, half_w:] = BLUE, YELLOW
    return Image.fromarray(pixels)


def corners(pixels: np.ndarray) -> list[str]:
    """Names of the colours near the top left, top right, bottom left and bottom right corners."""
    names = {RED: "red", GREEN: "green", BLUE: "blue", YELLOW: "yellow"}
    near = [pixels[y, x].astype(int) for y in (3, -4) for x in (3, -4)]
    return [names[min(names, key=lambda colour: np.abs(spot - colour).sum())] for spot in near]


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth random image, which is compressible and differs for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (max(height // 8, 2), max(width // 8, 2), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@contextmanager
def same_scheduling() -> Iterator[None]:
    """Restore the scheduling policy. If root calls SVT-AV1, it gives the calling thread real-time priority, which later
    threads and processes inherit, and two busy processes of this kind block all others on the machine."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def video(
    frames: Sequence[np.ndarray],
    form: str = "mp4",
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    pts: Sequence[int] | None = None,
    rate: int = 10,
    options: dict[str, str] | None = None,
    settings: dict[str, str] | None = None,
) -> bytes:
    """A video file of (H, W, 3) uint8 frames. `pts` are in units of 1 / `rate` s; `settings` are for the encoder."""
    stream = io.BytesIO()
    with same_scheduling(), av.open(stream, "w", format=form, options=options or {}) as container:
        track = container.add_stream(codec, rate=rate, options=settings or {})
        track.thread_count = 1  # the same bytes on every machine
        track.height, track.width = frames[0].shape[:2]
        track.pix_fmt = pix_fmt
        track.bit_rate = 4_000_000
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index if pts is None else pts[index]
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return stream.getvalue()


def moving_frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Different frames that a codec can predict from each other: a window that moves over an image."""
    scene = np.asarray(noise(height + 2 * count, width + 3 * count))
    return [np.ascontiguousarray(scene[2 * i : 2 * i + height, 3 * i : 3 * i + width]) for i in range(count)]


def retimed_mp4(data: bytes) -> bytes:
    """Copies the packets of an MP4 into another one in which the presentation times equal the decoding times."""
    stream = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(stream, "w", format="mp4") as container:
        track = container.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        first = packets[0].dts
        for packet in packets:
            packet.dts -= first
            packet.pts, packet.stream = packet.dts, track
            container.mux(packet)
    return stream.getvalue()


def grey_frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Uniformly grey frames; the level of each identifies its index, see `frame_numbers`."""
    return [np.full((height, width, 3), grey_level(i, count), np.uint8) for i in range(count)]


def grey_level(index: int, count: int) -> int:
    return 20 + round(index * 215 / max(count - 1, 1))


def frame_numbers(pixels: np.ndarray, count: int) -> list[int]:
    """The index in `grey_frames(count)` of each frame of (F, H, W, 3)."""
    levels = np.array([grey_level(i, count) for i in range(count)])
    return [int(np.abs(levels - frame.mean()).argmin()) for frame in pixels]


def turned_mp4(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 with another display matrix (a, b, c, d) in its only track header."""
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def sound() -> bytes:
    """An MP4 with an audio track only."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return stream.getvalue()


def write_folder(folder: Path, files: dict[str, bytes], rows: Sequence[dict | str]) -> Path:
    """Write media files and their metadata.jsonl; a row that is a string is written unchanged."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder
