"""Compares the CPU time in which `decode_video` and a plain PyAV loop decode the same frames of a video.

    python benchmarks/bench_video_decode.py [--videos FOLDER] [--frames 8] [--rounds 3]

The videos are all videos below a folder (mp4, mkv, webm ...) and synthetic videos that this script encodes. For each
video, `decode_video` and the plain loop alternate in one process. A row has the minimum CPU time of each over the
rounds in milliseconds, their ratio, and whether the pixels are bitwise equal. The plain loop is the simplest correct
one: in one thread, it decodes all frames up to the last wanted one, and converts and rotates only the wanted ones. Rows
are written to results/bench_video_decode.csv.

swscale could also scale a frame while it converts it to RGB. A second table, results/bench_video_scaling.csv, shows how
much the pixels would change: the absolute difference between swscale's pixels and an antialiased bicubic resizing of
the RGB frame, on the scale of 0 to 255, for at most 3 videos of the folder and all synthetic videos.
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
"""Synthetic videos by name: (container, encoder, (height, width), number of frames, settings of the encoder)."""


def synthetic(form: str, codec: str, size: tuple[int, int], count: int, settings: dict[str, str]) -> bytes:
    """Encodes a video of a window that slides over a textured image. The arguments are those of `SYNTHETIC`."""
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
    """Decodes the frames with these numbers, which are in ascending order, in the simplest correct loop.

    Returns: (frames, H, W, 3) uint8.
    Raises: KeyError if the video has fewer frames; av.FFmpegError.
    """
    decoded: dict[int, np.ndarray] = {}
    with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                decoded[number] = np.rot90(frame.to_ndarray(format="rgb24", threads=1), frame.rotation // 90)
            if number == numbers[-1]:
                break
    return np.stack([decoded[number] for number in numbers])


def frame_count(data: bytes) -> tuple[str, int, str]:
    """Returns the codec, the number of frames that can be decoded, and the size as "WIDTHxHEIGHT"."""
    with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
        context = container.streams.video[0].codec_context
        count = sum(1 for _ in container.decode(video=0))
        return context.name, count, f"{context.width}x{context.height}"


def cpu_seconds(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Returns the CPU time of `work()` in seconds, and its result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def measure(data: bytes, frames: int, rounds: int) -> dict[str, object]:
    """Returns one row of the first table.

    Args: data: a video file; frames: number of frames to decode from it; rounds: repetitions of each measurement.
    Raises: SampleError, av.FFmpegError or KeyError if the video cannot be decoded.
    """
    codec, count, size = frame_count(data)
    numbers = by_count(sample_positions(UNIFORM, frames, 0), count)
    our_seconds, plain_seconds = [], []
    for _ in range(rounds):
        seconds, our_pixels = cpu_seconds(lambda: decode_video(data, frames=frames, limits=LIMITS))
        our_seconds.append(seconds)
        seconds, plain_pixels = cpu_seconds(lambda: plain(data, numbers))
        plain_seconds.append(seconds)
    return {
        "codec": codec,
        "size_px": size,
        "video_frames": count,
        "frames": frames,
        "decode_video_cpu_ms": round(1e3 * min(our_seconds), 2),
        "plain_cpu_ms": round(1e3 * min(plain_seconds), 2),
        "ratio": round(min(our_seconds) / min(plain_seconds), 3),
        "same_pixels": np.array_equal(our_pixels, plain_pixels),
    }


def videos(folder: Path | None) -> Iterator[tuple[str, str, bytes]]:
    """Yields (set, name, bytes) of every video: those below `folder` if given, then the synthetic videos."""
    for path in sorted(folder.rglob("*")) if folder else []:
        if path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS:
            yield "folder", path.name, path.read_bytes()
    for name, recipe in SYNTHETIC.items():
        yield "synthetic", name, synthetic(*recipe)


def scaling(name: str, data: bytes, share: float, rounds: int = 7) -> Iterator[dict[str, object]]:
    """Yields rows of the second table: the first frame scaled by swscale, compared with resized RGB pixels.

    Args: name: of the video; data: its file; share: factor for height and width, which are then rounded down to
        multiples of 14 px; rounds: repetitions of each measurement, of which the shortest counts.
    """
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
    methods = {"bilinear": Interpolation.BILINEAR, "bicubic": Interpolation.BICUBIC, "bicubic_exact": exact}
    resize_seconds, resized_pixels = min((cpu_seconds(resized) for _ in range(rounds)), key=lambda pair: pair[0])
    for method, flags in {**methods, "area": Interpolation.AREA}.items():

        def scaled(flags: int = flags) -> np.ndarray:
            rgb = reformatter.reformat(frame, width, height, "rgb24", interpolation=flags, threads=1)
            return rgb.to_ndarray()

        seconds, pixels = min((cpu_seconds(scaled) for _ in range(rounds)), key=lambda pair: pair[0])
        difference = np.abs(pixels.astype(int) - resized_pixels)
        yield {
            "video": name,
            "from_px": f"{frame.width}x{frame.height}",
            "to_px": f"{width}x{height}",
            "way": method,
            "swscale_cpu_ms": round(1e3 * seconds, 2),
            "rgb_then_pillow_cpu_ms": round(1e3 * resize_seconds, 2),
            "mean_levels": round(float(difference.mean()), 2),
            "p99_levels": int(np.percentile(difference, 99)),
            "max_levels": int(difference.max()),
        }


def circumstances() -> dict[str, str]:
    """Returns the columns for the date, the commit, the processor and the versions."""
    versions = f"av {av.__version__}, numpy {np.__version__}, python {platform.python_version()}"
    return {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "cpu": processor(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder whose videos are also measured")
    parser.add_argument("--frames", type=int, default=8, help="frames to decode from each video (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each video (default: 3)")
    options = parser.parse_args()
    av.logging.set_level(av.logging.PANIC)
    rows, scaled = [], []
    for group, name, data in videos(options.videos):
        try:
            rows.append({"set": group, "video": name, **measure(data, options.frames, options.rounds)})
        except (SampleError, av.FFmpegError, KeyError) as error:
            print(f"{name}: skipped: {error}", file=sys.stderr)
            continue
        if len(scaled) < 24 or group == "synthetic":
            scaled += [row for share in (0.6, 0.3) for row in scaling(name, data, share)]
        print("{set:10} {video:45} {codec:10} {size_px:10} {ratio:6.3f}  same {same_pixels}".format(**rows[-1]))
    for group in ("folder", "synthetic"):
        of_group = [row for row in rows if row["set"] == group]
        if of_group:
            total = sum(row["decode_video_cpu_ms"] for row in of_group) / sum(row["plain_cpu_ms"] for row in of_group)
            worst = max(of_group, key=lambda row: row["ratio"])
            most = f"at most {worst['ratio']} ({worst['video']})"
            print(f"{group}: {len(of_group)} videos, {total:.3f} of the plain loop's CPU time in total, {most}")
    for name, table in (("bench_video_decode.csv", rows), ("bench_video_scaling.csv", scaled)):
        write_rows(RESULTS / name, [{**row, **circumstances()} for row in table])


if __name__ == "__main__":
    main()
