"""The cost of the frames of a video, compared with the simplest correct PyAV loop for the same frames.

    python benchmarks/bench_video_decode.py [--videos FOLDER] [--frames 8]

Videos are those of a folder (mp4, mkv, webm ... below it) and synthetic ones made here. For each, `decode_video` and
the plain loop take turns in one process; a row has the least CPU time of either over the rounds, and whether the pixels
are the same to the bit. The plain loop is given the frames to take, decodes up to the last of them in one thread,
converts and turns those alone, and stacks them. Rows go to results/bench_video_decode.csv.

A second table, results/bench_video_scaling.csv, shows whether swscale may scale during the conversion to RGB: the
difference of its pixels to antialiased bicubic resizing of the RGB frame, in levels of 255.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.rows import RESULTS, git_commit, processor, write_rows
from univitar_ds.data.media.frame_sampling import UNIFORM, by_count, sample_positions
from univitar_ds.data.media.types import VIDEO_EXTENSIONS, DecodeLimits
from univitar_ds.data.media.video_decode import decode_video
from univitar_ds.errors import SampleError

LIMITS = DecodeLimits(10**8, 600.0)

X264 = "bframes=3:b-pyramid=normal:log-level=none"
SYNTHETIC = {
    "h264_720p_gop250": ("mp4", "libx264", (720, 1280), 300, {"preset": "veryfast", "x264-params": X264}),
    "h264_720p_gop48": ("mp4", "libx264", (720, 1280), 300, {"preset": "veryfast", "x264-params": X264, "g": "48"}),
    "h264_720p_no_b": ("mp4", "libx264", (720, 1280), 300, {"preset": "veryfast", "tune": "zerolatency", "g": "30"}),
    "h264_360p_60s": ("matroska", "libx264", (360, 640), 1500, {"preset": "veryfast", "x264-params": X264, "g": "50"}),
    "h264_avi": ("avi", "libx264", (360, 640), 300, {"preset": "veryfast", "x264-params": X264}),
    "hevc_720p": ("mp4", "libx265", (720, 1280), 150, {"preset": "ultrafast", "x265-params": "log-level=none"}),
    "vp9_360p": ("webm", "libvpx-vp9", (360, 640), 300, {"deadline": "realtime", "cpu-used": "8", "g": "60"}),
    "vp8_360p": ("webm", "libvpx", (360, 640), 300, {"deadline": "realtime", "cpu-used": "8", "g": "60"}),
    "av1_360p": ("matroska", "libsvtav1", (360, 640), 200, {"preset": "12"}),
    "mpeg2_ts": ("mpegts", "mpeg2video", (360, 640), 300, {"bf": "2", "g": "12", "b": "2M"}),
    "mpeg4_mp4": ("mp4", "mpeg4", (360, 640), 300, {"bf": "2", "g": "50", "b": "2M"}),
    "mjpeg_mov": ("mov", "mjpeg", (360, 640), 100, {}),
    "one_frame": ("mp4", "libx264", (360, 640), 1, {"x264-params": X264}),
}
"""Container, encoder, (height, width), frames, settings."""


def synthetic(form: str, codec: str, size: tuple[int, int], count: int, settings: dict[str, str]) -> bytes:
    """A window that slides over a textured image."""
    height, width = size
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (height // 6, width // 6, 3), np.uint8))
    scene = np.asarray(small.resize((width + 256, height + 256), Image.Resampling.BICUBIC))
    stream = io.BytesIO()
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    with av.open(stream, "w", format=form) as container:
        track = container.add_stream(codec, rate=25, options=settings)
        track.height, track.width = size
        track.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(count):
            y, x = (abs(128 - (step * index) % 256) for step in (2, 3))
            pixels = np.ascontiguousarray(scene[y : y + height, x : x + width])
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    os.sched_setscheduler(0, *before)  # SVT-AV1 gives this thread real-time priority if root runs it
    return stream.getvalue()


def plain(data: bytes, numbers: list[int]) -> np.ndarray:
    """The simplest correct loop: (frames, H, W, 3) uint8 of the frames with these numbers."""
    taken: dict[int, np.ndarray] = {}
    with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                taken[number] = np.rot90(frame.to_ndarray(format="rgb24", threads=1), frame.rotation // 90)
            if number == numbers[-1]:
                break
    return np.stack([taken[number] for number in numbers])


def frame_count(data: bytes) -> tuple[str, int, str]:
    """Codec, frames that can be decoded, size."""
    with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
        context = container.streams.video[0].codec_context
        count = sum(1 for _ in container.decode(video=0))
        return context.name, count, f"{context.width}x{context.height}"


def cpu_seconds(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def measure(data: bytes, frames: int, rounds: int) -> dict[str, object]:
    """One row of the first table."""
    codec, count, size = frame_count(data)
    numbers = by_count(sample_positions(UNIFORM, frames, 0), count)
    ours, theirs = [], []
    for _ in range(rounds):
        seconds, mine = cpu_seconds(lambda: decode_video(data, frames=frames, limits=LIMITS))
        ours.append(seconds)
        seconds, truth = cpu_seconds(lambda: plain(data, numbers))
        theirs.append(seconds)
    return {
        "codec": codec,
        "size_px": size,
        "video_frames": count,
        "frames": frames,
        "decode_video_cpu_ms": round(1e3 * min(ours), 2),
        "plain_cpu_ms": round(1e3 * min(theirs), 2),
        "ratio": round(min(ours) / min(theirs), 3),
        "same_pixels": np.array_equal(mine, truth),
    }


def videos(folder: Path | None) -> Iterator[tuple[str, str, bytes]]:
    """(set, name, bytes) of every video."""
    for path in sorted(folder.rglob("*")) if folder else []:
        if path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS:
            yield "folder", path.name, path.read_bytes()
    for name, recipe in SYNTHETIC.items():
        yield "synthetic", name, synthetic(*recipe)


def scaling(name: str, data: bytes, share: float, rounds: int = 7) -> Iterator[dict[str, object]]:
    """Rows of the second table: one frame scaled by swscale in several ways, against bicubic resizing of its RGB."""
    with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
        frame = next(container.decode(video=0))
    width, height = (int(side * share) // 14 * 14 for side in (frame.width, frame.height))
    reformatter = VideoReformatter()

    def resized() -> np.ndarray:
        rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))

    exact = (
        Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
    )
    ways = {"bilinear": Interpolation.BILINEAR, "bicubic": Interpolation.BICUBIC, "bicubic_exact": exact}
    cost, truth = min((cpu_seconds(resized) for _ in range(rounds)), key=lambda pair: pair[0])
    for way, flags in {**ways, "area": Interpolation.AREA}.items():

        def scaled(flags: int = flags) -> np.ndarray:
            scaled = reformatter.reformat(frame, width, height, "rgb24", interpolation=flags, threads=1)
            return scaled.to_ndarray()

        seconds, pixels = min((cpu_seconds(scaled) for _ in range(rounds)), key=lambda pair: pair[0])
        difference = np.abs(pixels.astype(int) - truth)
        yield {
            "video": name,
            "from_px": f"{frame.width}x{frame.height}",
            "to_px": f"{width}x{height}",
            "way": way,
            "swscale_cpu_ms": round(1e3 * seconds, 2),
            "rgb_then_pillow_cpu_ms": round(1e3 * cost, 2),
            "mean_levels": round(float(difference.mean()), 2),
            "p99_levels": int(np.percentile(difference, 99)),
            "max_levels": int(difference.max()),
        }


def circumstances() -> dict[str, str]:
    """The conditions of a measurement."""
    versions = f"av {av.__version__}, numpy {np.__version__}, python {platform.python_version()}"
    return {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "cpu": processor(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="a folder of videos")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    av.logging.set_level(av.logging.PANIC)
    rows, scaled = [], []
    for group, name, data in videos(options.videos):
        try:
            rows.append({"set": group, "video": name, **measure(data, options.frames, options.rounds)})
        except (SampleError, av.FFmpegError, KeyError) as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        if len(scaled) < 24 or group == "synthetic":
            scaled += [row for share in (0.6, 0.3) for row in scaling(name, data, share)]
        print("{set:10} {video:45} {codec:10} {size_px:10} {ratio:6.3f}  same {same_pixels}".format(**rows[-1]))
    for group in ("folder", "synthetic"):
        of_group = [row for row in rows if row["set"] == group]
        if of_group:
            total = sum(row["decode_video_cpu_ms"] for row in of_group) / sum(row["plain_cpu_ms"] for row in of_group)
            worst = max(of_group, key=lambda row: row["ratio"])
            print(f"{group}: {len(of_group)} videos, {total:.3f} in all, worst {worst['ratio']} ({worst['video']})")
    for name, table in (("bench_video_decode.csv", rows), ("bench_video_scaling.csv", scaled)):
        write_rows(RESULTS / name, [{**row, **circumstances()} for row in table])


if __name__ == "__main__":
    main()
