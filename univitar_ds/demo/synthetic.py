"""Writes the scenes of the demo to a folder for packing: images, MP4 videos and `metadata.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from univitar_ds.atomic_write import replace_text
from univitar_ds.data.decoding.task_pool import Done, Task, TaskPool
from univitar_ds.demo.draw import encode_image, encode_mp4
from univitar_ds.demo.scenes import image_scene, render, video_scene
from univitar_ds.errors import DataError, writing
from univitar_ds.owned import is_empty
from univitar_ds.screen import progress_bar

FORMAT = 1
"""Version of the scenes. Another version writes other files for the same seed."""
MARKER = "scenes.json"
"""Name of the marker file in a folder of scenes."""
TEST_SHARE = 8
"""One in this many scenes is a test scene."""

_BATCH = 32
"""Number of scenes per task of a process."""
_SILENCE_S = 600.0
"""Maximum seconds of wall time for a scene."""


def write_scenes(folder: str | Path, *, images: int, videos: int, seed: int = 0, progress: bool = False) -> None:
    """Writes `images` images and `videos` videos, an eighth of each for test, and `metadata.jsonl` to `folder`.

    The files depend only on the arguments and the versions of the encoders. `metadata.jsonl` is written last. A folder
    with `metadata.jsonl` for the same arguments is not changed, so an interrupted call can be repeated.

    Raises: DataError if the folder has other content, or if a count is negative or both counts are 0; StorageError.
    """
    folder = Path(folder)
    if min(images, videos) < 0 or images + videos == 0:
        raise DataError(f"images {images} and videos {videos} must be 0 or more and not both 0; raise one of them")
    wanted = {"format": FORMAT, "images": images, "clips": videos, "seed": seed}
    if _finished(folder, wanted):
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / MARKER, json.dumps(wanted) + "\n")  # first, because it marks the folder as a scene set
        for name in ("images", "videos"):
            (folder / name).mkdir(exist_ok=True)
        rows = _write_files(folder, _jobs(images, videos, seed), progress)
    replace_text(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _finished(folder: Path, wanted: dict[str, int]) -> bool:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; name a folder for the scene set")
    if is_empty(folder):
        return False
    marker = folder / MARKER
    if not marker.is_file():
        raise DataError(f"{folder} is not empty and holds no scene set; name another folder or empty it")
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if found != wanted:
        raise DataError(f"{folder} holds the scene set {found}, not {wanted}; name another folder or delete it")
    return (folder / "metadata.jsonl").is_file()


def _jobs(images: int, videos: int, seed: int) -> list[tuple[int, str, str, int]]:
    jobs = []
    for kind, count in (("image", images), ("video", videos)):
        test = count // TEST_SHARE
        jobs += [(seed, kind, "train", index) for index in range(count - test)]
        jobs += [(seed, kind, "test", index) for index in range(test)]
    return jobs


def _write_files(folder: Path, jobs: list[tuple[int, str, str, int]], progress: bool) -> list[dict[str, object]]:
    """Writes the scenes of `jobs`. Returns the rows of `metadata.jsonl`, in the order of the jobs."""
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    rows: dict[int, dict[str, object]] = {}
    with progress_bar(total=len(jobs), desc="scenes", unit="scene", disable=not progress) as bar:
        if workers == 1:
            for number, job in enumerate(jobs):
                rows[number] = _write_one(folder, job)
                bar.update()
            return list(rows.values())
        tasks = [Task(first, (folder, jobs[first : first + _BATCH])) for first in range(0, len(jobs), _BATCH)]
        with TaskPool(_write_batch, workers, _SILENCE_S) as pool:
            for _, event in pool.run(tasks):
                if isinstance(event, Done):
                    if event.error is not None:
                        raise DataError(f"{folder} lacks scenes: {event.error}; fix the cause and repeat the command")
                else:
                    number, row = event
                    rows[number] = row
                    bar.update()
    return [rows[number] for number in sorted(rows)]


def _write_batch(task: Task, report: Callable[[Any], None]) -> None:
    folder, jobs = task.job
    with writing(folder):
        for number, job in enumerate(jobs, task.number):
            report((number, _write_one(folder, job)))


def _write_one(folder: Path, job: tuple[int, str, str, int]) -> dict[str, object]:
    seed, kind, split, index = job
    scene = (image_scene if kind == "image" else video_scene)(seed, split, index)
    frames = render(scene)
    if kind == "image":
        data = encode_image(frames[0], extension=scene.name.rsplit(".", 1)[1], quality=scene.quality)
    else:
        data = encode_mp4(frames, scene.rate)
    (folder / scene.name).write_bytes(data)
    return scene.row()
